"""How well a denoiser does on images that it never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.denoiser.pairs import KeptPairs
from denoising_vit.metrics.blank_test import BlankProbe, blank_figures
from denoising_vit.metrics.position import linear_position_r2, neighbour_position_r2
from denoising_vit.metrics.tokens import effective_rank
from denoising_vit.training.loop import Figures
from denoising_vit.training.samples import Sample, whole_view

#: Pairs in one pass.
_BATCH = 8

#: Fewer images than this tell nothing about the place.
_PLACED = 8


@dataclass
class Judge:
    """Held-out images and the figures of raw features, which are taken once.

    Attributes:
        pairs: that are kept of these images.
        images: their indices.
        sizes: (H, W) that are trained on; rank and place are measured at the first.
        device: where the denoiser is.
        blank: gives raw features of the blank-image test; called once.
    """

    pairs: KeptPairs
    images: Sequence[int]
    sizes: Sequence[tuple[int, int]]
    device: torch.device
    blank: Callable[[], BlankProbe]
    _blank: BlankProbe | None = field(default=None, init=False, repr=False)
    _raw: Figures | None = field(default=None, init=False, repr=False)

    def __call__(self, denoiser: Callable[[Tensor], Tensor]) -> Figures:
        """Figures of a denoiser beside those of raw features and of the targets.

        ``cosine`` and ``mse`` are to the targets, means over whole images at all sizes; ``crop_cosine`` the same for
        one crop of each image. ``ratio`` is (1 - cosine) over that of raw features. ``rank`` is the effective rank,
        ``place`` and ``place_neighbours`` the R^2 of a linear and of a nearest-neighbour probe for the place in the
        view. To them come the figures of :func:`~denoising_vit.metrics.blank_test.blank_figures`, relative to raw.
        """
        if self._raw is None or self._blank is None:
            self._blank = self.blank()
            self._raw = {f"raw_{name}": value for name, value in self._figures(lambda raw: raw).items()}
            targets = torch.cat([target for _, target in self._batches(0, 0)])
            self._raw |= {f"target_{name}": value for name, value in spread(targets).items()}
        figures = self._figures(denoiser)
        ratio = (1 - figures["cosine"]) / max(1 - self._raw["raw_cosine"], 1e-12)
        blank = self._blank.through(lambda raw: denoiser(raw.to(self.device)))
        return figures | {"ratio": ratio} | known_blank_figures(blank, self._blank) | self._raw

    @torch.no_grad()
    def _figures(self, denoiser: Callable[[Tensor], Tensor]) -> Figures:
        figures = self._agreement(denoiser, 0)
        if crops := self.pairs.crops:
            figures |= {f"crop_{name}": value for name, value in self._agreement(denoiser, crops[0]).items()}
        clean = [denoiser(raw.to(self.device)).cpu() for raw, _ in self._batches(0, 0)]
        return figures | spread(torch.cat(clean))

    def _agreement(self, denoiser: Callable[[Tensor], Tensor], number: int) -> Figures:
        found = Agreement()
        for size in range(len(self.sizes)):
            for raw, target in self._batches(size, number):
                found.add(denoiser(raw.to(self.device)).cpu(), target)
        return found.figures

    def _batches(self, size: int, number: int) -> list[tuple[Tensor, Tensor]]:
        view = whole_view(self.sizes[size], mirrored=False)  # kept views are read by their number alone
        samples = [Sample(image, size, number, view) for image in self.images]
        return [self.pairs.read(samples[at : at + _BATCH]) for at in range(0, len(samples), _BATCH)]


def known_blank_figures(features: BlankProbe, raw: BlankProbe) -> Figures:
    """Of the blank-image test, those that there are: logs have numbers alone."""
    return {name: value for name, value in blank_figures(features, raw).items() if value is not None}


class Agreement:
    """How near features are to targets, over patches that come part by part."""

    def __init__(self) -> None:
        self._cosine = self._squared = self._patches = 0.0

    def add(self, clean: Tensor, target: Tensor) -> None:
        """Takes in features (B, h, w, C) and what they should be."""
        self._cosine += float(F.cosine_similarity(clean, target, dim=-1).double().sum())
        self._squared += float((clean - target).square().mean(-1).double().sum())
        self._patches += target[..., 0].numel()

    @property
    def figures(self) -> Figures:
        """Mean over patches of the cosine, and of the mean squared error."""
        return {"cosine": self._cosine / self._patches, "mse": self._squared / self._patches}


def spread(features: Tensor) -> Figures:
    """Of features (N, h, w, C): their effective rank, and how well they tell the place."""
    figures = {"rank": effective_rank(features)}
    if len(features) >= _PLACED and min(features.shape[1:3]) > 1:
        train = len(features) // 2
        neighbours = min(20, train)
        figures["place"] = linear_position_r2(features, train=train)
        figures["place_neighbours"] = neighbour_position_r2(features, train=train, neighbours=neighbours)
    return figures
