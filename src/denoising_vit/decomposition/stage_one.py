"""Stage 1 for a stream of photos: their views share batches, which fill the device whatever the number of views."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from denoising_vit.artifact import KnownArtifact
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.batching import Passes
from denoising_vit.data import Skipped
from denoising_vit.decomposition.extraction import fitting_batch, load_image
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.preparing import given_artifact, prepare, solver_for
from denoising_vit.decomposition.ready import Failed, Ready
from denoising_vit.decomposition.statistics import Statistics, require_finite
from denoising_vit.errors import DenoisingVitError, PlanError
from denoising_vit.progress import prefetched
from denoising_vit.views.rendering import ViewRenderer

#: Batches of views that are rendered before they are needed.
_AHEAD = 3


@dataclass
class _Photo:
    """A photo on its way: what is still to come of it, and why it failed if it did."""

    ready: Ready
    views: list[tuple[bool, ViewRenderer]]  # whether they are fitted, and what renders them
    left: int
    reason: str | None = None

    def take(self, fitted: bool, features: Tensor) -> None:
        """Takes the features (B, h, w, C) of the next views, fitted or held out."""
        self.left -= len(features)
        if self.reason is not None:
            return
        try:
            if fitted:
                if self.ready.raw is None:
                    self.ready.raw = features[0].clone()  # the batch that it is a part of need not stay
                self.ready.statistics.add(features)
            else:
                require_finite(features)
                self.ready.judged.append(features.clone())
        except DenoisingVitError as error:
            self.reason = str(error)


@dataclass(frozen=True)
class _Piece:
    """Some views (B, 3, H, W) of a photo; or a photo that failed before it had any."""

    photo: _Photo | Failed
    fitted: bool = True
    images: Tensor | None = None


class StageOne:
    """The exact solver of one backbone and plan, for any number of photos.

    Args:
        backbone: the extractor.
        options: of stage 1; the method must be exact.
        artifact: G where it is known, as `denoise_image` takes it.

    Raises:
        PlanError: if the method is another, or the views do not suffice.
        ArtifactError: if the artifact is that of another backbone.
        FormatError: if its file is missing, damaged or something else.
        SizeError: if the size does not fit the patch grid.
    """

    def __init__(self, backbone: Backbone, options: DenoiseOptions, artifact: KnownArtifact | None = None) -> None:
        if options.method != "exact":
            raise PlanError(f"whole data sets are fitted by the exact method, got {options.method!r}")
        self.backbone = backbone
        self.options = options
        self.artifact = given_artifact(artifact, backbone, options)
        self.fitted, self.held_out = prepare(backbone, options, self.artifact)
        self.solver = solver_for(self.fitted, options, backbone.device)
        self._passes = Passes(backbone)
        self.batch_size = options.batch_size or fitting_batch(backbone.device, math.prod(self.fitted.grid))

    @property
    def on_cpu(self) -> bool:
        """Whether everything shares the processor's cores.

        Each parallel part of the forward pass then waits for its slowest core, so that whatever else computes at the
        same time costs more than it takes: one after the other is faster than side by side.
        """
        return self.backbone.device.type == "cpu"

    @property
    def views(self) -> int:
        """Forward passes that a photo takes."""
        return len(self.fitted) + (0 if self.held_out is None else len(self.held_out))

    def run(self, photos: Iterable[tuple[int, str, np.ndarray | Skipped]]) -> Generator[Ready | Failed, None, None]:
        """Sees all views of photos (index, id, pixels) and gives them back in their order, to be solved.

        Where an accelerator does the forward passes, views are rendered in a thread of their own, ahead of them.
        """
        batches = self._batches(photos)
        with contextlib.closing(batches if self.on_cpu else prefetched(batches, _AHEAD)) as batches:
            for batch in batches:
                yield from self._take(batch)

    def _forward(self, images: list[Tensor]) -> Iterator[Tensor]:
        """Features (B, h, w, C) of each part (B, 3, H, W), from one forward pass."""
        return iter(self._passes(torch.cat(images)).split([len(part) for part in images]) if images else ())

    def _take(self, batch: list[_Piece]) -> Iterator[Ready | Failed]:
        features = self._forward([piece.images for piece in batch if piece.images is not None])
        for piece in batch:
            if isinstance(piece.photo, Failed):
                yield piece.photo
                continue
            piece.photo.take(piece.fitted, next(features))
            if piece.photo.left == 0:
                reason = piece.photo.reason
                ready = piece.photo.ready
                yield ready if reason is None else Failed(ready.index, ready.about["name"], reason)

    def _batches(self, photos: Iterable[tuple[int, str, np.ndarray | Skipped]]) -> Generator[list[_Piece], None, None]:
        """Pieces of photos, so that every batch but the last has as many views as the device takes at once."""
        batch: list[_Piece] = []
        room = self.batch_size
        for index, name, pixels in photos:
            photo = self._open(index, name, pixels)
            if isinstance(photo, Failed):
                batch.append(_Piece(photo))
                if len(batch) > self.batch_size:  # many in a row are not to wait for views that fill a batch
                    yield batch
                    batch, room = [], self.batch_size
                continue
            for fitted, render in photo.views:
                start, total = 0, len(render.plan)
                while start < total:
                    count = min(room, total - start)
                    batch.append(_Piece(photo, fitted, render(slice(start, start + count))))
                    start, room = start + count, room - count
                    if not room:
                        yield batch
                        batch, room = [], self.batch_size
        if batch:
            yield batch

    def _open(self, index: int, name: str, pixels: np.ndarray | Skipped) -> _Photo | Failed:
        if isinstance(pixels, Skipped):
            return Failed(index, name, pixels.reason, final=not pixels.unreachable)
        try:
            image, about = load_image(pixels, self.backbone)
        except DenoisingVitError as error:
            return Failed(index, name, str(error))
        ready = Ready(
            index,
            about | {"name": name},
            Statistics(self.fitted, self.backbone.embed_dim, device=self.backbone.device, clip=self.options.clip),
            self.solver,
            self.held_out,
            self.artifact,
        )
        plans = [(True, self.fitted)] + ([] if self.held_out is None else [(False, self.held_out)])
        views = [(fitted, ViewRenderer(image, plan, self.backbone.mean, self.backbone.std)) for fitted, plan in plans]
        return _Photo(ready, views, self.views)
