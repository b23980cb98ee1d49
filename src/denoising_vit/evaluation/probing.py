"""Training a probe with AdamW on random samples; interrupted trainings resume."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from denoising_vit.errors import FitError
from denoising_vit.evaluation import outcomes
from denoising_vit.evaluation.data import EvaluationImage
from denoising_vit.evaluation.options import ProbeProtocol
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.files import atomic_path

#: Random stream for the order of images; crops have their own.
_ORDER = 1


def chosen(images: int, batch: int, step: int, seed: int) -> list[int]:
    """Indices of the images of a step: each image once per epoch; a batch may span two epochs."""
    wanted = range(step * batch, (step + 1) * batch)
    return [int(_order(images, position // images, seed)[position % images]) for position in wanted]


@functools.lru_cache(maxsize=4)
def _order(images: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(images)


Probe = TypeVar("Probe", bound=nn.Module)

#: Number of threads that decode and render samples.
_THREADS = 4

#: Steps between two checkpoints.
_CHECKPOINT_EVERY = 1_000


@dataclass
class Curve:
    """Training history.

    Attributes:
        losses: (step, mean loss since the previous entry).
        looks: (step, score on the validation images), if evaluated during training.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    looks: list[tuple[int, float]] = field(default_factory=list)

    @property
    def entries(self) -> outcomes.Curve:
        """Entries as in results: [step, loss, score or None]."""
        scores = {step: score for step, score in self.looks if math.isfinite(score)}
        return [[step, loss, scores.get(step)] for step, loss in self.losses]


def train(
    probe: Probe,
    loss_of: Callable[[Probe, int], Tensor],
    protocol: ProbeProtocol,
    *,
    checkpoint: Path | None = None,
    look: Callable[[Probe], float] | None = None,
    looks: int = 8,
    progress: Callable[[], None] = lambda: None,
) -> Curve:
    """Train a probe with AdamW and leave it in evaluation mode.

    Args:
        probe: the probe with its initial weights.
        loss_of: returns the loss of a step; it must depend on the step only, so that training can resume at any step.
        protocol: steps, learning rates, weight decay.
        checkpoint: file to save the state to every thousand steps; an interrupted training resumes from it.
        look: returns the score on the validation images, for the history only.
        looks: number of entries in the history.
        progress: called once per step, including those of an earlier run.

    Raises:
        FitError: if a loss is not finite, or the checkpoint is damaged.
    """
    optimizer = torch.optim.AdamW(probe.parameters(), weight_decay=protocol.weight_decay)
    curve, losses, start = _restore(checkpoint, probe, optimizer)
    probe.train()
    for _ in range(start):
        progress()
    for step in range(start, protocol.steps):
        for group in optimizer.param_groups:
            group["lr"] = protocol.learning_rate_at(step)
            group["betas"] = protocol.momentum_at(step), group["betas"][1]
        loss = loss_of(probe, step)
        if not torch.isfinite(loss):
            raise FitError(f"the probe's loss is {float(loss.detach())} at step {step}; try a smaller learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if protocol.gradient_limit is not None:
            nn.utils.clip_grad_norm_(probe.parameters(), protocol.gradient_limit)
        optimizer.step()
        losses.append(float(loss.detach()))
        done = step + 1
        if done * looks // protocol.steps > step * looks // protocol.steps:
            curve.losses.append((done, sum(losses) / len(losses)))
            losses.clear()
            if look is not None:
                curve.looks.append((done, look(probe.eval())))
                probe.train()
        if checkpoint is not None and done % _CHECKPOINT_EVERY == 0 and done < protocol.steps:
            _save(checkpoint, probe, optimizer, curve, losses, done)
        progress()
    probe.eval()
    return curve


def _save(
    path: Path, probe: nn.Module, optimizer: torch.optim.Optimizer, curve: Curve, losses: list[float], step: int
) -> None:
    state = {"probe": probe.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    state |= {"losses": curve.losses, "looks": curve.looks, "since": losses}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _restore(path: Path | None, probe: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Curve, list[float], int]:
    """Restore a checkpoint: history, losses since its last entry, and steps done."""
    if path is None or not path.exists():
        return Curve(), [], 0
    try:
        state: dict[str, Any] = torch.load(path, map_location=next(probe.parameters()).device, weights_only=True)
        probe.load_state_dict(state["probe"])
        optimizer.load_state_dict(state["optimizer"])
        return Curve(list(state["losses"]), list(state["looks"])), list(state["since"]), int(state["step"])
    except Exception as error:  # torch raises many types of errors for damaged files
        kind = type(error).__name__
        raise FitError(f"{path}: damaged checkpoint ({kind}); delete it to restart this training") from error


# --- samples ---


Sample = TypeVar("Sample")
Image = TypeVar("Image", bound=EvaluationImage)


class RandomSamples(ABC, Generic[Image, Sample]):
    """Random samples of each step, rendered in threads; with an accelerator, one step ahead of the forward passes."""

    def __init__(self, source: FeatureSource, images: Sequence[Image], protocol: ProbeProtocol, seed: int) -> None:
        self._source, self._images, self._seed = source, images, seed
        self._batch, self._steps = protocol.batch, protocol.steps
        self._prefetch = source.device.type != "cpu"
        self._pool = ThreadPoolExecutor(_THREADS, "render", torch.set_num_threads, (torch.get_num_threads(),))
        self._ahead: dict[int, list[Future[Sample]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    @abstractmethod
    def _draw(self, index: int, step: int, place: int) -> Sample:
        """A sample of an image. It depends only on index, step and place in the batch, so that training can resume."""

    def take(self, step: int) -> list[Sample]:
        """Return the samples of a step and release them."""
        self._submit(step)
        if self._prefetch and step + 1 < self._steps:
            self._submit(step + 1)
        return [future.result() for future in self._ahead.pop(step)]

    def _submit(self, step: int) -> None:
        if step not in self._ahead:
            batch = chosen(len(self._images), self._batch, step, self._seed)
            self._ahead[step] = [self._pool.submit(self._draw, index, step, place) for place, index in enumerate(batch)]
