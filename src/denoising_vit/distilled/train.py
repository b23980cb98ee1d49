"""Stage 3, on one page: views in, clean features of a frozen teacher as targets, the whole ViT in between."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.distilled.files import write_distilled
from denoising_vit.distilled.judging import HeldOut
from denoising_vit.distilled.options import DistillOptions
from denoising_vit.distilled.photos import ViewReader
from denoising_vit.distilled.student import Average, Student, blocks_of, trained_groups
from denoising_vit.distilled.teacher import Lesson, Teacher
from denoising_vit.errors import TrainError
from denoising_vit.progress import prefetched
from denoising_vit.training.checkpoints import Progress
from denoising_vit.training.engine import from_first, gathered, shard
from denoising_vit.training.loop import (
    Figures,
    Log,
    OnFigures,
    Steps,
    denoising_loss,
    gradient_norm,
    learning_rate,
    own_batches,
    peak_rate,
    require_finite,
    set_rate,
    synchronised,
)
from denoising_vit.training.run_folder import RunFolder
from denoising_vit.training.samples import Sample, Sampler

#: Batches that are read and rendered before they are needed.
_AHEAD = 3

#: A student that is so many times as far from its teacher as raw features, and by so much in cosine, learns nothing any
#: more once the rate has risen.
_DIVERGED, _BY = 2.0, 0.1

#: Figures of a step that are means over processes.
_MEANS = ("loss", "mse", "cosine", "held")


@dataclass
class Distillation:
    """A run that is ready to go; :meth:`run` carries it out.

    Attributes:
        folder: where results go.
        student: what is trained, float32.
        teacher: frozen.
        reader: of photos.
        sampler: which views a step takes.
        judge: the held-out photos.
        judged: a student in the precision that users run; it gets the weights that are judged.
        record: what is written with the weights; JSON values.
        options: how long and how fast.
        accelerator: processes and devices.
        dtype: of the student's arithmetic.
    """

    folder: RunFolder
    student: Student
    teacher: Teacher
    reader: ViewReader
    sampler: Sampler
    judge: HeldOut
    judged: Student
    record: dict[str, Any]
    options: DistillOptions
    accelerator: Any
    dtype: torch.dtype

    def run(
        self,
        on_step: OnFigures = lambda _step, _figures: None,
        on_look: OnFigures = lambda _step, _figures: None,
    ) -> Progress:
        """Trains from the last checkpoint, or from the start, to the last step.

        After an exception the job is to be prepared again: its student may have taken steps that no checkpoint has.

        Args:
            on_step: called after each step with how many are done and its figures.
            on_look: called after each look at the held-out photos.

        Returns:
            How far the run is.

        Raises:
            TrainError: if a loss is not finite or the run diverges, or a photo is gone, or a file cannot be written.
            KeyboardInterrupt: after a checkpoint, unless weights were just changed, or are shared out: then from the
                one before.
        """
        options, accelerator = self.options, self.accelerator
        sharing = options.shard and accelerator.num_processes > 1
        if sharing:
            shard(self.student, blocks_of(self.student), accelerator)
        groups = trained_groups(self.student, options.weight_decay, options.layer_decay)
        optimiser = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
        average = Average(self.student, options.ema) if options.ema else None
        more = {} if average is None else average.values
        checkpoints = self.folder.checkpoints
        progress = checkpoints.load(self.student, optimiser, more, step=from_first(accelerator, checkpoints.step))
        # Of the class token's gradients, which are a few hundred numbers.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        model = self.student if sharing else accelerator.prepare(self.student)
        peak = peak_rate(options.learning_rate, self.sampler.pairs)
        batches = prefetched(self.reader.batches(self._plan(progress.step)), _AHEAD)

        def gradients(step: int) -> Figures:
            rate = learning_rate(step, options.steps, peak, options.final_rate, options.warmup)
            set_rate(optimiser, rate)
            totals, waited = torch.zeros(len(_MEANS), device=accelerator.device), 0.0
            samples: list[Sample] = []
            for number in range(options.accumulate):
                started = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - started
                samples += batch.samples

                lesson = self.teacher(batch)
                with synchronised(model, number == options.accumulate - 1, sharing):
                    with torch.autocast(accelerator.device.type, self.dtype, enabled=self.dtype != torch.float32):
                        answer = model(batch.images)
                    loss, parts = self._loss(answer, lesson, batch.usable)
                    require_finite(loss, "loss", step, batch.samples, self.reader.photos.ids)
                    (loss / options.accumulate).backward()
                totals += torch.stack([loss.detach(), *parts]) / options.accumulate
            norm = gathered(gradient_norm(self.student))
            require_finite(norm, "gradient", step, samples, self.reader.photos.ids)
            means = accelerator.reduce(totals, "mean").tolist()
            figures = dict(zip(_MEANS, means, strict=True))
            return figures | {"rate": rate, "gradient": norm.item(), "waited": waited}

        def update() -> None:
            optimiser.step()
            optimiser.zero_grad()
            if average is not None:
                average.update(self.student)

        steps = Steps(
            folder=self.folder,
            options=options,
            gradients=gradients,
            update=update,
            look=lambda progress, log: self._look(progress, log, on_look, average),
            save=lambda progress: self.folder.checkpoints.save(
                progress, self.student, optimiser, more, write=accelerator.is_main_process
            ),
            is_main=accelerator.is_main_process,
            alone_saves=not sharing,
        )
        with contextlib.closing(batches):
            return steps.run(progress, on_step)

    def _plan(self, start: int) -> Iterator[list[Sample]]:
        """Samples of this process, batch by batch."""
        for step in range(start, self.options.last_step):
            yield from own_batches(self.sampler.step(step), self.options.batch_size, self.accelerator)

    def _loss(
        self, answer: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], lesson: Lesson, usable: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The published loss, mean over layers, and that which holds the prefix tokens; and its parts."""
        (features, prefixes), some = answer, not bool(usable.all())
        if not bool(usable.any()):  # of a batch without any photo: nothing, but gradients that others wait for
            nothing = sum(one.sum() for one in (*features, *prefixes)) * 0.0
            assert isinstance(nothing, Tensor)
            return nothing, [nothing.detach()] * (len(_MEANS) - 1)
        pick = (lambda one: one[usable]) if some else (lambda one: one)
        taught = [
            denoising_loss(pick(one), pick(target)) for one, target in zip(features, lesson.features, strict=True)
        ]
        squared, cosine = (torch.stack(parts).mean() for parts in zip(*taught, strict=True))
        loss, held = squared + (1 - cosine), squared.detach() * 0
        if self.options.hold_prefix and prefixes[0].shape[1]:
            kept = [_held(pick(one), pick(target)) for one, target in zip(prefixes, lesson.prefixes, strict=True)]
            held = torch.stack(kept).mean()
            loss = loss + self.options.hold_prefix * held
        return loss, [squared.detach(), cosine.detach(), held.detach()]

    def _look(self, progress: Progress, log: Log | None, on_look: OnFigures, average: Average | None) -> Progress:
        """Judges the student by the held-out photos, and keeps it where it is the best."""
        state, diverged = self._weights(average), False
        if log is not None:  # the first process alone
            self.judged.load_state_dict(state)
            figures = self.judge(self.judged)
            log.write(progress.step, "held_out", figures)
            on_look(progress.step, figures)
            diverged = self._has_diverged(progress.step, figures)
            if not diverged:
                progress = self._keep(progress, state, figures)
                self.judge.draw(self.judged, progress.step)
        self.accelerator.wait_for_everyone()
        told = torch.tensor(float(diverged), device=self.accelerator.device)
        if self.accelerator.reduce(told, "sum").item():
            best = self.folder.distilled  # asked of the disk: other processes than the first know of no model
            kept = f"the best model is kept ({best})" if best.is_file() else "no model was kept"
            raise TrainError(
                f"step {progress.step}: the run diverged, held-out features are more than {_DIVERGED:g} times as far "
                f"from the teacher's as raw ones; {kept}. Lower --learning-rate, or raise --warmup"
            )
        return progress

    def _has_diverged(self, step: int, figures: Figures) -> bool:
        """Whether nothing is to be hoped of the run; the rate has to be risen before its figures tell."""
        lost = figures["raw_cosine"] - figures["cosine"]
        if not math.isfinite(lost):
            return True
        return step > self.options.warmup * self.options.steps and figures["ratio"] > _DIVERGED and lost > _BY

    def _keep(self, progress: Progress, state: dict[str, Tensor], figures: Figures) -> Progress:
        """Writes the weights where they are the best so far, or the last."""
        paths = []
        if progress.best is None or figures["cosine"] > progress.best:
            progress = replace(progress, best=figures["cosine"], best_step=progress.step)
            paths.append(self.folder.distilled)
        if progress.step == self.options.steps:
            paths.append(self.folder.last)
        told = self.record | {"step": progress.step, "held_out": {name: round(v, 6) for name, v in figures.items()}}
        for path in paths:
            write_distilled({_plain(name): value for name, value in state.items()}, path, told)
        return progress

    def _weights(self, average: Average | None) -> dict[str, Tensor]:
        """Whole weights of the student, or of the moving average, on the CPU; all processes must ask."""
        state: dict[str, Tensor] = self.student.state_dict()
        state |= {} if average is None else average.values
        return {name: gathered(value.detach()).cpu() for name, value in state.items()}


def _held(prefix: Tensor, frozen: Tensor) -> Tensor:
    """The same loss for prefix tokens (B, P, C)."""
    return F.mse_loss(prefix, frozen) + 1 - F.cosine_similarity(prefix, frozen, dim=-1).mean()


def _plain(name: str) -> str:
    """As the model calls it by itself."""
    return name.removeprefix("backbone.").removeprefix("model.")
