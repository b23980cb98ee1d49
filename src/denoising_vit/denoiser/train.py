"""Stage 2: train one transformer block to map raw features to semantic fields."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.denoiser.held_out import HeldOut
from denoising_vit.denoiser.module import Denoiser, write_denoiser
from denoising_vit.denoiser.options import TrainOptions
from denoising_vit.denoiser.pairs import KeptPairs
from denoising_vit.errors import TrainError
from denoising_vit.progress import prefetched
from denoising_vit.training.blanks import Blanks
from denoising_vit.training.checkpoints import Progress
from denoising_vit.training.engine import from_first
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
from denoising_vit.training.photos import ViewReader
from denoising_vit.training.run_folder import RunFolder
from denoising_vit.training.samples import Sample, Sampler

#: Number of batches to read ahead.
_AHEAD = 4


@dataclass
class Training:
    """A run of stage 2, ready to start; see :meth:`run`.

    Attributes:
        folder: folder of the run.
        denoiser: the trained denoiser.
        backbone: the frozen backbone.
        pairs: kept pairs; or, for new views in every step, photos with their fields.
        blanks: content-free images that complete each batch; None for none.
        sampler: the samples of each step.
        held_out: evaluation on the held-out images.
        ids: ids of the images.
        options: length, learning rate and logging.
        accelerator: processes and devices.
        dtype: dtype of autocast.
    """

    folder: RunFolder
    denoiser: Denoiser
    backbone: Backbone
    pairs: KeptPairs | ViewReader
    blanks: Blanks | None
    sampler: Sampler
    held_out: HeldOut
    ids: tuple[str, ...]
    options: TrainOptions
    accelerator: Any
    dtype: torch.dtype

    def run(
        self,
        on_step: OnFigures = lambda _step, _figures: None,
        on_look: OnFigures = lambda _step, _figures: None,
    ) -> Progress:
        """Train from the last checkpoint, or from the start, to the last step.

        Args:
            on_step: called after each step with the number of steps done and their metrics.
            on_look: called in the same way after each evaluation.

        Returns:
            The final state of the run.

        Raises:
            TrainError: if a loss or gradient is not finite, naming the pairs, or a file cannot be written.
            KeyboardInterrupt: after saving a checkpoint, unless an optimizer step or evaluation was interrupted.
        """
        options, accelerator, device = self.options, self.accelerator, self.accelerator.device
        optimizer = torch.optim.AdamW(self.denoiser.parameters(), weight_decay=options.weight_decay)
        checkpoints = self.folder.checkpoints
        progress = checkpoints.load(self.denoiser, optimizer, step=from_first(accelerator, checkpoints.step))
        model, wrapped_optimizer = accelerator.prepare(self.denoiser, optimizer)
        peak = peak_rate(options.learning_rate, options.views_a_step(accelerator.num_processes))
        batches = prefetched(self._batches(progress.step), _AHEAD)
        consistent = True  # weights, optimizer and progress belong to the same step, whose evaluation is done
        with contextlib.closing(batches), opened_log(self.folder, progress.step, accelerator) as log:
            try:
                while progress.step < options.last_step:
                    started, waited = time.perf_counter(), 0.0
                    rate = learning_rate(progress.step, options.steps, peak, options.final_rate, options.warmup)
                    set_rate(optimizer, rate)
                    totals, seen = torch.zeros(3, device=device), []
                    for number in range(options.accumulate):
                        asked = time.perf_counter()
                        samples, inputs, target = next(batches)
                        waited += time.perf_counter() - asked
                        seen += samples
                        raw, target = self._features(inputs.to(device)), target.to(device)
                        if self.blanks is not None:
                            first = blanks_before(number, options.blanks, accelerator)
                            known = self.blanks.draw(samples[0].size, progress.step, first, options.blanks)
                            raw, target = (
                                torch.cat([some, more.to(device)])
                                for some, more in zip((raw, target), known, strict=True)
                            )
                        with synchronised(model, number == options.accumulate - 1):
                            with torch.autocast(raw.device.type, self.dtype, enabled=self.dtype != torch.float32):
                                clean = model(raw)
                            squared, cosine = denoising_loss(clean, target)
                            loss = squared + (1 - cosine)
                            require_finite(loss, "loss", progress.step, samples, self.ids)
                            accelerator.backward(loss / options.accumulate)
                        totals += torch.stack([loss, squared, cosine]).detach() / options.accumulate
                    norm = gradient_norm(self.denoiser)
                    require_finite(norm, "gradient", progress.step, seen, self.ids)
                    means = accelerator.reduce(totals, "mean").tolist()

                    consistent = False
                    wrapped_optimizer.step()
                    wrapped_optimizer.zero_grad()
                    progress = replace(progress, step=progress.step + 1)
                    evaluating = is_due(progress.step, options.evaluate_every, options.steps)
                    consistent = not evaluating

                    if log is not None:
                        figures = dict(zip(("loss", "mse", "cosine"), means, strict=True))
                        figures |= {"rate": rate, "gradient": norm.item(), "waited": waited}
                        figures["seconds"] = time.perf_counter() - started
                        log.write(progress.step, "train", figures)
                        on_step(progress.step, figures)
                    if evaluating:
                        progress = self._evaluate(progress, log, on_look)
                        consistent = True
                    if is_due(progress.step, options.checkpoint_every, options.last_step):
                        self._save(progress, optimizer)
            except KeyboardInterrupt:
                if consistent:
                    self._save(progress, optimizer)
                raise
        return progress

    def _batches(self, start: int) -> Iterator[tuple[list[Sample], Tensor, Tensor]]:
        """Samples of this process from a step on, with raw features or views, and targets."""
        steps = range(start, self.options.last_step)
        plan = own_batches(self.sampler, steps, self.options.photos, self.accelerator)
        if isinstance(self.pairs, KeptPairs):
            yield from self.pairs.batches(plan)
            return
        for batch in self.pairs.batches(plan):
            assert batch.fields is not None
            yield batch.samples, batch.images, batch.fields

    @torch.no_grad()
    def _features(self, inputs: Tensor) -> Tensor:
        """Raw features (B, h, w, C): kept features, or those of new views."""
        return inputs if isinstance(self.pairs, KeptPairs) else self.backbone(inputs)

    def _evaluate(self, progress: Progress, log: Log | None, on_look: OnFigures) -> Progress:
        """Evaluate on the held-out images, and write the denoiser if it is the best so far or the last."""
        if log is not None:  # the first process
            shrunk_copy = shrunk(self.denoiser, self.options.shrink)
            figures = self.held_out(shrunk_copy)
            if progress.best is None or figures["cosine"] > progress.best:
                progress = replace(progress, best=figures["cosine"], best_step=progress.step)
                self._write(shrunk_copy, self.folder.denoiser, progress.step, figures)
            if progress.step == self.options.steps:
                self._write(shrunk_copy, self.folder.last, progress.step, figures)
            log.write(progress.step, "held_out", figures)
            self.held_out.draw(shrunk_copy, progress.step)
            on_look(progress.step, figures)
        self.accelerator.wait_for_everyone()
        return progress

    def _write(self, denoiser: Denoiser, path: Path, step: int, figures: Figures) -> None:
        denoiser.info |= {"step": step, "held_out": {name: round(value, 6) for name, value in figures.items()}}
        try:
            write_denoiser(denoiser, path)
        except OSError as error:
            raise TrainError(f"{path}: the denoiser could not be written ({error}); continue with --resume") from error

    def _save(self, progress: Progress, optimizer: torch.optim.Optimizer) -> None:
        if self.accelerator.is_main_process:
            self.folder.checkpoints.save(progress, self.denoiser, optimizer)


@torch.no_grad()
def shrunk(denoiser: Denoiser, factor: float) -> Denoiser:
    """A copy in evaluation mode whose blocks' residual branches are scaled.

    Args:
        denoiser: the denoiser.
        factor: factor on the branches; 1 changes nothing, 0 passes raw features plus the position embedding through.
    """
    copied = Denoiser(**denoiser.config).to(denoiser.pos_embed)
    copied.load_state_dict(denoiser.state_dict())
    for parameter in last_layers(copied):
        parameter.mul_(factor)
    return copied.eval()


def last_layers(denoiser: Denoiser) -> Iterator[Tensor]:
    """Parameters of the last layer of each attention and MLP branch; the branch's output is linear in them."""
    for name, parameter in denoiser.named_parameters():
        if "attn.proj" in name or "mlp.fc2" in name:
            yield parameter
