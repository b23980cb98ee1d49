"""Parts of the training loop shared by stages 2 and 3: loss, learning rate, gradients, log."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoising_vit.errors import TrainError
from denoising_vit.training.board import Board
from denoising_vit.training.run_folder import RunFolder
from denoising_vit.training.samples import Sample, Sampler

Figures = dict[str, float]

#: Called with the number of steps done and their metrics.
OnFigures = Callable[[int, Figures], None]


def denoising_loss(clean: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error and mean cosine over patches, between features (B, h, w, C) and targets.

    The published loss of stages 2 and 3 is ``MSE + (1 - cosine)`` (section 4.2 of the paper).
    """
    return F.mse_loss(clean, target), F.cosine_similarity(clean, target, dim=-1).mean()


def learning_rate(step: int, steps: int, peak: float, final: float, warmup: float) -> float:
    """The learning rate of a step: linear warm-up to the peak, then cosine decay to the final rate.

    Args:
        step: number of the step, from 0.
        steps: number of steps of the run.
        peak: peak learning rate.
        final: final learning rate.
        warmup: fraction of the steps in [0, 1) with a rising rate.
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(steps - 1 - rising, 1)
    return final + (peak - final) * (1 + math.cos(math.pi * min(done, 1))) / 2


def peak_rate(rate: float, pairs: int) -> float:
    """The peak learning rate for a number of pairs per step over all processes: ``rate sqrt(pairs / 256)``."""
    return rate * math.sqrt(pairs / 256)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, times each group's factor with layer-wise decay."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def own_batches(sampler: Sampler, steps: Iterable[int], batch_size: int, accelerator: Any) -> Iterator[list[Sample]]:
    """Samples of this process in these steps, batch by batch."""
    whole, first = batch_size * accelerator.num_processes, batch_size * accelerator.process_index
    for step in steps:
        samples = sampler.step(step)
        for start in range(0, len(samples), whole):
            yield samples[start + first : start + first + batch_size]


def blanks_before(number: int, blanks: int, accelerator: Any) -> int:
    """Number of a step's content-free images in earlier batches and processes, with ``blanks`` per batch."""
    return (number * accelerator.num_processes + accelerator.process_index) * blanks


@contextlib.contextmanager
def synchronised(model: nn.Module, last: bool, sharing: bool = False) -> Iterator[None]:
    """Synchronize gradients between processes only after the last batch of a step.

    Args:
        model: the trained model, wrapped if there are several processes.
        last: whether this is the last batch of the step.
        sharing: whether the weights are sharded between the processes.
    """
    if sharing:
        model.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
    with contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():  # pyright: ignore
        yield


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients as one vector."""
    return torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)


def require_finite(value: Tensor, what: str, step: int, samples: Sequence[Sample], ids: Sequence[str]) -> None:
    """Reject a loss or gradient that is not finite, before the optimizer step.

    Raises:
        TrainError: naming the samples.
    """
    if math.isfinite(value.item()):
        return
    named = ", ".join(f"{ids[sample.image]} {_words(sample)}" for sample in samples)
    raise TrainError(
        f"step {step + 1}: the {what} is not finite ({value.item()}); the run stops before it corrupts the weights. "
        f"Pairs of this step: {named}. Lower --learning-rate, or check these images"
    )


def _words(sample: Sample) -> str:
    x0, y0, x1, y1 = sample.crop.box
    return f"({x0:.2f} {y0:.2f} {x1:.2f} {y1:.2f}{', mirrored' if sample.crop.flip else ''})"


def is_due(step: int, every: int, last: int) -> bool:
    """True after every ``every`` steps and after the last step."""
    return step % every == 0 or step == last


class Log:
    """Writes metrics as JSON lines, and to TensorBoard if it is installed.

    Args:
        path: file of the JSON lines; TensorBoard's files go next to it.
        step: step at which the run starts or resumes.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._board = Board(path.parent / "tensorboard", step)

    def write(self, step: int, kind: str, figures: Figures) -> None:
        """Write the metrics of a step; ``kind`` is ``train`` or ``held_out``; values that are not finite become null.

        Raises:
            TrainError: if the file cannot be written.
        """
        plain = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        try:
            self._file.write(json.dumps({"step": step, "kind": kind, **plain}) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainError(f"{self._file.name}: cannot be written to ({error}); continue with --resume") from error
        self._board.write(step, {f"{kind}/{name}": value for name, value in figures.items()})

    def close(self) -> None:
        """Close the files."""
        with contextlib.suppress(OSError):  # a full disk was reported by `write`
            self._file.close()
        self._board.close()


@contextlib.contextmanager
def opened_log(folder: RunFolder, step: int, accelerator: Any) -> Iterator[Log | None]:
    """The log of a run from a step on, without later lines of an interrupted run; None except in the first process."""
    if not accelerator.is_main_process:
        yield None
        return
    folder.cut_log(step)
    with contextlib.closing(Log(folder.log, step)) as log:
        yield log
