"""How runs are trained: what all have in common, and what is the denoiser's own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from denoising_vit.errors import PlanError, TrainError
from denoising_vit.views.options import CropOptions

Precision = Literal["auto", "float32", "bfloat16"]

#: Of the images, the share that is held out where no number is given, and the most of them.
_HELD_OUT_SHARE, _HELD_OUT_MOST = 0.1, 100


@dataclass(frozen=True)
class ViewOptions:
    """Which views of photos are trained on.

    Attributes:
        sizes: heights and widths in pixels of what the backbone is shown, in turn: `518x518,364x476`. Without it, the
            backbone's own, as published: 518 for patches of 14, 512 for 16.
        whole: share of the views that show the whole photo, mirrored or not; 1 is as published.
        area: least and largest share of the photo that a crop covers.
        ratio: least and largest width over height of a crop, in the shown frame.
        flip: probability that a view is mirrored.
        inverted: probability that a crop is upside down.
    """

    sizes: str | None = None
    whole: float = 1.0
    area: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    inverted: float = 0.0

    @property
    def wholes(self) -> int:
        """Views that show all of an image, which come first where views are kept: as it is, and mirrored if any is."""
        return 2 if self.flip else 1

    @property
    def kept(self) -> tuple[int, int] | None:
        """How many views of each image are kept, whole ones first and then crops; None where each step draws anew."""
        return None

    def validate(self) -> None:
        """Checks every option's range.

        Raises:
            TrainError: naming the option, its range, and what came.
        """
        for name in ("whole", "flip", "inverted"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainError(f"{name} must be a share in [0, 1], got {getattr(self, name)}")
        try:
            CropOptions(self.area, self.ratio)
        except PlanError as error:
            raise TrainError(str(error)) from error
        self.parsed_sizes()

    def parsed_sizes(self) -> list[tuple[int, int]]:
        """The sizes (H, W); none where none are named.

        Raises:
            TrainError: if the text is no list of sizes.
        """
        if self.sizes is None:
            return []
        try:
            return [_parsed(part) for part in self.sizes.split(",")]
        except ValueError as error:
            raise TrainError(
                f"sizes must be numbers of pixels like 518 or 364x476 (height x width), separated by commas; got "
                f"{self.sizes!r}"
            ) from error


@dataclass(frozen=True)
class RunOptions:
    """How long, how fast, and how it is watched. Loss, optimiser and schedule are the published ones by default.

    Attributes:
        steps: optimiser steps of the whole run.
        batch_size: views in a forward pass, of each process.
        accumulate: such batches whose gradients are added up before a step is taken.
        learning_rate: the highest, times the square root of (views in a step of all processes / 256).
        final_rate: the last.
        warmup: share of the steps over which the rate rises.
        weight_decay: of AdamW.
        held_out: images that are never trained on; the run is judged by them. Without it, a tenth, at most 100.
        evaluate_every: steps between two looks at them.
        checkpoint_every: steps between two checkpoints.
        precision: of what is trained; auto is bfloat16 where the hardware is fast at it, else float32. Weights are
            float32.
        seed: of the weights, the held-out images, the views and their order.
        stop_at: end after this step, to be resumed later; the schedule is that of the whole run.
    """

    steps: int = 50_000
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 2e-4
    final_rate: float = 1e-6
    warmup: float = 0.15
    weight_decay: float = 1e-5
    held_out: int | None = None
    evaluate_every: int = 1000
    checkpoint_every: int = 500
    precision: Precision = "auto"
    seed: int = 0
    stop_at: int | None = None

    def _least(self) -> dict[str, int]:
        """The least value of each number."""
        least = {
            "steps": 1,
            "batch_size": 1,
            "accumulate": 1,
            "held_out": 1,
            "evaluate_every": 1,
            "checkpoint_every": 1,
            "stop_at": 1,
        }
        return least | {"learning_rate": 0, "final_rate": 0, "weight_decay": 0, "seed": 0}

    def validate(self) -> None:
        """Checks every option's range.

        Raises:
            TrainError: naming the option, its range, and what came.
        """
        for name, least_value in self._least().items():
            value = getattr(self, name)
            if value is not None and not value >= least_value:  # NaN is not
                raise TrainError(f"{name} must be at least {least_value}, got {value}")
        if not 0 <= self.warmup < 1:
            raise TrainError(f"warmup must be a share in [0, 1), got {self.warmup}")
        if self.precision not in get_args(Precision):
            raise TrainError(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")

    def views_a_step(self, processes: int) -> int:
        """Of all processes."""
        return self.batch_size * self.accumulate * processes

    @property
    def last_step(self) -> int:
        """The step after which this process ends."""
        return self.steps if self.stop_at is None else min(self.stop_at, self.steps)

    def held_out_of(self, images: int) -> int:
        """How many of so many images are held out.

        Raises:
            TrainError: if none would be left to train on.
        """
        count = self.held_out
        if count is None:
            count = max(min(round(_HELD_OUT_SHARE * images), _HELD_OUT_MOST), 1)
        if count >= images:
            raise TrainError(
                f"{images} images are too few: {count} are held out, and none is left to train on. Fit more images, or "
                "hold out fewer (--held-out)"
            )
        return count

    def recorded(self) -> dict[str, Any]:
        """What decides the result, as JSON values; where a run is stopped does not."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "stop_at"}


def _parsed(text: str) -> tuple[int, int]:
    """(H, W) of ``518`` or ``364x476``."""
    sides = [int(side) for side in text.strip().lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError(text)
    return sides[0], sides[-1]
