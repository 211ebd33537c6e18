"""Adapters in a model: put them in, list them, save them and load them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lka_kernels.config import LKAConfig
from lka_kernels.integrations.adapted_block import AdaptedBlock, PlannedBlock, PlannedHook
from lka_kernels.integrations.timm import plan_adapters


def add_adapters(model: nn.Module, config: LKAConfig, *, train_head: bool = True) -> nn.Module:
    """Put adapters into a timm model, in place, and freeze everything else.

    Each residual block becomes an instance of a subclass of its class, with the adapters as new
    children ``lka_attn`` and ``lka_mlp`` (``lka_block`` in EfficientNet's blocks). Keys of the
    ``state_dict`` that were there stay; ``copy.deepcopy``, pickling, gradient checkpointing,
    ``set_input_size`` and dynamic image sizes work as before. With ``config.init`` "zero" or
    "identity" the model's outputs are bit-identical to those it gave before: always in evaluation,
    and in training for the same random seed if ``config.dropout`` is 0 (an adapter's dropout draws
    from the generator that the base model draws from).

    Supported are VisionTransformer, SwinTransformer, ConvNeXt (V1, V2) and the EfficientNet and
    MobileNet families of timm; ``lka_kernels.integrations`` says where an adapter goes in each.

    BatchNorm: freezing sets ``requires_grad=False`` and nothing more. In training mode a frozen
    BatchNorm still normalises with the statistics of the batch and updates its running ones,
    which ``save_adapters`` does not save. To train on the pretrained statistics, call
    ``freeze_batch_norm(model)`` after each ``model.train()``.

    Args:
        model: a timm model; adapters take the device, dtype and training mode of their block.
        config: which adapters; arXiv 2506.19118 for what the choices mean.
        train_head: whether ``model.get_classifier()`` is trained too. Such a head is listed and
            saved with the adapters.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` or ``config`` has the wrong type, or ``train_head`` is set and the
            model has no ``get_classifier``.
        ValueError: the model has adapters already, or is not supported (the message lists what
            is, and what was found). The model is then unchanged.
        ImportError: timm is not installed.
    """
    planned = plan_injection(model, config, train_head)
    install(model, planned, config, train_head)
    return model


def adapter_parameters(model: nn.Module, *, head: bool = True) -> list[nn.Parameter]:
    """The parameters that ``add_adapters`` made trainable, in the order of ``model.parameters()``.

    Args:
        model: a model with adapters.
        head: whether to include the head that is trained with them (``train_head``).

    Raises:
        ValueError: the model has no adapters.
    """
    model = unwrapped(model)
    prefixes = _adapter_prefixes(model, head)
    return [p for name, p in model.named_parameters() if name.startswith(prefixes)]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The part of ``model.state_dict()`` that ``save_adapters`` saves.

    Returns:
        The adapters' tensors, and the head's if it is trained with them, under the keys of
        ``model.state_dict()`` (of the model inside, for one wrapped by ``torch.compile`` or
        ``DistributedDataParallel``); detached, sharing memory with the model.

    Raises:
        ValueError: the model has no adapters.
    """
    model = unwrapped(model)
    prefixes = _adapter_prefixes(model, head=True)
    return {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)}


def freeze_batch_norm(model: nn.Module) -> int:
    """Put every frozen BatchNorm layer into evaluation mode, so that its statistics stay.

    To be called after each ``model.train()``, which undoes it.

    Returns:
        The number of layers: BatchNorm layers none of whose parameters is trainable.
    """
    frozen = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        and not any(p.requires_grad for p in m.parameters())
    ]
    for module in frozen:
        # Not .eval(): timm's BatchNormAct2d has dropout and activation children of its own.
        module.training = False
    return len(frozen)


def named_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every adapter in ``model``."""
    for block_name, block in model.named_modules():
        if isinstance(block, AdaptedBlock):
            for name, adapter in block.adapters():
                yield f"{block_name}.{name}" if block_name else name, adapter


def has_adapters(model: nn.Module) -> bool:
    """Whether ``add_adapters`` has been applied to ``model``."""
    return any(True for _ in named_adapters(model))


def head_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of ``model.get_classifier()``, which may be several (a distilled DeiT).

    Raises:
        TypeError: the model has no ``get_classifier``.
    """
    if not hasattr(model, "get_classifier"):
        raise TypeError(
            f"train_head=True needs a model with get_classifier(), which {type(model).__name__} "
            "has not; pass train_head=False"
        )
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    return [(name, m) for name, m in model.named_modules() if any(m is h for h in heads)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile`` and of data parallelism."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def plan_injection(
    model: nn.Module, config: LKAConfig, train_head: bool
) -> list[PlannedBlock | PlannedHook]:
    """Everything of ``add_adapters`` that can fail."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(config, LKAConfig):
        raise TypeError(f"config must be an LKAConfig; got {type(config).__name__}")
    if has_adapters(model):
        raise ValueError(
            f"model has adapters already ({getattr(model, 'lka_config', None)}); "
            "add_adapters takes a model without"
        )
    if train_head:
        head_modules(model)
    return plan_adapters(model, config)


def install(
    model: nn.Module,
    planned: list[PlannedBlock | PlannedHook],
    config: LKAConfig,
    train_head: bool,
) -> None:
    """Make the planned changes, freeze the rest; cannot fail half-way."""
    model.requires_grad_(False)
    for change in planned:
        change.install()
    if train_head:
        for _, head in head_modules(model):
            head.requires_grad_(True)
    model.lka_config = config
    model.lka_train_head = train_head


def _adapter_prefixes(model: nn.Module, head: bool) -> tuple[str, ...]:
    """Prefixes of the keys of adapters, and of the head if it is trained with them."""
    modules = list(named_adapters(model))
    if not modules:
        raise ValueError(f"model {type(model).__name__} has no adapters; see add_adapters")
    if not hasattr(model, "lka_config"):
        raise ValueError(
            f"model {type(model).__name__} has adapters in a part of it ({modules[0][0]}); pass "
            "the part that was given to add_adapters"
        )
    if head and model.lka_train_head:
        modules += head_modules(model)
    return tuple(f"{name}." for name, _ in modules)
