"""The command line end to end, the options, and what a run leaves in its folder."""

import itertools
import json

import numpy as np
import pytest
import torch
import yaml
from train_cases import command_line, make_folder, one_thread, tiny_options  # noqa: F401

from lka_kernels.methods import METHODS, get_method
from lka_kernels.methods.lka import LKAOptions
from lka_kernels.train import loop, model, sweep, weights
from lka_kernels.train.cli import main, normalise, parse
from lka_kernels.train.errors import TrainError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), images=12)


def test_a_run_fills_its_folder_and_learns(data, tmp_path, capsys):
    out = tmp_path / "run"
    options = {"epochs": 6, "tensorboard": True}
    assert main(command_line(data, out, **options)) == 0
    assert {path.name for path in out.iterdir()} >= {
        "config.yaml", "versions.json", "split.json", "head.safetensors", "metrics.json",
        "history.csv", "curves.png", "confusion_matrix.png", "predictions.csv", "checkpoint.pt",
    }  # fmt: skip
    assert list((out / "tensorboard").glob("events.*"))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["final"]["top1"] > 0.7
    assert sum(map(sum, metrics["final"]["confusion"])) == metrics["data"]["test_images"] == 4
    assert json.loads((out / "versions.json").read_text())["torch"] == torch.__version__
    assert len((out / "history.csv").read_text().splitlines()) == 7
    assert "img/s" in capsys.readouterr().err


def test_yaml_file_and_its_round_trip(data, tmp_path):
    values = tiny_options(data=str(data), out=str(tmp_path / "one"), epochs=2)
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "options.yaml")]) == 0
    saved = tmp_path / "one" / "config.yaml"
    assert main(["--config", str(saved), f"--out={tmp_path / 'two'}"]) == 0
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two"))
    assert one["final"] == two["final"]


def test_method_options_from_line_and_file(tmp_path):
    _, options = parse(["somewhere", "--lka.kernel-size", "5", "--lka.conv=none"])
    assert (options.kernel_size, options.conv) == (5, "none")
    (tmp_path / "x.yaml").write_text("data: d\nlka:\n  kernel_size: 9\n  sites: [mlp]\n")
    config, options = parse(["--config", str(tmp_path / "x.yaml"), "--batch-size", "7"])
    assert (config.data, config.batch_size, options.kernel_size) == ("d", 7, 9)
    assert tuple(options.sites) == ("mlp",)


def test_dashes_and_bare_flags():
    assert normalise(["a-b", "--batch-size=3", "--resume", "--no-tensorboard", "--lr", "1e-3"]) == [
        "a-b", "--batch_size=3", "--resume=true", "--tensorboard=false", "--lr", "1e-3",
    ]  # fmt: skip
    assert normalise(["--resume", "false"]) == ["--resume", "false"]


def test_lists_of_words():
    config, options = parse(["d", "--exclude", "*_mask*", "--lka.sites=mlp", "--exclude=[0-4]*"])
    assert (config.data, config.exclude) == ("d", ["*_mask*", "[0-4]*"])
    assert tuple(options.sites) == ("mlp",)
    config, options = parse(["--exclude", '["a*", b]', "--lka.sites", "[attn, mlp]", "d"])
    assert (config.data, config.exclude) == ("d", ["a*", "b"])
    assert tuple(options.sites) == ("attn", "mlp")
    assert parse(["d"])[0].exclude == []


def test_words_replace_those_of_the_file(tmp_path):
    """As every option does: a run that is continued with its own words has them once."""
    (tmp_path / "config.yaml").write_text('data: d\nexclude: ["*_mask*"]\n')
    arguments = ["--resume", f"--out={tmp_path}", "--exclude", "*_mask*"]
    assert parse(arguments)[0].exclude == ["*_mask*"]


