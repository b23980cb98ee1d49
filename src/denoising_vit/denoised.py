"""A backbone and what cleans its features, as one module with the face of an extractor."""

from __future__ import annotations

from torch import Tensor, nn

from denoising_vit.artifact import Artifact
from denoising_vit.backbones import Backbone
from denoising_vit.denoiser import Denoiser


class DenoisedViT(nn.Module):
    """Clean features in one pass: ``extractor(image)`` maps (B, 3, H, W) to (B, h, w, C), as the backbone does.

    Args:
        backbone: the extractor.
        cleaner: its denoiser; or its G, which is resampled to the grid of the images and taken away from all features.

    Raises:
        ArtifactError: if the artifact is that of another backbone.
        DenoiserError: if the denoiser is.
    """

    def __init__(self, backbone: Backbone, cleaner: Artifact | Denoiser) -> None:
        super().__init__()
        cleaner.require_of(backbone)
        self.backbone = backbone
        self.denoiser = cleaner if isinstance(cleaner, Denoiser) else None
        self.artifact = cleaner if isinstance(cleaner, Artifact) else None
        self._at: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, image: Tensor) -> Tensor:
        """Clean features, (B, h, w, C) float32, of normalised images (B, 3, H, W).

        Raises:
            SizeError: if H or W does not fit the patch grid.
        """
        return self._clean(self.backbone(image))

    def forward_with_prefix(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Clean features (B, h, w, C) and the prefix tokens as they are (B, P, C)."""
        features, prefix = self.backbone.forward_with_prefix(image)
        return self._clean(features), prefix

    def _clean(self, features: Tensor) -> Tensor:
        if self.artifact is None:
            assert self.denoiser is not None
            return self.denoiser(features)
        grid = (features.shape[1], features.shape[2])
        if self._at is None or self._at[0] != grid or self._at[1].device != features.device:
            self._at = grid, self.artifact.at(grid).to(features.device)  # kept: most callers have one size
        return features - self._at[1]
