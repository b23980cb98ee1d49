"""Training pairs of new views in every step, of photos and fields that are held in memory as far as they fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.denoiser.pairs import KeptPairs, sampled
from denoising_vit.denoiser.targets import Fitted, StoredTargets
from denoising_vit.training.samples import Sample

#: Bytes of photos and fields that are held.
_HELD_BYTES = 2 * 1024**3


class FreshPairs:
    """Pairs of new views: photos and fields are read ahead, the backbone runs in every step.

    Args:
        targets: of a store.
        backbone: the extractor, frozen.
    """

    def __init__(self, targets: StoredTargets, backbone: Backbone) -> None:
        self._backbone = backbone
        self._fitted = HeldImages(targets.at, _HELD_BYTES)

    def read(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Rendered views (B, 3, H, W), normalised, and targets (B, h, w, C) float32 of samples of one size."""
        images, target = [], []
        for sample in samples:
            fitted = self._fitted(sample.image)
            images.append(sample.crop.render(fitted.image, self._backbone.mean, self._backbone.std))
            target.append(sampled(fitted.field, [sample.crop], self._backbone)[0])
        return torch.stack(images), torch.stack(target)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Raw features (B, h, w, C) float32 of rendered views."""
        return self._backbone(images)


Pairs = KeptPairs | FreshPairs


class HeldImages:
    """Images with their fields; those that were asked for last are held in memory, up to so many bytes.

    Args:
        get: makes one, by its index.
        most: bytes of all that are held.
    """

    def __init__(self, get: Callable[[int], Fitted], most: int) -> None:
        self._get, self._most = get, most
        self._held: OrderedDict[int, Fitted] = OrderedDict()
        self.bytes = 0

    def __call__(self, index: int) -> Fitted:
        """One image, held or made.

        Raises:
            Exception: whatever making it raises.
        """
        if index in self._held:
            self._held.move_to_end(index)
            return self._held[index]
        fitted = self._held[index] = self._get(index)
        self.bytes += fitted.bytes
        while self.bytes > self._most:  # one that is too large by itself is not held
            self.bytes -= self._held.popitem(last=False)[1].bytes
        return fitted
