"""How a ViT is distilled."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from denoising_vit.errors import TrainError
from denoising_vit.training.options import RunOptions


@dataclass(frozen=True)
class DistillOptions(RunOptions):
    """How long, how fast, and what else is held on to. Loss, optimiser, schedule and epochs are the published ones.

    Attributes:
        steps: optimiser steps of the whole run; 0 for as many as the epochs take.
        epochs: how often each photo is seen, where no steps are given.
        layer_decay: factor on the learning rate from each block to the one before it; 1 is as published.
        ema: share of the old in a moving average of the weights, which is then what is judged and written; 0 for none.
        hold_prefix: weight of the loss that keeps class token and registers what they were; 0 lets them go.
        checkpointing: compute activations of blocks again instead of keeping them: less memory, a third more time.
        shard: share weights, gradients and optimiser state out between the processes (FSDP), for models that one
            device cannot hold.
    """

    steps: int = 0
    epochs: float = 5.0
    layer_decay: float = 1.0
    ema: float = 0.0
    hold_prefix: float = 1.0
    checkpointing: bool = False
    shard: bool = False

    def _least(self) -> dict[str, int]:
        return super()._least() | {"steps": 0, "epochs": 0, "hold_prefix": 0}

    def validate(self) -> None:
        """Checks every option's range.

        Raises:
            TrainError: naming the option, its range, and what came.
        """
        super().validate()
        if not self.steps and not 0 < self.epochs < math.inf:
            raise TrainError(f"expected --epochs above 0, or --steps; got {self.epochs} epochs")
        if not 0 < self.layer_decay <= 1:
            raise TrainError(f"layer_decay must be a factor in (0, 1], got {self.layer_decay}")
        if not 0 <= self.ema < 1:
            raise TrainError(f"ema must be a share in [0, 1), got {self.ema}")

    def with_steps(self, images: int, processes: int) -> DistillOptions:
        """The same with the steps that the epochs take."""
        if self.steps:
            return self
        return replace(self, steps=max(round(self.epochs * images / self.views_a_step(processes)), 1))
