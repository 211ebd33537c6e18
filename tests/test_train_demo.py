"""The demo's table and its verdict, from results made up."""

import pytest

from lka_kernels.train.demo import Result, table, verdict


def results(best, rival):
    return {
        "linear": Result(0.5, 100, None, None),
        "LKA 3x3": Result(rival, 2000, 0.01, 0.02),
        "LKA 7x7": Result(best, 3000, 0.0123, 0.0456),
    }


def test_table():
    head, linear, _, best = table(results(0.9, 0.6), 400).splitlines()
    assert head.split() == ["accuracy", "parameters", "fused", "s/step", "torch", "s/step"]
    assert linear.split() == ["linear", "50.0", "±", "4.9", "%", "100", "-", "-"]
    assert best.split() == ["LKA", "7x7", "90.0", "±", "2.9", "%", "3,000", "0.0123", "0.0456"]


@pytest.mark.parametrize(
    ("best", "rival", "status", "text"),
    [
        (0.9, 0.6, 0, "LKA 7x7 is 30.0 points ahead of the next, LKA 3x3"),
        (0.63, 0.6, 1, "not shown: LKA 7x7 has 63.0 %, LKA 3x3 60.0 %"),
        (0.6, 0.9, 1, "not shown"),
        (1.0, 1.0, 1, "not shown"),
    ],
)
def test_verdict(capsys, best, rival, status, text):
    """A lead must exceed two standard errors of the difference, 6.9 points at 63 % of 400."""
    assert verdict(results(best, rival), 400) == status
    assert text in capsys.readouterr().out
