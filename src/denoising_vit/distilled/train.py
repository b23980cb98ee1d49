"""Stage 3: fine-tune the whole ViT to the clean features of a frozen teacher."""

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

from denoising_vit.distilled.contrast import final_norm, restored
from denoising_vit.distilled.held_out import HeldOut
from denoising_vit.distilled.models import (
    Average,
    Lesson,
    Student,
    Teacher,
    blank_lesson,
    blocks_of,
    trained_groups,
)
from denoising_vit.distilled.options import DistillOptions
from denoising_vit.distilled.weights import write_distilled
from denoising_vit.errors import PlanError, TrainError
from denoising_vit.progress import prefetched
from denoising_vit.training.blanks import blank_images, blank_loss
from denoising_vit.training.checkpoints import Progress
from denoising_vit.training.engine import from_first, gathered, shard
from denoising_vit.training.loop import (
    Figures,
    Log,
    OnFigures,
    blanks_before,
    denoising_loss,
    gradient_norm,
    is_due,
    learning_rate,
    opened_log,
    own_batches,
    peak_rate,
    require_finite,
    set_rate,
    synchronised,
)
from denoising_vit.training.photos import Batch, ViewReader
from denoising_vit.training.run_folder import RunFolder
from denoising_vit.training.samples import Sampler, blank_numbers

#: Number of batches to read and render ahead.
_AHEAD = 3

#: After the warm-up, a run has diverged if the student's 1 - cosine is this factor times that of raw features, and its
#: cosine is lower by this difference.
_DIVERGED, _BY = 2.0, 0.1

#: Metrics of a step to average over processes.
_MEANS = ("loss", "mse", "cosine", "held", "blank")


