"""Carries out one training run, from the data folder to the report."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lka_kernels.methods import Method, get_method

from . import batches, checkpoint, dataset, features, history, loop, model, report
from .config import TrainConfig, as_dict, difference
from .errors import TrainError
from .files import shown, write_atomically, write_json
from .folder import RunFolder, check_free
from .metrics import Scores, score

METRICS_NAME = "metrics.json"


def train(config: TrainConfig, method_options: Any = None) -> dict[str, Any]:
    """Trains as ``config`` says and fills the run's folder.

    Args:
        config: the options of the run.
        method_options: an instance of the method's ``options``; None takes its defaults.

    Returns:
        The content of ``metrics.json``.

    Raises:
        TrainError: what the user can put right; wherever possible before the first epoch.
    """
    config.check()
    try:
        method = get_method(config.method)
    except ValueError as error:
        raise TrainError(f"--method: {error}") from error
    options = method.options() if method_options is None else method_options
    device = choose_device(config.device)
    out = config.out_folder()
    check_free(out, config.resume, config.overwrite)

    data = dataset.load(config, model.input_size(config.model, config.input_size))
    for note in data.notes:
        _say(f"note: {note}")
    seed_everything(config.seed, config.deterministic)
    backbone = model.build(config.model, config.weights, len(data.classes), config.input_size)
    try:
        network = method.apply(backbone.model, options)
    except (ValueError, TypeError) as error:
        raise TrainError(f"--method {method.name}: {error}") from error
    if config.batch_size == 1:  # else no batch has one image, see batches.epoch_order
        model.check_single_images(network, method.train_mode, backbone.size)
    network.to(device)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)

    with RunFolder(out, config.overwrite) as folder:
        values = as_dict(config, options) | {"resume": False, "overwrite": False}
        saved = folder.saved_config()
        if saved is not None:
            changes = difference(saved, values)
            if changes:
                raise TrainError(
                    f"--resume: {out} was started with other options:\n  " + "\n  ".join(changes)
                )
        else:
            folder.write_config(values)
        report.write_versions(out, device)
        write_json(out / "split.json", dataset.split_record(data, config.data))
        run = _Run(config, method, backbone, network, data, device, out)
        return run.carry_out()


def choose_device(name: str) -> torch.device:
    """The torch device of ``--device``; "auto" is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values, and so cannot train
    except Exception as error:  # torch raises RuntimeError or AssertionError by build
        raise TrainError(f"--device {name} cannot be used: {error}") from error
    return device


