"""Stage 2, on one page: raw features in, semantic fields as targets, one block in between."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoising_vit.denoiser import Denoiser, write_denoiser
from denoising_vit.denoiser.fresh import Pairs
from denoising_vit.denoiser.judging import Judge
from denoising_vit.denoiser.options import TrainOptions
from denoising_vit.errors import TrainError
from denoising_vit.progress import prefetched
from denoising_vit.training.checkpoints import Progress
from denoising_vit.training.engine import from_first
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

#: Batches that are read before they are needed.
_AHEAD = 4


@dataclass
class Training:
    """A run that is ready to go; :meth:`run` carries it out.

    Attributes:
        folder: where results go.
        denoiser: what is trained.
        pairs: where features and targets come from.
        sampler: which of them a step takes.
        judge: the held-out images.
        ids: names of the images.
        options: how long and how fast.
        accelerator: processes and devices.
        dtype: of the block's arithmetic.
        draw: makes a picture of held-out images, given the denoiser and the step.
    """

    folder: RunFolder
    denoiser: Denoiser
    pairs: Pairs
    sampler: Sampler
    judge: Judge
    ids: tuple[str, ...]
    options: TrainOptions
    accelerator: Any
    dtype: torch.dtype
    draw: Callable[[Denoiser, int], None]

    def run(
        self,
        on_step: OnFigures = lambda _step, _figures: None,
        on_look: OnFigures = lambda _step, _figures: None,
    ) -> Progress:
        """Trains from the last checkpoint, or from the start, to the last step.

        Args:
            on_step: called after each step with how many are done and its figures.
            on_look: called after each look at the held-out images.

        Returns:
            How far the run is.

        Raises:
            TrainError: if a loss is not finite, naming the pairs, or a checkpoint cannot be written.
            KeyboardInterrupt: after a checkpoint, unless a step or a look was under way: then from the one before.
        """
        options, accelerator = self.options, self.accelerator
        optimiser = torch.optim.AdamW(self.denoiser.parameters(), weight_decay=options.weight_decay)
        checkpoints = self.folder.checkpoints
        progress = checkpoints.load(self.denoiser, optimiser, step=from_first(accelerator, checkpoints.step))
        model, prepared = accelerator.prepare(self.denoiser, optimiser)
        peak = peak_rate(options.learning_rate, self.sampler.pairs)
        batches = prefetched(self._batches(progress.step), _AHEAD)

        def gradients(step: int) -> Figures:
            rate = learning_rate(step, options.steps, peak, options.final_rate, options.warmup)
            set_rate(optimiser, rate)
            totals, waited = torch.zeros(3, device=accelerator.device), 0.0
            seen: list[Sample] = []
            for number in range(options.accumulate):
                started = time.perf_counter()
                samples, inputs, target = next(batches)
                waited += time.perf_counter() - started
                seen += samples

                raw = self.pairs.features(inputs.to(accelerator.device))
                with synchronised(model, number == options.accumulate - 1):
                    with torch.autocast(raw.device.type, self.dtype, enabled=self.dtype != torch.float32):
                        clean = model(raw)
                    squared, cosine = denoising_loss(clean, target.to(accelerator.device))
                    loss = squared + (1 - cosine)
                    require_finite(loss, "loss", step, samples, self.ids)
                    accelerator.backward(loss / options.accumulate)
                totals += torch.stack([loss, squared, cosine]).detach() / options.accumulate
            norm = gradient_norm(self.denoiser)
            require_finite(norm, "gradient", step, seen, self.ids)

            means = accelerator.reduce(totals, "mean").tolist()
            figures = dict(zip(("loss", "mse", "cosine"), means, strict=True))
            return figures | {"rate": rate, "gradient": norm.item(), "waited": waited}

        def update() -> None:
            prepared.step()
            prepared.zero_grad()

        steps = Steps(
            folder=self.folder,
            options=options,
            gradients=gradients,
            update=update,
            look=lambda progress, log: self._look(progress, log, on_look),
            save=lambda progress: self._save(progress, optimiser),
            is_main=accelerator.is_main_process,
        )
        with contextlib.closing(batches):
            return steps.run(progress, on_step)

    def _batches(self, start: int) -> Iterator[tuple[list[Sample], Tensor, Tensor]]:
        """Samples of this process in the steps that are left, batch by batch, with what the pairs have of them."""
        for step in range(start, self.options.last_step):
            for samples in own_batches(self.sampler.step(step), self.options.batch_size, self.accelerator):
                yield samples, *self.pairs.read(samples)

    def _look(self, progress: Progress, log: Log | None, on_look: OnFigures) -> Progress:
        """Judges the denoiser by the held-out images, and keeps it where it is the best."""
        if log is not None:  # the first process alone
            written = shrunk(self.denoiser, self.options.shrink)
            figures = self.judge(written)
            if progress.best is None or figures["cosine"] > progress.best:
                progress = replace(progress, best=figures["cosine"], best_step=progress.step)
                self._write(written, self.folder.denoiser, progress.step, figures)
            if progress.step == self.options.steps:
                self._write(written, self.folder.last, progress.step, figures)
            log.write(progress.step, "held_out", figures)
            self.draw(written, progress.step)
            on_look(progress.step, figures)
        self.accelerator.wait_for_everyone()
        return progress

    def _write(self, denoiser: Denoiser, path: Path, step: int, figures: Figures) -> None:
        denoiser.info |= {"step": step, "held_out": {name: round(value, 6) for name, value in figures.items()}}
        try:
            write_denoiser(denoiser, path)
        except OSError as error:
            raise TrainError(f"{path}: the denoiser could not be written ({error}); --resume goes on") from error

    def _save(self, progress: Progress, optimiser: torch.optim.Optimizer) -> None:
        if self.accelerator.is_main_process:
            self.folder.checkpoints.save(progress, self.denoiser, optimiser)


@torch.no_grad()
def shrunk(denoiser: Denoiser, factor: float) -> Denoiser:
    """A copy whose blocks add so many times as much to the features that they pass on, in evaluation mode.

    Args:
        denoiser: any.
        factor: 1 leaves it as it is; with 0 it would pass raw features on, plus the position embedding.
    """
    copied = Denoiser(**denoiser.config).to(denoiser.pos_embed)
    copied.load_state_dict(denoiser.state_dict())
    for parameter in last_layers(copied):
        parameter.mul_(factor)
    return copied.eval()


def last_layers(denoiser: Denoiser) -> Iterator[Tensor]:
    """Parameters of the last layer of each branch of each block, attention and MLP: what is added is linear in them."""
    for name, parameter in denoiser.named_parameters():
        if "attn.proj" in name or "mlp.fc2" in name:
            yield parameter
