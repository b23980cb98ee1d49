"""What the training loops of stages 2 and 3 share: loss, learning rate, logs, checks."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoising_vit.errors import TrainError
from denoising_vit.training.checkpoints import Progress
from denoising_vit.training.options import RunOptions
from denoising_vit.training.run_folder import RunFolder
from denoising_vit.training.samples import Sample

Figures = dict[str, float]

#: Called with the number of steps done and their figures.
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


class Log:
    """Writes figures of steps, line by line, and to TensorBoard.

    Args:
        path: of the JSON lines; TensorBoard's files go beside it.
        step: that the run goes on from.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(path.parent / "tensorboard", step)

    def write(self, step: int, kind: str, figures: dict[str, float]) -> None:
        """One line: the step, ``train`` or ``held_out``, and figures; those that are not finite as null.

        Raises:
            TrainError: if it cannot be written.
        """
        plain = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        try:
            self._file.write(json.dumps({"step": step, "kind": kind, **plain}) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainError(f"{self._file.name}: cannot be written to ({error}); --resume goes on") from error
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Ends both."""
        with contextlib.suppress(OSError):  # a full disk was told when the line was written
            self._file.close()
        if self._board is not None:
            self._board.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # JSON lines hold the same
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def learning_rate(step: int, steps: int, peak: float, final: float, warmup: float) -> float:
    """The rate of a step: from near zero to the peak over the first part, then by a cosine to the final rate.

    Args:
        step: counted from 0.
        steps: of the whole run.
        peak: the highest.
        final: the last.
        warmup: share of the steps in [0, 1) over which it rises.
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(steps - 1 - rising, 1)
    return final + (peak - final) * (1 + math.cos(math.pi * min(done, 1))) / 2


def peak_rate(rate: float, pairs: int) -> float:
    """The highest rate for so many pairs in a step, of all processes: ``rate sqrt(pairs / 256)``, as published."""
    return rate * math.sqrt(pairs / 256)


def denoising_loss(clean: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error, and mean over patches of the cosine, of features (B, h, w, C) against targets.

    The published loss of stages 2 and 3 is ``MSE + (1 - cosine)`` (section 4.2 of the paper).
    """
    return F.mse_loss(clean, target), F.cosine_similarity(clean, target, dim=-1).mean()


def gradient_norm(model: nn.Module) -> Tensor:
    """Of all gradients that are there, as one vector."""
    return torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
