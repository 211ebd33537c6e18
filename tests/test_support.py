"""The support table: rows follow the predicates, whatever can run on this machine."""

import pytest
import torch

from lka_kernels import _extension, dispatch, info, ops, support, tiles


@pytest.fixture(autouse=True)
def on_gpus(monkeypatch):
    """Triton's interpreter serves tensors on the CPU; the table is of GPUs."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def row(backend, method, operator="depthwise_conv2d"):
    wanted = (operator, backend, method)
    (found,) = (r for r in support.support() if (r.operator, r.backend, r.method) == wanted)
    return found


def test_every_family_of_operators_is_in_a_row():
    rows = [r for r in support.support() if r.operator == "depthwise_conv2d"]
    families = {dispatch.Choice(r.backend, r.method, "").family for r in rows}
    assert families == {*ops.DEPTHWISE, "torch"}
    assert {r.backend for r in rows} == {*dispatch.BACKENDS, "gpu", "fft"}


def test_values_are_those_of_the_predicates():
    triton = row("triton", "auto")
    assert triton.devices == ("cuda",)
    assert torch.float64 not in triton.dtypes
    assert triton.strides == ((1, 1),)
    assert row("triton", "fft").strides == support.STRIDES
    assert row("cpu", "direct").strides == support.STRIDES
    assert row("cpu", "fft").strides == ((1, 1),)
    assert row("cuda", "fft").strides == ((1, 1),)
    assert torch.float64 not in row("cuda", "fft").dtypes
    assert row("torch", "direct").devices == support.DEVICES
    assert row("triton", "fused", "large_kernel_adapter").most_rank == tiles.MOST_RANK
    assert row("cpu", "fused", "large_kernel_adapter").most_rank is None
    cuda = row("cuda", "fused", "large_kernel_adapter")
    assert cuda.most_rank == tiles.MOST_RANK
    assert torch.float64 not in cuda.dtypes


def test_what_auto_takes_on_a_gpu_is_called_auto():
    for method in ("auto", "fft"):
        found = row("gpu", method)
        assert found.devices == ("cuda",)
        assert found.strides == ((1, 1),)
        assert torch.float64 not in found.dtypes
    assert row("gpu", "fused", "large_kernel_adapter").most_rank == tiles.MOST_RANK
    assert "| `depthwise_conv2d` | `auto` | auto | cuda | float32, " in support.as_markdown()
    assert "`gpu`" not in support.as_markdown()


def test_a_predicate_that_changes_changes_the_table(monkeypatch):
    before = support.as_markdown()
    allowed = dispatch._cannot_run_depthwise

    def refuses_float16(backend, input, weight, stride, *rest):
        if backend == "cuda" and input.dtype == torch.float16 and stride != (1, 1):
            return "no"
        return allowed(backend, input, weight, stride, *rest)

    monkeypatch.setattr(dispatch, "_cannot_run_depthwise", refuses_float16)
    rows = [r for r in support.support() if (r.backend, r.method) == ("cuda", "direct")]
    assert [(r.dtypes, r.strides) for r in rows] == [
        ((torch.float32, torch.bfloat16, torch.float64), support.STRIDES),
        ((torch.float16,), ((1, 1),)),
    ]
    assert support.as_markdown() != before


def test_what_no_row_can_say_is_an_error(monkeypatch):
    def strides_by_layout(backend, input, weight, stride, *rest):
        last = input.is_contiguous(memory_format=torch.channels_last)
        return "no" if last and stride != (1, 1) else None

    monkeypatch.setattr(dispatch, "_cannot_run_depthwise", strides_by_layout)
    with pytest.raises(NotImplementedError, match="no row of the table"):
        support.support()


def test_it_does_not_depend_on_what_can_run_here(monkeypatch):
    before = support.as_markdown()
    monkeypatch.setattr(_extension, "MODULE", None)
    assert support.as_markdown() == before


def test_printed_and_written(tmp_path, capsys):
    assert info.main(["--support-table"]) == 0
    assert capsys.readouterr().out.strip() == support.as_markdown()
    file = tmp_path / "README.md"
    file.write_text(f"before\n{support.BEGIN}\nold\n{support.END}\nafter\n")
    assert info.main(["--support-table", str(file)]) == 0
    written = f"before\n{support.BEGIN}\n{support.as_markdown()}\n{support.END}\nafter\n"
    assert file.read_text() == written
    file.write_text("no markers")
    assert info.main(["--support-table", str(file)]) == 2
    assert "has no lines" in capsys.readouterr().err
    assert file.read_text() == "no markers"
