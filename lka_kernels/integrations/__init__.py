"""Adapters in the models of other libraries.

``timm`` finds the blocks that take adapters; each family has a file with the subclass that its
block becomes and what the sites "attn" and "mlp" mean there: ``timm_vit``, ``timm_swin``,
``timm_convnext``, ``timm_efficientnet``. ``adapted_block`` holds the placements they share.
timm is imported when the first model is given, not with this package.
"""
