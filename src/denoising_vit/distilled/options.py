"""Options of stage 3."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from denoising_vit.errors import TrainError
from denoising_vit.training.options import RunOptions

#: Peak learning rate per view in a step up to which training in small steps is known to work (docs/decisions.md), and
#: the factor above it at which a warning is given.
_SAFE_PEAK, _TOO_HIGH = 2e-4 / 256, 2.0


@dataclass(frozen=True)
class DistillOptions(RunOptions):
    """Training of a distilled model; optimizer, schedule and epochs default to the published ones.

    So does the loss, with ``blank`` and ``hold_prefix`` of 0.

    The published learning rate is for steps of about 128 views. See :meth:`safer_rate` for smaller steps.

    Attributes:
        steps: number of optimizer steps; 0 derives it from the epochs.
        epochs: number of passes over the photos if steps is 0.
        layer_decay: factor on the learning rate from each block to the previous one; 1 is as published.
        ema: decay of an exponential moving average of the weights, which is then evaluated and written; 0 for none.
        hold_prefix: weight of the loss that keeps class token and registers unchanged; 0 for none.
        contrast: scale and shift each channel of the written weights' features to the mean and variance of the raw one
            on the held-out photos, because regression to noisy targets reduces it. Training and metrics are unaffected.
        checkpointing: recompute the blocks' activations in the backward pass: less memory, a third more time.
        shard: shard weights, gradients and optimizer state between the processes (FSDP), for models too large for one
            device.
    """

    steps: int = 0
    epochs: float = 5.0
    layer_decay: float = 1.0
    ema: float = 0.0
    hold_prefix: float = 1.0
    contrast: bool = False
    blank: float = 0.125
    checkpointing: bool = False
    shard: bool = False

    @property
    def _only(self) -> dict[str, Any]:
        return super()._only | {"contrast": False}

    def _least(self) -> dict[str, int]:
        return super()._least() | {"steps": 0, "epochs": 0, "hold_prefix": 0}

    def validate(self) -> None:
        """Check the range of every option.

        Raises:
            TrainError: with the option, its range, and the value.
        """
        super().validate()
        if not self.steps and not 0 < self.epochs < math.inf:
            raise TrainError(f"expected --epochs above 0, or --steps; got {self.epochs} epochs")
        if not 0 < self.layer_decay <= 1:
            raise TrainError(f"layer_decay must be a factor in (0, 1], got {self.layer_decay}")
        if not 0 <= self.ema < 1:
            raise TrainError(f"ema must be a factor in [0, 1), got {self.ema}")

    def safer_rate(self, processes: int) -> float | None:
        """A lower `learning_rate` for steps with few views; None if the given one is not much higher.

        It makes the peak proportional to the views per step, ``2e-4 views / 256``, not to their square root as
        published. Gradients of few views are too noisy for the published rate, and such runs have diverged.
        """
        views = self.views_a_step(processes)
        safe = _SAFE_PEAK * views / math.sqrt(views / 256)
        return safe if self.learning_rate > _TOO_HIGH * safe else None

    def with_steps(self, images: int, processes: int) -> DistillOptions:
        """The same options with the number of steps for the epochs."""
        if self.steps:
            return self
        return replace(self, steps=max(round(self.epochs * images / self.photos_a_step(processes)), 1))
