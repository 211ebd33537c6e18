"""Small backbones of every supported kind, quick enough for two cores."""

from __future__ import annotations

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientnet import EfficientNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from lka_kernels.adapters import adapter_parameters


@pytest.fixture(autouse=True)
def one_thread():
    """One thread for each test of a module that imports this: waking two takes longer than both
    have to do here, and far longer where other processes keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_VIT = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 4,
}


def vit(**options):
    return VisionTransformer(**{**_VIT, **options})


def vit_registers(**options):
    return vit(reg_tokens=3, init_values=0.1, **options)


def vit_no_prefix(**options):
    return vit(class_token=False, global_pool="avg", **options)


def vit_distilled(**options):
    return VisionTransformerDistilled(**{**_VIT, **options})


def vit_dynamic(**options):
    return vit(dynamic_img_size=True, **options)


def swin(**options):
    return SwinTransformer(
        **{
            "img_size": 56,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 2),
            "num_classes": 4,
            "drop_path_rate": 0.0,
            **options,
        }
    )


def convnext(**options):
    depths = options.pop("depths", (1, 2, 1, 1))
    return ConvNeXt(depths=depths, dims=(8, 16, 16, 24), num_classes=4, **options)


def convnext_conv_mlp(**options):
    return convnext(conv_mlp=True, **options)


def convnext_v2(**options):
    return convnext(use_grn=True, ls_init_value=None, **options)


def convnext_v2_conv_mlp(**options):
    return convnext_v2(conv_mlp=True, **options)


def efficientnet(**options):
    """Depthwise separable, fused and inverted residual blocks."""
    return _efficientnet(
        ["ds_r2_k3_s1_c16", "er_r2_k3_s2_e2_c16", "ir_r2_k5_s2_e2_c24_se0.25"], **options
    )


def mobilenet_v4(**options):
    return _efficientnet(["er_r1_k3_s2_e2_c16", "uir_r2_a3_k5_s2_e2_c24"], **options)


def efficientnet_v2(**options):
    return _efficientnet(["cn_r2_k3_s1_e1_c16_skip", "er_r2_k3_s2_e2_c24"], **options)


def efficientnet_condconv(**options):
    return _efficientnet(["ir_r2_k3_s2_e2_c16_cc4"], **options)


def _efficientnet(stages, **options):
    from timm.models._efficientnet_builder import decode_arch_def

    return EfficientNet(
        decode_arch_def([[stage] for stage in stages], experts_multiplier=1),
        num_classes=4,
        num_features=32,
        stem_size=16,
        **options,
    )


# name -> (factory, height = width of its images)
BACKBONES = {
    "vit": (vit, 32),
    "vit_registers": (vit_registers, 32),
    "vit_no_prefix": (vit_no_prefix, 32),
    "vit_distilled": (vit_distilled, 32),
    "vit_dynamic": (vit_dynamic, 32),
    "swin": (swin, 56),
    "convnext": (convnext, 32),
    "convnext_conv_mlp": (convnext_conv_mlp, 32),
    "convnext_v2": (convnext_v2, 32),
    "convnext_v2_conv_mlp": (convnext_v2_conv_mlp, 32),
    "efficientnet": (efficientnet, 32),
    "efficientnet_v2": (efficientnet_v2, 32),
    "mobilenet_v4": (mobilenet_v4, 32),
    "efficientnet_condconv": (efficientnet_condconv, 32),
}
# One of each family, where the difference within a family does not matter.
FAMILIES = ("vit_registers", "swin", "convnext", "efficientnet")


def make(name, seed=0, **options):
    """A backbone with lively weights, in evaluation mode, and a batch of two images for it."""
    torch.manual_seed(seed)
    factory, size = BACKBONES[name]
    model = factory(**options)
    enliven(model.parameters())
    return model.eval(), torch.randn(2, 3, size, size)


@torch.no_grad()
def enliven(parameters, scale=0.1):
    """Add noise, so that no zero or constant initialisation hides a mistake."""
    for p in parameters:
        p.add_(torch.randn_like(p) * scale)


def enliven_adapters(model):
    enliven(adapter_parameters(model, head=False))
    return model
