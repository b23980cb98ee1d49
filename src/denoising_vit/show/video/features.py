"""Features of batches of frames by several extractors, the backbone's own pass shared by those that build on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import describe
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.denoise import denoise_image
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.extractors import KINDS, Cleaners, Extractor
from denoising_vit.show.video.options import VideoOptions


class FrameFeatures:
    """Named features of frames.

    Attributes:
        identity: what decides them, as JSON values.

    Args:
        backbone: whose features are shown.
        cleaners: of the backbone.
        options: which features.

    Raises:
        ArtifactError, DenoiserError: if a cleaner is that of another backbone, or none comes with the package.
        WeightsError: if weights of stage 3 are missing or those of another model.
        FormatError: if a file is missing, damaged or something else.
    """

    def __init__(self, backbone: Backbone, cleaners: Cleaners, options: VideoOptions) -> None:
        self.backbone, self._names, self._views = backbone, options.names, options.views
        self.identity: dict[str, Any] = {"backbone": describe(backbone)}
        self._extractors: dict[str, Extractor] = {}
        for name in self._names:
            if not KINDS[name].per_image:
                self._extractors[name], found = cleaners.extractor(name, backbone)
                self.identity |= found

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> dict[str, Tensor]:
        """Features (B, h, w, C) float32 on the CPU of frames (B, H, W, 3) uint8, by name, in order."""
        return {name: features.float().cpu() for name, features in self._of(frames).items()}

    def _of(self, frames: np.ndarray) -> dict[str, Tensor]:
        images = self._normalised(frames)
        raw = None
        found: dict[str, Tensor] = {}
        for name in self._names:
            extractor = self._extractors.get(name)
            if extractor is None:
                found[name] = torch.stack([self._exact(frame) for frame in frames])
            elif extractor is self.backbone:
                found[name] = raw = self.backbone(images) if raw is None else raw
            elif isinstance(extractor, DenoisedViT) and extractor.backbone is self.backbone:
                raw = self.backbone(images) if raw is None else raw
                found[name] = extractor.clean(raw)
            else:
                found[name] = extractor(images)
        return found

    def _normalised(self, frames: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) on the backbone's device."""
        images = torch.from_numpy(frames).to(self.backbone.device).permute(0, 3, 1, 2).float().div_(255)
        mean, std = (
            torch.tensor(values, device=images.device)[:, None, None]
            for values in (self.backbone.mean, self.backbone.std)
        )
        return images.sub_(mean).div_(std)

    def _exact(self, frame: np.ndarray) -> Tensor:
        options = DenoiseOptions(size=(frame.shape[0], frame.shape[1]), views=self._views, held_out=0)
        return denoise_image(self.backbone, frame, options=options).semantic
