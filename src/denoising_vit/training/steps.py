"""The steps of a run, and what is done around them: log, looks at held-out images, checkpoints, an end without loss."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from denoising_vit.denoiser.judging import Figures
from denoising_vit.denoiser.samples import Sample
from denoising_vit.errors import TrainError
from denoising_vit.training.checkpoints import Progress
from denoising_vit.training.logs import Log
from denoising_vit.training.options import RunOptions
from denoising_vit.training.run_folder import RunFolder

#: Called with how many steps are done and their figures.
OnFigures = Callable[[int, Figures], None]


@dataclass(frozen=True)
class Steps:
    """What one stage does in a step, and when it looks and saves.

    Attributes:
        folder: of the run.
        options: how long, and how often it is looked and saved.
        gradients: takes gradients of a step, which is counted from 0; gives its figures. Weights stay.
        update: takes the optimiser's step.
        look: judges the held-out images, and keeps the best; the log is None but in the first process.
        save: writes a checkpoint.
        is_main: whether this is the first process.
        alone_saves: whether one process can save without the others.
    """

    folder: RunFolder
    options: RunOptions
    gradients: Callable[[int], Figures]
    update: Callable[[], None]
    look: Callable[[Progress, Log | None], Progress]
    save: Callable[[Progress], None]
    is_main: bool
    alone_saves: bool = True

    def run(self, progress: Progress, on_step: OnFigures) -> Progress:
        """From where the run is to its last step.

        Raises:
            TrainError: if a step, a look or a checkpoint does.
            KeyboardInterrupt: after a checkpoint, unless an update or a look was under way: then from the one before.
        """
        options, log = self.options, self._log(progress.step)
        settled = True  # whether weights, optimiser and progress tell of the same step, with its look behind it
        with contextlib.closing(log) if log else contextlib.nullcontext():
            try:
                while progress.step < options.last_step:
                    started = time.perf_counter()
                    figures = self.gradients(progress.step)
                    settled = False
                    self.update()
                    progress = replace(progress, step=progress.step + 1)
                    looking = _is_due(progress.step, options.evaluate_every, options.steps)
                    settled = not looking
                    figures["seconds"] = time.perf_counter() - started
                    if log is not None:
                        log.write(progress.step, "train", figures)
                        on_step(progress.step, figures)
                    if looking:
                        progress = self.look(progress, log)
                    settled = True
                    if _is_due(progress.step, options.checkpoint_every, options.last_step):
                        self.save(progress)
            except KeyboardInterrupt:
                if settled and self.alone_saves:
                    self.save(progress)
                raise
        return progress

    def _log(self, step: int) -> Log | None:
        """The log, of the first process alone; what an interrupted process logged beyond the checkpoint is dropped."""
        if not self.is_main:
            return None
        self.folder.cut_log(step)
        return Log(self.folder.log, step)


def require_finite(value: Tensor, what: str, step: int, samples: Sequence[Sample], ids: Sequence[str]) -> None:
    """Refuses a loss or a gradient that is not finite, before it reaches the weights.

    Raises:
        TrainError: naming the samples.
    """
    if math.isfinite(value.item()):
        return
    named = ", ".join(f"{ids[sample.image]} {_words(sample)}" for sample in samples)
    raise TrainError(
        f"step {step + 1}: the {what} is not finite ({value.item()}), and the run is stopped before it spoils the "
        f"weights; the pairs were: {named}. Lower --learning-rate, or look at these images"
    )


@contextlib.contextmanager
def synchronised(model: nn.Module, last: bool, sharing: bool = False) -> Iterator[None]:
    """Has processes exchange gradients after the last of several batches alone.

    Args:
        model: what is trained, as it was wrapped for several processes.
        last: whether this is the last batch of a step.
        sharing: whether its weights are shared out between the processes.
    """
    if sharing:
        model.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
    with contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():  # pyright: ignore
        yield


def own_batches(samples: list[Sample], batch_size: int, accelerator: Any) -> Iterator[list[Sample]]:
    """The samples of this process in a step, batch by batch, of those of all processes."""
    whole, first = batch_size * accelerator.num_processes, batch_size * accelerator.process_index
    for start in range(0, len(samples), whole):
        yield samples[start + first : start + first + batch_size]


def set_rate(optimiser: Any, rate: float) -> None:
    """Sets the learning rate; groups with a share of it, as layer-wise decay makes them, get their share."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def _is_due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _words(sample: Sample) -> str:
    x0, y0, x1, y1 = sample.crop.box
    return f"({x0:.2f} {y0:.2f} {x1:.2f} {y1:.2f}{', mirrored' if sample.crop.flip else ''})"