def test_lka_options_mirror_the_configuration():
    import dataclasses

    from lka_kernels import LKAConfig

    mine = {f.name: f.default for f in dataclasses.fields(LKAOptions)}
    library = {f.name: f.default for f in dataclasses.fields(LKAConfig)}
    # The trainer begins where its trials went best; the library keeps its documented default.
    assert (mine.pop("init"), library.pop("init")) == ("identity", "zero")
    assert mine == library


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"lr": 0}, "--lr must be above 0"),
        ({"test_fraction": 1.0}, "--test_fraction"),
        ({"model": "test_efficientnett"}, "did you mean test_efficientnet"),
        ({"weights": "nowhere.safetensors"}, "nowhere.safetensors: there is no such file"),
        ({"weights": "model.pth"}, "safetensors"),
        ({"method": "magic"}, "--method magic"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"device": "meta"}, "--device meta cannot be used"),
        ({"method": "full", "batch_size": 1}, "--batch_size 1: the model cannot be trained on si"),
        ({"cache_features": True}, "--cache_features needs"),
        ({"model": "test_vit", "input_size": 33}, "33 pixels"),
        ({"method": "lka", "model": "test_resnet"}, "takes adapters"),
        ({"method": "lka", "model": "test_vit", "lka.kernel_size": 0}, "kernel_size"),
    ],
)
def test_bad_options_end_without_a_folder_or_traceback(data, tmp_path, capsys, changes, message):
    assert main(command_line(data, tmp_path / "run", **changes)) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("lka-train: error:") or "lka-train: error:" in error
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_bad_data_ends_before_a_folder_is_made(tmp_path, capsys):
    data = make_folder(tmp_path / "data")
    (data / "a" / "bad.png").write_bytes(b"x")
    assert main(command_line(data, tmp_path / "run")) == 1
    assert "bad.png" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_an_error(data, tmp_path, capsys):
    assert main(command_line(data, tmp_path / "run", method="full", lr=1e30, clip_grad=0)) == 1
    assert "lower --lr" in capsys.readouterr().err


def test_cached_features_give_the_numbers_of_the_whole_model(data, tmp_path):
    finals = []
    for cached in (False, True):
        out = tmp_path / str(cached)
        changes = {"augment": "none", "cache_features": cached}
        assert main(command_line(data, out, **changes)) == 0
        finals.append(json.loads((out / "metrics.json").read_text())["final"])
    assert finals[0]["loss"] == pytest.approx(finals[1]["loss"], abs=1e-4)
    assert finals[0]["confusion"] == finals[1]["confusion"]


@pytest.mark.parametrize("method", ["lka", "linear", "full"])
def test_saved_weights_load_and_what_is_frozen_stays(data, tmp_path, method):
    """On EfficientNet-Lite0: batch norms, whose statistics must not move under a frozen model."""
    out = tmp_path / "run"
    changes = {"model": model.LITE0, "method": method, "epochs": 1, "input_size": 64}
    assert main(command_line(data, out, **changes)) == 0
    metrics = json.loads((out / "metrics.json").read_text())

    def fresh(seed):
        torch.manual_seed(seed)
        built = model.build(model.LITE0, "random", 2, 64).model
        return get_method(method).apply(built, METHODS[method].options())

    start = fresh(0)
    state = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    moved = {k for k, v in state.items() if not torch.equal(v, start.state_dict()[k])}
    norms = {k for k in moved if "running_" in k}
    if method == "full":
        assert norms
    else:
        assert not norms
        assert "classifier.weight" in moved
    assert (
        sum(p.numel() for p in start.parameters() if p.requires_grad)
        == (metrics["trainable_parameters"])
    )
    get_method(method).load(start, out / METHODS[method].file_name)
    loaded = start.state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in state.items() if "num_batches" not in k)


def test_lite0_weights_map_in_order():
    found = weights.lite0_imagenet_weights()
    assert len(found) == 247
    net = model.build(model.LITE0, "pretrained", 3, 64)
    assert (net.mean, net.std) == ((0.5,) * 3, (0.5,) * 3)
    assert torch.equal(net.model.state_dict()["conv_stem.weight"], found["conv_stem.weight"])
    # Trained weights, each in its place, recognise structure: features of random weights do not
    # have running statistics that fit them.
    net.model.eval()
    noise = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        normed = net.model.bn1.drop(net.model.conv_stem(noise))
    assert normed.isfinite().all()
    with pytest.raises(TrainError, match="does not fit"):
        weights.pair_in_order([("a.weight", torch.zeros(2))], [("b.bias", torch.zeros(2))])
    with pytest.raises(TrainError, match="does not fit"):
        weights.pair_in_order([("a.weight", torch.zeros(2))], [("b.weight", torch.zeros(3))])


