"""Entry points for ``torch.hub.load(REPO, ENTRY, NAME)``; for a clone add ``source="local"``."""

import sys
from pathlib import Path
from typing import Any

dependencies = ["torch", "torchvision", "timm", "safetensors", "huggingface_hub", "scipy", "sklearn"]

_SOURCE = str(Path(__file__).parent / "src")


def clean(name: str = "vit_small_patch14_dinov2.lvd142m", method: str = "auto", weights: str = "auto", **options: Any):
    """A timm ViT whose ``forward_features`` and ``forward_intermediates`` give clean patch tokens.

    Args:
        name: timm name.
        method: as in ``denoising_vit.clean``.
        weights: as in ``denoising_vit.load_backbone``.
        **options: of the method.
    """
    dv = _package()
    return dv.clean(dv.load_backbone(name, weights=weights, dtype="float32", device="cpu").model, method, **options)


def backbone(name: str = "vit_small_patch14_dinov2.lvd142m", **options: Any):
    """A ``denoising_vit.Backbone``: images (B, 3, H, W) to features (B, h, w, C); options of ``load_backbone``."""
    return _package().load_backbone(name, **options)


def _package() -> Any:
    if _SOURCE not in sys.path:
        sys.path.insert(0, _SOURCE)
    import denoising_vit

    return denoising_vit
