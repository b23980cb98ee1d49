"""Training a probe with AdamW; an interrupted training resumes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from denoising_vit.errors import FitError
from denoising_vit.files import atomic_path

#: What the stream of draws is for.
_ORDER = 1


def chosen(images: int, batch: int, step: int, seed: int) -> list[int]:
    """The images of a step: every image comes once in an epoch, and a batch may begin in one and end in the next."""
    wanted = range(step * batch, (step + 1) * batch)
    return [int(_order(images, position // images, seed)[position % images]) for position in wanted]


@functools.lru_cache(maxsize=4)
def _order(images: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(images)


Probe = TypeVar("Probe", bound=nn.Module)


#: Steps between two checkpoints of a training that takes hours.
_CHECKPOINT_EVERY = 1_000


class Schedule(Protocol):
    """How long and how fast a probe is trained."""

    @property
    def steps(self) -> int:
        """Of AdamW."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of AdamW."""
        ...

    @property
    def gradient_limit(self) -> float | None:
        """Largest norm of all gradients together; None leaves them as they are."""
        ...

    def learning_rate_at(self, step: int) -> float:
        """The rate of a step, 0 to steps - 1."""
        ...

    def momentum_at(self, step: int) -> float:
        """AdamW's first beta in a step."""
        ...


@dataclass
class Curve:
    """How training went.

    Attributes:
        losses: mean loss of the steps up to each look, (step, loss).
        looks: (step, score) of looks at the validation images, where there were any.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    looks: list[tuple[int, float]] = field(default_factory=list)


def train(
    probe: Probe,
    loss_of: Callable[[Probe, int], Tensor],
    schedule: Schedule,
    *,
    checkpoint: Path | None = None,
    look: Callable[[Probe], float] | None = None,
    looks: int = 8,
    progress: Callable[[], None] = lambda: None,
) -> Curve:
    """Trains a probe by AdamW, and leaves it in evaluation mode.

    Args:
        probe: with its initial weights, on its device.
        loss_of: the loss of a step's samples; it depends on the step alone, so that training can go on from any.
        schedule: steps, rates, weight decay.
        checkpoint: where the state is kept every thousand steps; a training that was stopped goes on from there.
        look: score of a probe on the validation images; it decides nothing.
        looks: how often the loss is recorded, evenly over the training.
        progress: called after each step, those of an earlier run included.

    Raises:
        FitError: if a loss is not finite.
    """
    optimizer = torch.optim.AdamW(probe.parameters(), weight_decay=schedule.weight_decay)
    curve, losses, start = _restore(checkpoint, probe, optimizer)
    probe.train()
    for _ in range(start):
        progress()
    for step in range(start, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(step)
            group["betas"] = schedule.momentum_at(step), group["betas"][1]
        loss = loss_of(probe, step)
        if not torch.isfinite(loss):
            raise FitError(f"the probe's loss is {float(loss.detach())} at step {step}; try a smaller learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if schedule.gradient_limit is not None:
            nn.utils.clip_grad_norm_(probe.parameters(), schedule.gradient_limit)
        optimizer.step()
        losses.append(float(loss.detach()))
        done = step + 1
        if done * looks // schedule.steps > step * looks // schedule.steps:
            curve.losses.append((done, sum(losses) / len(losses)))
            losses.clear()
            if look is not None:
                curve.looks.append((done, look(probe.eval())))
                probe.train()
        if checkpoint is not None and done % _CHECKPOINT_EVERY == 0 and done < schedule.steps:
            _keep(checkpoint, probe, optimizer, curve, losses, done)
        progress()
    probe.eval()
    return curve


def _keep(
    path: Path, probe: nn.Module, optimizer: torch.optim.Optimizer, curve: Curve, losses: list[float], step: int
) -> None:
    state = {"probe": probe.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    state |= {"losses": curve.losses, "looks": curve.looks, "since": losses}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _restore(path: Path | None, probe: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Curve, list[float], int]:
    """Loads what an earlier training left: its curve, its losses since the last look, and the steps done."""
    if path is None or not path.exists():
        return Curve(), [], 0
    try:
        state: dict[str, Any] = torch.load(path, map_location=next(probe.parameters()).device, weights_only=True)
        probe.load_state_dict(state["probe"])
        optimizer.load_state_dict(state["optimizer"])
        return Curve(list(state["losses"]), list(state["looks"])), list(state["since"]), int(state["step"])
    except Exception as error:  # torch meets damaged files with all kinds, and adds advice that is not for users
        kind = type(error).__name__
        raise FitError(f"{path}: a damaged checkpoint ({kind}); delete it to begin this training anew") from error
