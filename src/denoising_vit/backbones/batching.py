"""Forward passes with a batch size that fits into memory; it is halved when a batch does not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.errors import BackboneError


class Passes:
    """Forward passes of one backbone, split to fit the memory of its device.

    Args:
        backbone: the extractor.

    Attributes:
        most: maximum batch size; None until a batch did not fit.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._largest = 0
        self.most: int | None = None

    @torch.no_grad()  # not inference mode: the caller may train on the results
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, h, w, C) float32 of normalised images (B, 3, H, W).

        Raises:
            BackboneError: if the device's memory is too small for a single image, or the model does not return a grid.
            SizeError: if H or W does not fit the patch grid.
        """
        self._largest = max(len(images), self._largest)
        while True:
            most = min(self.most or self._largest, self._largest)
            try:
                parts = [self._forward(part, most) for part in images.split(most)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except torch.OutOfMemoryError as error:
                if most == 1:
                    _, _, height, width = images.shape
                    raise BackboneError(
                        f"{self._backbone.name} on {self._backbone.device}: not enough memory for a single image of "
                        f"{height} x {width} pixels; use smaller views (--size), a smaller model, or another device"
                    ) from error
            # Outside the handler, because its traceback keeps the memory of the failed pass.
            self.most = most // 2
            if self._backbone.device.type == "cuda":
                torch.cuda.empty_cache()

    def _forward(self, images: Tensor, most: int) -> Tensor:
        """One pass; for a compiled backbone, a smaller last batch is padded to avoid a recompilation."""
        count = len(images)
        if self._backbone._compiled_call_impl is not None and count < most:
            images = torch.cat([images, images.new_zeros(most - count, *images.shape[1:])])
        return self._backbone(images)[:count]


def compiled(backbone: Backbone) -> Backbone:
    """The same backbone with its forward pass compiled, once per batch size."""
    _ = backbone.fingerprint  # computed now, because its image size would also be compiled
    backbone.compile(dynamic=False)
    return backbone
