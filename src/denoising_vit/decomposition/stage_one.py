"""The exact solver for photos: a single photo, or a stream of photos whose views share batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denoising_vit.artifact import KnownArtifact
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.passes import Passes
from denoising_vit.data import Skipped
from denoising_vit.decomposition.exact import ExactSolver
from denoising_vit.decomposition.inputs import fitting_batch, given_artifact, load_image, prepare, solver_for
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.statistics import HeldOut, Statistics, require_finite
from denoising_vit.errors import DenoisingVitError, PlanError
from denoising_vit.progress import prefetched
from denoising_vit.views.plan import ViewPlan
from denoising_vit.views.rendering import ViewRenderer

#: Number of batches of views to render ahead.
_AHEAD = 3


@dataclass(frozen=True)
class Failed:
    """A photo that failed: its position in the data set, id, and reason; final if another attempt would also fail."""

    index: int
    name: str
    reason: str
    final: bool = True


@dataclass(frozen=True)
class Done:
    """A solved photo: its position in the data set and id; F on its nodes (Ry, Rx, C), float32 on the CPU; its record.

    The record has the photo, held-out metrics and the number of clipped tokens, as JSON values.
    """

    index: int
    name: str
    field: Tensor
    record: dict[str, Any]


@dataclass
class Ready:
    """A photo with the statistics of its views; :meth:`finish` solves it.

    ``about`` has name, size and digest of the photo; ``statistics`` the sums over its fitted views; ``artifact`` is G
    (h, w, C), if known; ``held_out_features`` are those of the held-out views, (h, w, C) each; ``raw`` are those of the
    whole photo (h, w, C), the first of its views.
    """

    index: int
    about: dict[str, Any]
    statistics: Statistics
    solver: ExactSolver
    held_out: ViewPlan | None
    artifact: Tensor | None
    held_out_features: list[Tensor] = field(default_factory=list)
    raw: Tensor | None = None

    def solve_apart(self) -> tuple[Tensor, Tensor]:
        """F without any artifact (Ry, Rx, C), and G from this photo alone (h, w, C); float64.

        Both are linear in the photo, so :meth:`ExactSolver.solve_field` gives F for any other G from them.
        """
        return self.solver.solve_apart(self.statistics.b, self.statistics.g, self.statistics.s)

    def add(self, features: Tensor, *, fitted: bool) -> None:
        """Add the features (B, h, w, C) of the next views, fitted or held out.

        Raises:
            BackboneError: if a value is not finite.
        """
        if fitted:
            if self.raw is None:
                self.raw = features[0].clone()  # a copy, so that the batch can be freed
            self.statistics.add(features)
        else:
            require_finite(features)
            self.held_out_features.append(features.clone())

    def solve(self) -> tuple[Tensor, Tensor]:
        """F on its nodes (Ry, Rx, C) and G (h, w, C), fitted unless it is known; float64."""
        return _solve(self.solver, self.artifact, self.statistics.b, self.statistics.g, self.statistics.s)

    def figures(self, nodes: Tensor, artifact: Tensor) -> dict[str, Any]:
        """Accuracy of F (Ry, Rx, C) and G (h, w, C) on the held-out views, and the number of clipped tokens."""
        found: dict[str, Any] = {"clipped_tokens": self.statistics.clipped_tokens}
        if self.held_out is not None:
            evaluation = HeldOut(nodes, artifact, self.held_out, offsets=self.solver.offsets)
            for features in self.held_out_features:
                evaluation.add_views(features)
            found |= {"heldout_r2": evaluation.r2, "heldout_cosine": evaluation.cosine}
        return found

    def finish(self) -> Done:
        """Solve the photo, and evaluate it on the held-out views."""
        return self._done(*self.solve())

    def _done(self, nodes: Tensor, artifact: Tensor) -> Done:
        record = {"photo": self.about} | self.figures(nodes, artifact)
        return Done(self.index, self.about["name"], nodes.float().cpu(), record)


def finish_together(photos: Sequence[Ready]) -> list[Done]:
    """Solve photos with the same plan as a batch, with as many kernel launches as for one photo."""
    ready = photos[0]
    b, g, s = (torch.cat([getattr(p.statistics, name) for p in photos], dim=-1) for name in ("b", "g", "s"))
    known = None if ready.artifact is None else torch.cat([ready.artifact] * len(photos), dim=-1)
    solved = (part.chunk(len(photos), dim=-1) for part in _solve(ready.solver, known, b, g, s))
    return [photo._done(nodes, artifact) for photo, nodes, artifact in zip(photos, *solved, strict=True)]


def _solve(solver: ExactSolver, known: Tensor | None, b: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """F (Ry, Rx, C) and G (h, w, C); G is fitted unless it is known."""
    if known is None:
        return solver.solve(b, g, s)
    artifact = known.to(b)
    return solver.solve_field(b, artifact, s), artifact


@dataclass
class _Photo:
    """A photo in progress: the remaining views, and the reason if it failed."""

    ready: Ready
    views: list[tuple[bool, ViewRenderer]]  # (fitted or held out, renderer)
    left: int
    reason: str | None = None

    def take(self, fitted: bool, features: Tensor) -> None:
        """Add the features (B, h, w, C) of the next views, fitted or held out."""
        self.left -= len(features)
        if self.reason is not None:
            return
        try:
            self.ready.add(features, fitted=fitted)
        except DenoisingVitError as error:
            self.reason = str(error)


@dataclass(frozen=True)
class _Piece:
    """Views (B, 3, H, W) of a photo for one batch; or a photo that failed before any were rendered."""

    photo: _Photo | Failed
    fitted: bool = True
    images: Tensor | None = None


class StageOne:
    """The exact solver of one backbone and plan, for any number of photos; ``artifact`` is G, if known.

    Raises:
        PlanError: if the method is not exact, or there are too few views.
        ArtifactError: if the artifact belongs to another backbone.
        FormatError: if the artifact's file is missing, damaged or of another type.
        SizeError: if the size does not fit the patch grid.
    """

    def __init__(self, backbone: Backbone, options: DenoiseOptions, artifact: KnownArtifact | None = None) -> None:
        if options.method != "exact":
            raise PlanError(f"expected the exact method for data sets, got {options.method!r}")
        self.backbone = backbone
        self.options = options
        self.artifact = given_artifact(artifact, backbone, options)
        self.fitted, self.held_out = prepare(backbone, options, self.artifact)
        self.solver = solver_for(self.fitted, options, backbone.device)
        self._passes = Passes(backbone)
        self.batch_size = options.batch_size or fitting_batch(backbone.device, math.prod(self.fitted.grid))

    @property
    def on_cpu(self) -> bool:
        """True if forward passes and everything else share the CPU.

        Each parallel section of a forward pass then waits for its slowest core, so running other work at the same time
        is slower than running it afterwards.
        """
        return self.backbone.device.type == "cpu"

    @property
    def views(self) -> int:
        """Number of forward passes per photo."""
        return len(self.fitted) + (0 if self.held_out is None else len(self.held_out))

    def run(self, photos: Iterable[tuple[int, str, np.ndarray | Skipped]]) -> Generator[Ready | Failed, None, None]:
        """Extract the features of all views of photos (index, id, pixels); yields photos in order, ready to solve.

        With an accelerator, a thread renders views ahead of the forward passes.
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
        """Batches of views across photos; all but the last are full."""
        batch: list[_Piece] = []
        room = self.batch_size
        for index, name, pixels in photos:
            photo = self._open(index, name, pixels)
            if isinstance(photo, Failed):
                batch.append(_Piece(photo))
                if len(batch) > self.batch_size:  # consecutive failures must not wait for a full batch
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
