"""Any of our extractors as a backbone of VisBench, so that features can be evaluated by third-party tools.

    pip install visbench denoising-vit "pillow<12"     # in a separate environment: VisBench needs an older Pillow

    from visbench_backbone import visbench_backbone
    visbench.run(visbench_backbone(extractor, backbone, name="dinov2-clean"), "retrieval", dataset)

The extractor is a backbone, or `dv.DenoisedViT(backbone, denoiser)`. Photos are squeezed to the backbone's default
size, as everywhere in this package.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from denoising_vit.artifact import artifact_digest
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import state_digest
from denoising_vit.views.plan import ViewPlan
from denoising_vit.views.rendering import ViewRenderer, to_image


def visbench_backbone(extractor: nn.Module, backbone: Backbone, name: str):
    """A `visbench.backbones.custom.CustomBackbone` of an extractor.

    Args:
        extractor: normalised images (B, 3, H, W) -> features (B, h, w, C).
        backbone: the backbone that gives normalisation, size and class token.
        name: name of the results.

    Raises:
        ImportError: if VisBench is not installed.
    """
    from visbench.backbones.custom import CustomBackbone

    side = backbone.default_size
    plan = ViewPlan.make(1, size=(side, side), patch_size=backbone.patch_size, stride=backbone.stride)

    known = getattr(extractor, "artifact", None)
    artifact = None if known is None else artifact_digest(known.values)

    def preprocess(photo: Image.Image) -> Tensor:
        pixels = np.asarray(photo.convert("RGB"))
        return ViewRenderer(to_image(pixels), plan, backbone.mean, backbone.std)(slice(0, 1))[0]

    @torch.no_grad()
    def features_of(module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Patch tokens (B, h w, C), the class token (B, C) or the mean if there is none, and (h, w)."""
        features, prefix = module.forward_with_prefix(images)  # pyright: ignore[reportCallIssue]
        tokens = features.flatten(1, 2)  # (B, h, w, C) -> (B, h w, C)
        return tokens, prefix[:, 0] if prefix.shape[1] else tokens.mean(1), tuple(features.shape[1:3])

    return CustomBackbone(
        extractor,
        preprocess,
        name=name,
        embed_dim=backbone.embed_dim,
        has_cls_token=True,
        patch_size=backbone.patch_size,
        feature_fn=features_of,
        image_size=side,
        weights_id=f"{state_digest(extractor)}-{artifact}",  # VisBench's own has no bfloat16, and ignores the artifact
        device=str(backbone.device),
    )
