"""Evaluation of a denoiser on held-out images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.denoiser.pairs import KeptPairs
from denoising_vit.denoiser.targets import Targets
from denoising_vit.metrics.blank_test import BLANK_PHOTOS, BlankProbe
from denoising_vit.training.held_out import (
    BATCH,
    SHOWN,
    TargetSimilarity,
    draw_panel,
    error_ratio,
    known_blank_figures,
    spread,
)
from denoising_vit.training.loop import Figures
from denoising_vit.training.samples import Sample, whole_view


@dataclass
class HeldOut:
    """Held-out images; metrics of raw features are computed only once.

    Attributes:
        targets: photos and fields of all images.
        pairs: kept pairs of the held-out images.
        images: indices of the held-out images.
        backbone: the frozen backbone.
        sizes: (H, W) of the run; rank and position are measured at the first size.
        device: device of the denoiser.
        folder: folder of the pictures.
    """

    targets: Targets
    pairs: KeptPairs
    images: Sequence[int]
    backbone: Backbone
    sizes: Sequence[tuple[int, int]]
    device: torch.device
    folder: Path
    _raw: tuple[Figures, BlankProbe] | None = field(default=None, init=False, repr=False)

    def __call__(self, denoiser: Callable[[Tensor], Tensor]) -> Figures:
        """Metrics of a denoiser, of raw features (``raw_``), and of the targets (``target_``).

        ``cosine`` and ``mse`` compare with the targets, as means over whole images at all sizes; ``crop_cosine`` and
        ``crop_mse`` over one crop per image. ``ratio`` is (1 - cosine) relative to raw features. ``rank`` is the
        effective rank, ``place`` and ``place_neighbours`` are the R^2 of a linear and a nearest-neighbour probe of the
        position in the view. Metrics of :func:`~denoising_vit.metrics.blank_test.blank_figures` are relative to raw
        features.
        """
        if self._raw is None:
            self._raw = self._raw_figures()
        figures, (raw, raw_blank) = self._figures(denoiser), self._raw
        blank = raw_blank.through(lambda raw: denoiser(raw.to(self.device)))
        return figures | {"ratio": error_ratio(figures, raw)} | known_blank_figures(blank, raw_blank) | raw

    @torch.no_grad()
    def draw(self, denoiser: Callable[[Tensor], Tensor], step: int) -> None:
        """Draw raw features, clean features and targets of the first held-out images.

        Raises:
            PhotoError: if a photo is missing.
            TrainError: if the picture cannot be written.
        """
        rows = []
        for image in self.images[:SHOWN]:
            ((raw, target),) = self._batches(0, 0, [image])
            clean = denoiser(raw.to(self.device)).cpu()
            rows.append((self.targets.ids[image], self.targets.photo(image), (raw[0], clean[0], target[0])))
        draw_panel(self.folder, step, ("raw", f"denoiser, step {step}", "F (target)"), rows)

    def _raw_figures(self) -> tuple[Figures, BlankProbe]:
        photos = [self.targets.photo(image) for image in self.images[:BLANK_PHOTOS]]
        blank = BlankProbe.of(self.backbone, self.sizes[0], photos).through(self.backbone)
        figures = {f"raw_{name}": value for name, value in self._figures(lambda raw: raw).items()}
        targets = torch.cat([target for _, target in self._batches(0, 0, self.images)])
        return figures | {f"target_{name}": value for name, value in spread(targets).items()}, blank

    @torch.no_grad()
    def _figures(self, denoiser: Callable[[Tensor], Tensor]) -> Figures:
        figures = self._agreement(denoiser, 0)
        if crops := self.pairs.crops:
            figures |= {f"crop_{name}": value for name, value in self._agreement(denoiser, crops[0]).items()}
        clean = [denoiser(raw.to(self.device)).cpu() for raw, _ in self._batches(0, 0, self.images)]
        return figures | spread(torch.cat(clean))

    def _agreement(self, denoiser: Callable[[Tensor], Tensor], number: int) -> Figures:
        found = TargetSimilarity()
        for size in range(len(self.sizes)):
            for raw, target in self._batches(size, number, self.images):
                found.add(denoiser(raw.to(self.device)).cpu(), target)
        return found.figures

    def _batches(self, size: int, number: int, images: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Raw features and targets of the kept view of this number."""
        view = whole_view(self.sizes[size], mirrored=False)  # kept views are read by number
        samples = [Sample(image, size, number, view) for image in images]
        return [self.pairs.read(samples[at : at + BATCH]) for at in range(0, len(samples), BATCH)]