def use_amp(choice: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16.

    "auto" does so on GPUs that multiply it. Not on CPUs: with AVX-512 BF16 the forward pass of
    EfficientNet-Lite0 was seen to take 0.65 of its float32 time, but the backward pass twice,
    because of its depthwise convolutions; a whole step took longer.
    """
    if choice != "auto":
        return choice == "on"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seeds Python, NumPy and torch, and asks torch for deterministic algorithms if told to."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


@dataclass
class _Run:
    config: TrainConfig
    method: Method
    backbone: model.Backbone
    network: nn.Module
    data: dataset.Dataset
    device: torch.device
    out: Path

    def __post_init__(self) -> None:
        self.amp = use_amp(self.config.amp, self.device)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.features: dict[str, Tensor] = {}

    def carry_out(self) -> dict[str, Any]:
        config, data = self.config, self.data
        optimizer = loop.make_optimizer(self.network, config.lr, config.weight_decay)
        identity = {
            "frozen weights": model.frozen_fingerprint(self.network),
            "images": data.fingerprint,
        }
        done, rows = 0, []
        content = checkpoint.load(self.out) if config.resume else None
        if content is not None:
            done, rows = checkpoint.restore(content, self.network, optimizer, identity)
            _say(f"continuing {self.out} after epoch {done} of {config.epochs}")
        self._describe()
        if config.cache_features:
            self._store_features()
        logits = None
        board = history.TensorBoard(self.out, config.tensorboard, done + 1)
        an_epoch = len(data.train) + len(data.test)
        bar = tqdm(
            total=config.epochs * an_epoch, initial=done * an_epoch, unit="img", disable=None,
            dynamic_ncols=True,
        )  # fmt: skip
        with bar, contextlib.closing(board):
            for epoch in range(done, config.epochs):
                bar.set_description(f"epoch {epoch + 1}/{config.epochs}")
                values, logits = self._epoch(epoch, optimizer, bar.update)
                rows.append(values)
                history.write_csv(self.out, rows)
                board.log(values)
                last = epoch + 1 == config.epochs
                if last or (epoch + 1) % config.checkpoint_every == 0:
                    checkpoint.save(self.out, self.network, optimizer, epoch + 1, rows, identity)
                bar.clear()
                self._print_row(values)
        if logits is None:  # everything was trained before; the report may be missing
            logits = self._predict(lambda images: None)
            history.write_csv(self.out, rows)
        return self._report(rows, logits)

    def _describe(self) -> None:
        learning = sum(p.numel() for p in self.parameters)
        total = sum(p.numel() for p in self.network.parameters())
        _say(
            f"{self.config.model} at {self.backbone.size} pixels, method {self.method.name}: "
            f"{learning:,} of {total:,} parameters learn\n"
            f"{len(self.data.train)} training and {len(self.data.test)} test images of "
            f"{len(self.data.classes)} classes; {self.device}, "
            f"{'bfloat16 autocast' if self.amp else 'float32'}; {self.out}"
        )

    def _forward(self, images: Tensor, network: nn.Module | None = None) -> Tensor:
        network = network or self.network
        images = batches.normalise(images, self.backbone.mean, self.backbone.std)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return network(images)

    def _store_features(self) -> None:
        self.network.eval()
        pooled = features.PooledFeatures(self.network)

        def forward(batch: Tensor) -> Tensor:
            return self._forward(batch.to(self.device), pooled)

        for name, half in (("train", self.data.train), ("test", self.data.test)):
            self.features[name] = features.compute_features(
                forward, half, self.config.batch_size
            ).to(self.device)

    def _model(self, name: str):
        if name in self.features:
            return self.network.get_classifier()
        return self._forward

    def _batches(self, name: str, orders: list[np.ndarray], epoch: int | None) -> loop.Batches:
        half: batches.Images = getattr(self.data, name)
        if name in self.features:
            for indices in orders:
                where = torch.from_numpy(indices)
                stored = self.features[name][where.to(self.device)]
                yield indices, stored, half.labels[where].to(self.device)
            return
        for indices, images in half.batches(orders):
            if epoch is not None:
                images = batches.augment(
                    images, indices, self.config.augment, self.config.seed, epoch
                )
            labels = half.labels[torch.from_numpy(indices)]
            yield indices, images.to(self.device), labels.to(self.device)

    def _rates(self, first_step: int, steps: int) -> Iterator[float]:
        config = self.config
        for step in itertools.count(first_step):
            yield loop.learning_rate(
                step,
                config.epochs * steps,
                round(config.warmup_epochs * steps),
                config.lr,
                config.lr * config.min_lr_ratio,
            )

    def _epoch(self, epoch: int, optimizer, progress) -> tuple[dict[str, float], Tensor]:
        config, data = self.config, self.data
        begun = time.perf_counter()
        orders = batches.epoch_order(len(data.train), config.batch_size, config.seed, epoch)
        weights = None
        if config.class_weights == "balanced":
            weights = loop.balanced_weights(data.train.labels, len(data.classes)).to(self.device)
        self.method.train_mode(self.network)
        loss, top1 = loop.train_epoch(
            self._model("train"),
            self.parameters,
            optimizer,
            self._batches("train", orders, epoch),
            rates=self._rates(epoch * len(orders), len(orders)),
            clip_grad=config.clip_grad,
            label_smoothing=config.label_smoothing,
            class_weights=weights,
            progress=progress,
        )
        rate = len(data.train) / (time.perf_counter() - begun)
        logits = self._predict(progress)
        values = history.row(
            epoch + 1,
            optimizer.param_groups[0]["lr"],
            loss,
            top1,
            score(logits, data.test.labels),
            data.classes,
            time.perf_counter() - begun,
            rate,
        )
        return values, logits

    def _predict(self, progress) -> Tensor:
        self.network.eval()
        orders = batches.in_order(len(self.data.test), self.config.batch_size)
        return loop.predict(self._model("test"), self._batches("test", orders, None), progress)

    def _print_row(self, values: dict[str, float]) -> None:
        left = (self.config.epochs - values["epoch"]) * values["seconds"]
        _say(
            f"epoch {values['epoch']:>3}/{self.config.epochs}  loss {values['train_loss']:.4f}  "
            f"train {values['train_top1']:.3f}  test {values['test_top1']:.3f}  "
            f"F1 {values['test_macro_f1']:.3f}  AUROC {values['test_auroc']:.3f}  "
            f"{values['images_per_second']:.0f} img/s  {left / 60:.1f} min left"
        )

    def _report(self, rows: list[dict[str, float]], logits: Tensor) -> dict[str, Any]:
        data, out = self.data, self.out
        scores = score(logits, data.test.labels)
        write_atomically(
            out / self.method.file_name, lambda path: self.method.save(self.network, path)
        )
        best = max(rows, key=lambda values: values["test_top1"])
        metrics = {
            "model": self.config.model,
            "method": self.method.name,
            "input_size": self.backbone.size,
            "epochs": self.config.epochs,
            "seed": self.config.seed,
            "trainable_parameters": sum(p.numel() for p in self.parameters),
            "total_parameters": sum(p.numel() for p in self.network.parameters()),
            "classes": list(data.classes),
            "data": data.report,
            "final": _named_scores(scores, data.classes),
            # Chosen by looking at the test half, and therefore no estimate for new images.
            "best_epoch_on_test": {"epoch": best["epoch"], "top1": best["test_top1"]},
            "seconds": round(sum(values["seconds"] for values in rows), 1),
            "weights_file": self.method.file_name,
        }
        report.draw_curves(out, rows)
        report.draw_confusion(out, scores.confusion, data.classes)
        report.write_predictions(out, data.test.paths, data.test.labels, logits, data.classes)
        write_json(out / METRICS_NAME, metrics)  # last: it says that the run is complete
        _say(
            f"test: top-1 {scores.top1:.4f}, macro-F1 {scores.macro_f1:.4f}, "
            f"AUROC {scores.auroc:.4f}, by class "
            + ", ".join(f"{c} {v:.3f}" for c, v in zip(data.classes, scores.per_class, strict=True))
        )
        return metrics


def _named_scores(scores: Scores, classes: tuple[str, ...]) -> dict[str, Any]:
    values = asdict(scores)
    values["per_class"] = dict(zip(classes, scores.per_class, strict=True))
    values["mean_class_accuracy"] = scores.mean_class_accuracy
    return values


def _say(text: str) -> None:
    tqdm.write(shown(text), file=sys.stderr)
    sys.stderr.flush()