@dataclass
class Distillation:
    """A run of stage 3, ready to start; see :meth:`run`.

    Attributes:
        folder: folder of the run.
        student: the trained model, float32.
        teacher: the frozen teacher.
        reader: reads and renders photos.
        sampler: the samples of each step.
        held_out: evaluation on the held-out photos.
        evaluated: a student in inference precision, which receives the weights to evaluate.
        record: record written with the weights; JSON values.
        options: length, learning rate and logging.
        accelerator: processes and devices.
        dtype: dtype of autocast.
    """

    folder: RunFolder
    student: Student
    teacher: Teacher
    reader: ViewReader
    sampler: Sampler
    held_out: HeldOut
    evaluated: Student
    record: dict[str, Any]
    options: DistillOptions
    accelerator: Any
    dtype: torch.dtype

    def run(
        self,
        on_step: OnFigures = lambda _step, _figures: None,
        on_look: OnFigures = lambda _step, _figures: None,
    ) -> Progress:
        """Train from the last checkpoint, or from the start, to the last step.

        After an exception, prepare the job again, because its student may be ahead of the last checkpoint.

        Args:
            on_step: called after each step with the number of steps done and their metrics.
            on_look: called in the same way after each evaluation.

        Returns:
            The final state of the run.

        Raises:
            TrainError: if a loss or gradient is not finite, the run diverges, a photo is missing, or a file cannot be
                written.
            KeyboardInterrupt: after saving a checkpoint, unless an optimizer step or evaluation was interrupted or the
                weights are sharded.
        """
        options, accelerator, device = self.options, self.accelerator, self.accelerator.device
        ids = self.reader.photos.ids
        sharding = options.shard and accelerator.num_processes > 1
        if sharding:
            shard(self.student, blocks_of(self.student), accelerator)
        groups = trained_groups(self.student, options.weight_decay, options.layer_decay)
        optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
        average = Average(self.student, options.ema) if options.ema else None
        more = {} if average is None else average.values
        checkpoints, is_main = self.folder.checkpoints, accelerator.is_main_process
        progress = checkpoints.load(self.student, optimizer, more, step=from_first(accelerator, checkpoints.step))
        # The warning is about the gradients of the class token, only a few hundred numbers.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        model = self.student if sharding else accelerator.prepare(self.student)
        peak = peak_rate(options.learning_rate, options.views_a_step(accelerator.num_processes))
        batches = prefetched(self._batches(progress.step), _AHEAD)
        consistent = True  # weights, optimizer and progress belong to the same step, whose evaluation is done
        with contextlib.closing(batches), opened_log(self.folder, progress.step, accelerator) as log:
            try:
                while progress.step < options.last_step:
                    started, waited = time.perf_counter(), 0.0
                    rate = learning_rate(progress.step, options.steps, peak, options.final_rate, options.warmup)
                    set_rate(optimizer, rate)
                    totals, seen = torch.zeros(len(_MEANS), device=device), []
                    for number in range(options.accumulate):
                        asked = time.perf_counter()
                        batch = next(batches)
                        waited += time.perf_counter() - asked
                        seen += batch.samples
                        first = blanks_before(number, options.blanks, accelerator)
                        images, usable, lesson = self._lesson(batch, progress.step, first)
                        with synchronised(model, number == options.accumulate - 1, sharding):
                            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                                answer = model(images)
                            loss, parts = self._loss(answer, lesson, usable)
                            require_finite(loss, "loss", progress.step, batch.samples, ids)
                            (loss / options.accumulate).backward()
                        totals += torch.stack([loss.detach(), *parts]) / options.accumulate
                    norm = gathered(gradient_norm(self.student))
                    require_finite(norm, "gradient", progress.step, seen, ids)
                    means = accelerator.reduce(totals, "mean").tolist()

                    consistent = False
                    optimizer.step()
                    optimizer.zero_grad()
                    if average is not None:
                        average.update(self.student)
                    progress = replace(progress, step=progress.step + 1)
                    evaluating = is_due(progress.step, options.evaluate_every, options.steps)
                    consistent = not evaluating

                    if log is not None:
                        figures = dict(zip(_MEANS, means, strict=True))
                        figures |= {"rate": rate, "gradient": norm.item(), "waited": waited}
                        figures["seconds"] = time.perf_counter() - started
                        log.write(progress.step, "train", figures)
                        on_step(progress.step, figures)
                    if evaluating:
                        progress = self._evaluate(progress, log, on_look, average)
                        consistent = True
                    if is_due(progress.step, options.checkpoint_every, options.last_step):
                        checkpoints.save(progress, self.student, optimizer, more, write=is_main)
            except KeyboardInterrupt:
                if consistent and not sharding:
                    checkpoints.save(progress, self.student, optimizer, more, write=is_main)
                raise
        return progress

    def _batches(self, start: int) -> Iterator[Batch]:
        """Batches of this process from a step on."""
        steps = range(start, self.options.last_step)
        return self.reader.batches(own_batches(self.sampler, steps, self.options.photos, self.accelerator))

    def _lesson(self, batch: Batch, step: int, first: int) -> tuple[Tensor, Tensor, Lesson]:
        """Images of a batch including content-free ones, a mask of usable images, and the targets.

        Args:
            batch: photos.
            step: number of the step.
            first: number of this step's content-free images in earlier batches and processes.
        """
        lesson, count = self.teacher(batch), self.options.blanks
        if not count:
            return batch.images, batch.usable, lesson
        size = self.reader.sizes[batch.samples[0].size]
        seeds = blank_numbers(self.options.seed, step, first, count, 2**31)
        blank = torch.cat([blank_images(self.teacher.backbone, size, 1, seed) for seed in seeds]).to(batch.images)
        known = blank_lesson(self.teacher, blank)
        both = (tuple(map(torch.cat, zip(one, other, strict=True))) for one, other in zip(lesson, known, strict=True))
        usable = torch.cat([batch.usable, torch.ones(count, dtype=torch.bool, device=batch.usable.device)])
        return torch.cat([batch.images, blank]), usable, Lesson(*both)

    def _loss(
        self, answer: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], lesson: Lesson, usable: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The published loss, plus those on content-free images and on prefix tokens; and its terms.

        Each is averaged over layers.
        """
        (features, prefixes), some = answer, not bool(usable.all())
        if not bool(usable.any()):  # zero gradients, because other processes wait for them
            nothing = sum(one.sum() for one in (*features, *prefixes)) * 0.0
            assert isinstance(nothing, Tensor)
            return nothing, [nothing.detach()] * (len(_MEANS) - 1)
        pick = (lambda one: one[usable]) if some else (lambda one: one)
        taught = [
            denoising_loss(pick(one), pick(target)) for one, target in zip(features, lesson.features, strict=True)
        ]
        squared, cosine = (torch.stack(parts).mean() for parts in zip(*taught, strict=True))
        loss, held, blank = squared + (1 - cosine), squared.detach() * 0, squared.detach() * 0
        if count := self.options.blanks:
            pairs = zip(features, lesson.raw, strict=True)
            blank = torch.stack([blank_loss(one[-count:], raw[-count:]) for one, raw in pairs]).mean()
            loss = loss + blank
        if self.options.hold_prefix and prefixes[0].shape[1]:
            kept = [_held(pick(one), pick(target)) for one, target in zip(prefixes, lesson.prefixes, strict=True)]
            held = torch.stack(kept).mean()
            loss = loss + self.options.hold_prefix * held
        return loss, [squared.detach(), cosine.detach(), held.detach(), blank.detach()]

    def _evaluate(self, progress: Progress, log: Log | None, on_look: OnFigures, average: Average | None) -> Progress:
        """Evaluate on the held-out photos, and write the weights if they are the best so far or the last."""
        state, diverged = self._weights(average), False
        if log is not None:  # the first process
            self.evaluated.load_state_dict(state)
            figures = self.held_out(self.evaluated)
            log.write(progress.step, "held_out", figures)
            on_look(progress.step, figures)
            diverged = self._has_diverged(progress.step, figures)
            if not diverged:
                progress = self._keep(progress, state, figures)
                self.held_out.draw(self.evaluated, progress.step)
        self.accelerator.wait_for_everyone()
        flag = torch.tensor(float(diverged), device=self.accelerator.device)
        if self.accelerator.reduce(flag, "sum").item():
            best = self.folder.distilled  # checked on disk, because only the first process knows it
            kept = f"the best model is kept ({best})" if best.is_file() else "no model was kept"
            raise TrainError(
                f"step {progress.step}: the run diverged: 1 - cosine of held-out features to the teacher is more than "
                f"{_DIVERGED:g} times that of raw features; {kept}. Lower --learning-rate, or raise --warmup"
            )
        return progress

    def _has_diverged(self, step: int, figures: Figures) -> bool:
        """True if the run has diverged; before the end of the warm-up, only if values are not finite."""
        lost = figures["raw_cosine"] - figures["cosine"]
        if not math.isfinite(lost):
            return True
        return step > self.options.warmup * self.options.steps and figures["ratio"] > _DIVERGED and lost > _BY

    def _keep(self, progress: Progress, state: dict[str, Tensor], figures: Figures) -> Progress:
        """Write the weights if they are the best so far or the last."""
        paths, score = [], figures["cosine"]
        if self.options.blanks:  # by the loss, because the cosine is that of photos only
            score = score - 1 - figures["mse"] - figures.get("blank_variance", 0.0)
        if progress.best is None or score > progress.best:
            progress = replace(progress, best=score, best_step=progress.step)
            paths.append(self.folder.distilled)
        if progress.step == self.options.steps:
            paths.append(self.folder.last)
        record = self.record | {"step": progress.step, "held_out": {name: round(v, 6) for name, v in figures.items()}}
        state = {_plain(name): value for name, value in state.items()}
        if paths and self.options.contrast:
            norm, pairs = final_norm(self.evaluated.backbone), self.held_out.pairs(self.evaluated)
            try:
                state, change = restored(state, norm, pairs, len(self.held_out.images))
            except PlanError as error:
                raise TrainError(f"step {progress.step}: --contrast: {error}") from error
            record |= change
        for path in paths:
            write_distilled(state, path, record)
        return progress

    def _weights(self, average: Average | None) -> dict[str, Tensor]:
        """Unsharded weights of the student, or of their average, on the CPU; all processes must call this."""
        state: dict[str, Tensor] = self.student.state_dict()
        state |= {} if average is None else average.values
        return {name: gathered(value.detach()).cpu() for name, value in state.items()}


def _held(prefix: Tensor, frozen: Tensor) -> Tensor:
    """The published loss, for prefix tokens (B, P, C)."""
    return F.mse_loss(prefix, frozen) + 1 - F.cosine_similarity(prefix, frozen, dim=-1).mean()


def _plain(name: str) -> str:
    """Name of a weight in the unwrapped model."""
    return name.removeprefix("backbone.").removeprefix("model.")
