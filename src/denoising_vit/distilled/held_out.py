"""Evaluation of a distilled model on held-out photos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.distilled.models import Lesson, Student, Teacher
from denoising_vit.errors import TrainError
from denoising_vit.metrics.blank_test import BlankProbe
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
from denoising_vit.training.photos import Seen, ViewReader
from denoising_vit.training.samples import Sample, whole_view


@dataclass(frozen=True)
class _Kept:
    """Views of one size and their targets, in float16 on the CPU."""

    images: Tensor
    lesson: Lesson


@dataclass
class HeldOut:
    """Whole held-out photos with the teacher's targets, computed once at the start of a run.

    Attributes:
        images: indices of the readable photos.
        kept: their views in batches, by size.
        ids: ids of all photos.
        shown: pixels (H, W, 3) uint8 of the first photos, for pictures.
        folder: folder of the pictures.
        blank: images of the blank-image test, and the frozen backbone's features of them.
    """

    images: tuple[int, ...]
    kept: tuple[tuple[_Kept, ...], ...]
    ids: Sequence[str]
    shown: tuple[np.ndarray, ...]
    folder: Path
    blank: tuple[BlankProbe, BlankProbe]
    _raw_figures: Figures | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, images: Sequence[int], reader: ViewReader, teacher: Teacher) -> HeldOut:
        """Read photos and compute their targets.

        Raises:
            TrainError: if no photo can be read.
        """
        usable: list[int] = []
        kept = []
        for size in range(len(reader.sizes)):
            view = whole_view(reader.sizes[size], mirrored=False)
            samples = [Sample(image, size, None, view) for image in (usable or images)]
            parts, readable = [], []
            for batch in reader.batches(samples[at : at + BATCH] for at in range(0, len(samples), BATCH)):
                readable += [sample.image for sample, good in zip(batch.samples, batch.usable, strict=True) if good]
                lesson = teacher(batch)
                parts.append(_Kept(_half(batch.images[batch.usable]), _chosen(lesson, batch.usable)))
            usable = readable
            kept.append(tuple(part for part in parts if len(part.images)))
        if not usable:
            name, reason = next(iter(reader.skipped.items()))
            raise TrainError(f"none of the {len(images)} held-out photos can be read; first reason: {name}: {reason}")
        shown = tuple(_pixels(one.image) for one in reader.stream(usable[:SHOWN]) if isinstance(one, Seen))
        blank = BlankProbe.of(teacher.backbone, reader.sizes[0], shown)
        raw = blank.through(teacher.backbone)
        return cls(tuple(usable), tuple(kept), reader.photos.ids, shown, reader.folder / "panels", (blank, raw))

    def __call__(self, student: Student) -> Figures:
        """Metrics of a student, of the frozen backbone (``raw_``), and of the targets (``target_``).

        ``cosine`` and ``mse`` compare features of the student's own layer with the targets, as means over whole photos
        at all sizes; ``ratio`` is (1 - cosine) relative to raw features; ``layer_N_cosine`` is for further layers.
        ``class_drift`` and ``prefix_drift`` are 1 - cosine between class tokens, or all prefix tokens, and those of the
        frozen backbone. ``rank``, ``place`` and the blank-image metrics are as in stage 2.
        """
        if self._raw_figures is None:
            self._raw_figures = self._raw()
        found, raw = self._agreement(student), self._raw_figures
        found["ratio"] = error_ratio(found, raw)
        blank = self.blank[0].through(lambda images: student(images.to(student.backbone.device))[0][0])
        return found | known_blank_figures(blank, self.blank[1]) | raw

    def pairs(self, student: Student) -> Iterator[tuple[Tensor, Tensor]]:
        """The student's features and raw features (B, h, w, C) of the photos, at all sizes."""
        for size in range(len(self.kept)):
            for clean, _, part in self._answers(student, size):
                yield clean[0], part.lesson.raw[0].float()

    @torch.no_grad()
    def draw(self, student: Student, step: int) -> None:
        """Draw raw features, the student's features and the targets of the first photos.

        Raises:
            TrainError: if it cannot be written.
        """
        rows = []
        for clean, _, part in self._answers(student, 0):
            for place, features in enumerate(clean[0]):
                if len(rows) < len(self.shown):
                    maps = part.lesson.raw[0][place].float(), features, part.lesson.features[0][place].float()
                    rows.append((self.ids[self.images[len(rows)]], self.shown[len(rows)], maps))
            if len(rows) == len(self.shown):
                break
        draw_panel(self.folder, step, ("raw", f"distilled, step {step}", "teacher"), rows)

    def _agreement(self, student: Student) -> Figures:
        layers = [TargetSimilarity() for _ in (0, *student.layers)]
        classes, prefixes, whole = [], [], []
        for size in range(len(self.kept)):
            for clean, prefix, part in self._answers(student, size):
                for found, features, target in zip(layers, clean, part.lesson.features, strict=True):
                    found.add(features, target.float())
                kept = F.cosine_similarity(prefix[0], part.lesson.prefixes[0].float(), dim=-1)  # (B, P)
                prefixes.append(kept.flatten())
                classes.append(kept[:, :1].flatten())
                if not size:
                    whole.append(clean[0])
        figures = layers[0].figures | spread(torch.cat(whole))
        for number, found in zip(student.layers, layers[1:], strict=True):
            figures[f"layer_{number}_cosine"] = found.figures["cosine"]
        if len(torch.cat(prefixes)):
            figures["class_drift"] = 1 - torch.cat(classes).double().mean().item()
            figures["prefix_drift"] = 1 - torch.cat(prefixes).double().mean().item()
        return figures

    def _raw(self) -> Figures:
        """Metrics of the frozen backbone's features, and of the targets."""
        found = TargetSimilarity()
        for parts in self.kept:
            for part in parts:
                found.add(part.lesson.raw[0].float(), part.lesson.features[0].float())
        figures = {f"raw_{name}": value for name, value in found.figures.items()}
        for prefix, kind in (("raw", "raw"), ("target", "features")):
            whole = torch.cat([getattr(part.lesson, kind)[0].float() for part in self.kept[0]])
            figures |= {f"{prefix}_{name}": value for name, value in spread(whole).items()}
        return figures

    @torch.no_grad()
    def _answers(self, student: Student, size: int) -> Iterator[tuple[list[Tensor], list[Tensor], _Kept]]:
        """The student's features and prefix tokens of each batch, on the CPU."""
        device = student.backbone.device
        for part in self.kept[size]:
            features, prefixes = student(part.images.to(device).float())
            yield [one.cpu() for one in features], [one.cpu() for one in prefixes], part


def _chosen(lesson: Lesson, usable: Tensor) -> Lesson:
    return Lesson(*(tuple(_half(one[usable]) for one in part) for part in lesson))


def _pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] as (H, W, 3) uint8."""
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def _half(values: Tensor) -> Tensor:
    """Float16 on the CPU, or float32 if values exceed its range."""
    half = values.half()
    return half.cpu() if bool(torch.isfinite(half).all()) or not len(half) else values.float().cpu()
