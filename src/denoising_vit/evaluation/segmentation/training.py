"""The training of a probe: one loop, that goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from denoising_vit.errors import FitError
from denoising_vit.evaluation.segmentation.probe import LinearProbe
from denoising_vit.evaluation.segmentation.protocol import Protocol
from denoising_vit.evaluation.segmentation.samples import Samples
from denoising_vit.files import atomic_path

#: Steps between two checkpoints of a training that takes hours.
_CHECKPOINT_EVERY = 1_000


@dataclass
class Curve:
    """How training went.

    Attributes:
        losses: mean loss of the steps up to each look, (step, loss).
        looks: (step, mIoU) of looks at the validation images, where there were any.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    looks: list[tuple[int, float]] = field(default_factory=list)


def train(
    samples: Samples,
    protocol: Protocol,
    classes: int,
    seed: int,
    device: torch.device,
    *,
    checkpoint: Path | None = None,
    look: Callable[[LinearProbe], float] | None = None,
    looks: int = 8,
    progress: Callable[[], None] = lambda: None,
) -> tuple[LinearProbe, Curve]:
    """A probe trained by AdamW.

    Args:
        samples: where losses come from.
        protocol: steps, learning rate, weight decay.
        classes: K.
        seed: of the initial weights.
        device: of the probe.
        checkpoint: where the state is kept every thousand steps; a training that was stopped goes on from there.
        look: mIoU of a probe on the validation images; it decides nothing.
        looks: how often the loss is recorded, evenly over the training.
        progress: called after each step, those of an earlier run included.

    Raises:
        FitError: if a loss is not finite.
    """
    probe = LinearProbe(samples.channels, classes, seed).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=protocol.learning_rate, weight_decay=protocol.weight_decay)
    curve, losses, start = _restore(checkpoint, probe, optimizer)
    probe.train()
    for _ in range(start):
        progress()
    for step in range(start, protocol.steps):
        for group in optimizer.param_groups:
            group["lr"] = protocol.learning_rate_at(step)
        loss = samples.loss(probe, step)
        if not torch.isfinite(loss):
            raise FitError(f"the probe's loss is {float(loss.detach())} at step {step}; try a smaller learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
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
            _keep(checkpoint, probe, optimizer, curve, losses, done)
        progress()
    return probe.eval(), curve


def _keep(
    path: Path, probe: LinearProbe, optimizer: torch.optim.Optimizer, curve: Curve, losses: list[float], step: int
) -> None:
    state = {"probe": probe.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    state |= {"losses": curve.losses, "looks": curve.looks, "since": losses}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _restore(path: Path | None, probe: LinearProbe, optimizer: torch.optim.Optimizer) -> tuple[Curve, list[float], int]:
    """Loads what an earlier training left: its curve, its losses since the last look, and the steps done."""
    if path is None or not path.exists():
        return Curve(), [], 0
    try:
        state: dict[str, Any] = torch.load(path, map_location=probe.classify.weight.device, weights_only=True)
        probe.load_state_dict(state["probe"])
        optimizer.load_state_dict(state["optimizer"])
        return Curve(list(state["losses"]), list(state["looks"])), list(state["since"]), int(state["step"])
    except Exception as error:  # torch meets damaged files with all kinds, and adds advice that is not for users
        kind = type(error).__name__
        raise FitError(f"{path}: a damaged checkpoint ({kind}); delete it to begin this training anew") from error