def test_weights_file_that_does_not_fit_is_named(data, tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"odd": torch.zeros(1)}, tmp_path / "w.safetensors")
    run = command_line(data, tmp_path / "run", weights=str(tmp_path / "w.safetensors"))
    assert main(run) == 1
    assert "missing" in capsys.readouterr().err
    whole = command_line(data, tmp_path / "full", method="full", epochs=1)
    assert main(whole) == 0
    saved = tmp_path / "full" / "model.safetensors"
    assert main(command_line(data, tmp_path / "probe", weights=str(saved))) == 0


def test_autocast_trains_in_float32_parameters(data, tmp_path, capsys):
    assert main(command_line(data, tmp_path / "run", method="full", epochs=1, amp="on")) == 0
    assert "bfloat16 autocast" in capsys.readouterr().err
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}


def test_ctrl_c_ends_with_130_and_a_hint(data, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train_epoch", interrupt)
    assert main(command_line(data, tmp_path / "run")) == 130
    assert "--resume continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"class_weights": torch.tensor([0.5, 2.0])},
        {"clip_grad": 1e-3},
    ],
    ids=str,
)
def test_a_step_by_hand(options):
    """Loss and gradient of one step, against their definitions in float64."""
    layer = torch.nn.Linear(3, 2)
    x, labels = torch.randn(4, 3), torch.tensor([0, 1, 1, 1])
    weight, bias = (p.detach().double().requires_grad_() for p in layer.parameters())
    logs = (x.double() @ weight.T + bias).log_softmax(1)
    smoothing, shares = options.get("label_smoothing", 0), torch.ones(2)
    shares = options.get("class_weights", shares).double()
    target = torch.eye(2).double()[labels] * (1 - smoothing) + smoothing / 2
    expected = -(target * shares * logs).sum() / shares[labels].sum()
    grads = torch.autograd.grad(expected, (weight, bias))
    norm = sum(g.square().sum() for g in grads).sqrt()
    if "clip_grad" in options:
        grads = [g * options["clip_grad"] / norm for g in grads]
    parameters = list(layer.parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    batch = [(np.arange(4), x, labels)]
    loss, _ = loop.train_epoch(layer, parameters, optimizer, batch, rates=iter([1.0]), **options)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for new, old, grad in zip(parameters, before, grads, strict=True):
        torch.testing.assert_close(old - new, grad.float(), rtol=1e-3, atol=1e-6)


def test_balanced_weights():
    found = loop.balanced_weights(torch.tensor([0, 0, 0, 1]), 2)
    torch.testing.assert_close(found, torch.tensor([4 / 6, 2.0]))


def test_schedule():
    rates = [loop.learning_rate(step, 100, 10, 1.0, 0.01) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_sweep_writes_a_table_and_skips_what_is_done(data, tmp_path, monkeypatch):
    options = tiny_options(epochs=1)
    del options["method"]
    rest = [f"--{name}={value}" for name, value in options.items()]
    command = [str(data), f"--out={tmp_path}", "--variants", "linear", "full:lr=0.001",
               "--seeds", "0", "1", *rest]  # fmt: skip
    assert sweep.main(command) == 0
    text = (tmp_path / "table.md").read_text()
    assert "| full:lr=0.001 |" in text
    assert "±" in text
    monkeypatch.setattr("lka_kernels.train.run.train", None)  # must not be needed again
    assert sweep.main(command) == 0
    assert (tmp_path / "table.md").read_text() == text
    assert sweep.main([*command, "--weight_decay=0.5"]) == 1


def test_confidence_interval():
    # Quantiles of Student's t from the published tables.
    for freedom, value in ((1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042)):
        assert sweep.student_quantile(0.975, freedom) == pytest.approx(value, abs=6e-4)
    mean, half = sweep.confidence([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-3)
