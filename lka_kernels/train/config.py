"""All options of a training run, as one dataclass: the command line and the YAML file mirror it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import TrainError
from .files import shown
from .folder import CONFIG_NAME

# Options that change how a run is carried out but not its numbers: these may differ on --resume.
FREE_ON_RESUME = frozenset(
    {"data", "out", "resume", "overwrite", "num_workers", "cache_images_gb", "tensorboard"}
)


@dataclass(frozen=True)
class TrainConfig:
    """Options of one training run.

    Args:
        data: folder of class folders, or of train and test (or val) halves that hold them
        out: folder of the run; by default runs/DATA-MODEL-METHOD-seedN
        model: any timm model name
        weights: "pretrained", "random", or a safetensors file of the backbone
        method: what is trained: one of lka_kernels.methods.METHODS
        epochs: passes over the training half
        batch_size: images in a step
        lr: peak learning rate of AdamW
        weight_decay: decoupled weight decay; biases and norms are spared
        warmup_epochs: epochs of linear warm-up before the cosine
        min_lr_ratio: last learning rate as a fraction of the peak
        clip_grad: largest gradient norm; 0 leaves gradients alone
        label_smoothing: share of the target given to all classes alike
        class_weights: "balanced" weighs the loss by inverse class frequency
        augment: "none"; "flip": left-right; "affine": flip, rotation, scale, shift, contrast
        input_size: side of the square image in pixels; 0 takes the model's own
        resize: "squash" ignores the aspect ratio, "crop" cuts the centre, "pad" adds black
        test_fraction: share of each class held out when DATA has no halves
        split_seed: seed of that split; -1 takes --seed
        test_half: name of the folder to evaluate on; by default test, else val
        drop_leaked: leave out training images that stand in the test half too
        exclude: file name patterns to leave out, such as "*_mask*"
        limit_per_class: use at most so many images of each class in each half; 0 uses all
        sixteen_bit_max: the value that counts as white in 16-bit images
        seed: seeds weights, order, augmentation and dropout
        deterministic: ask torch for deterministic algorithms only
        device: "auto", "cpu", "cuda", "cuda:1", ...
        amp: bfloat16 autocast; "auto" uses it on GPUs that multiply bfloat16
        channels_last: memory format of images and convolutions
        num_workers: threads that decode images
        cache_images_gb: decoded images are kept in memory up to this many GiB
        cache_features: with --method linear and --augment none: run the backbone once only
        checkpoint_every: epochs between checkpoints
        tensorboard: write TensorBoard event files
        resume: continue the run in --out, or start it when there is none
        overwrite: delete the run in --out and start again
    """

    data: str = ""
    out: str = ""
    model: str = "tf_efficientnet_lite0"
    weights: str = "pretrained"
    method: str = "lka"
    epochs: int = 30
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 2.0
    min_lr_ratio: float = 0.01
    clip_grad: float = 1.0
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    augment: Literal["none", "flip", "affine"] = "flip"
    input_size: int = 0
    resize: Literal["squash", "crop", "pad"] = "squash"
    test_fraction: float = 0.2
    split_seed: int = -1
    test_half: str = ""
    drop_leaked: bool = False
    exclude: list[str] = field(default_factory=list)
    limit_per_class: int = 0
    sixteen_bit_max: int = 65535
    seed: int = 0
    deterministic: bool = False
    device: str = "auto"
    amp: Literal["auto", "on", "off"] = "auto"
    channels_last: bool = True
    num_workers: int = 2
    cache_images_gb: float = 4.0
    cache_features: bool = False
    checkpoint_every: int = 1
    tensorboard: bool = True
    resume: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Raises TrainError for a value that no run could use."""
        if self.resume and not self.data:  # a run's own file would have given it
            where = f"--out {self.out} holds no run" if self.out else "--out is missing"
            if self.out and (Path(self.out) / CONFIG_NAME).is_file():
                where = "in a --config file it does not find the run's own options"
            raise TrainError(
                f"--resume: {where}; give the folder of a run on the command line, as --out, "
                "or DATA to begin one"
            )
        if not self.data:
            raise TrainError("DATA is missing: give a folder of class folders")
        at_least = {
            "epochs": 1, "batch_size": 1, "input_size": 0, "limit_per_class": 0,
            "sixteen_bit_max": 1, "num_workers": 1, "checkpoint_every": 1, "weight_decay": 0,
            "warmup_epochs": 0, "clip_grad": 0, "cache_images_gb": 0, "seed": 0, "split_seed": -1,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if not value >= least:
                raise TrainError(f"--{name} must be at least {least}, not {value}")
        if not self.lr > 0:
            raise TrainError(f"--lr must be above 0, not {self.lr}")
        if not 0 < self.test_fraction < 1:
            raise TrainError(f"--test_fraction must lie between 0 and 1, not {self.test_fraction}")
        for name in ("min_lr_ratio", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainError(f"--{name} must be in [0, 1), not {getattr(self, name)}")
        if self.resume and self.overwrite:
            raise TrainError("--resume and --overwrite exclude each other")
        if self.cache_features and (self.method != "linear" or self.augment != "none"):
            raise TrainError(
                "--cache_features needs --method linear and --augment none: only then are the "
                f"features the same in every epoch (got {self.method}, {self.augment})"
            )

    def out_folder(self) -> Path:
        """The folder of this run."""
        if self.out:
            return Path(self.out)
        name = f"{Path(self.data).resolve().name}-{self.model}-{self.method}-seed{self.seed}"
        return Path("runs") / shown(name.replace("/", "_"))


def as_dict(config: TrainConfig, method_options: Any = None) -> dict[str, Any]:
    """The options as plain values; the method's own stand under the method's name."""
    values = dataclasses.asdict(config)
    if method_options is not None and dataclasses.fields(method_options):
        options = dataclasses.asdict(method_options)
        values[config.method] = {k: _plain(v) for k, v in options.items()}
    return values


def difference(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Lines naming every option that differs and would change the run's numbers."""
    lines = []
    for name in sorted(saved.keys() | asked.keys()):
        before, now = saved.get(name), asked.get(name)
        if name in FREE_ON_RESUME or before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            for key in sorted(before.keys() | now.keys()):
                if before.get(key) != now.get(key):
                    lines.append(f"--{name}.{key}: {before.get(key)!r} then, {now.get(key)!r} now")
        else:
            lines.append(f"--{name}: {before!r} then, {now!r} now")
    return lines


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
