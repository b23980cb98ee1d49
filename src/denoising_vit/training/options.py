"""Options shared by stages 2 and 3: the views to train on, training length and learning rate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from denoising_vit.errors import PlanError, TrainError, require_at_least
from denoising_vit.views.options import CropOptions

Precision = Literal["auto", "float32", "bfloat16"]

#: Default fraction of the images to hold out, and its maximum number.
_HELD_OUT_SHARE, _HELD_OUT_MOST = 0.1, 100


@dataclass(frozen=True)
class ViewOptions:
    """Views of photos to train on.

    Attributes:
        sizes: heights and widths of the backbone's input in pixels, one drawn per step: `518x518,364x476`. Defaults to
            the backbone's own size, as published: 518 for patch size 14, 512 for 16.
        whole: fraction of views that show the whole photo, mirrored or not; 1 is as published.
        area: minimum and maximum fraction of the photo's area that a crop covers.
        ratio: minimum and maximum aspect ratio (width / height) of a crop, in the input frame.
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
        """Number of whole-image views when views are kept: the image, and its mirror image if any view is mirrored."""
        return 2 if self.flip else 1

    @property
    def kept(self) -> tuple[int, int] | None:
        """Numbers of whole views and of crops kept per image; None if each step draws new views."""
        return None

    def validate(self) -> None:
        """Check the range of every option.

        Raises:
            TrainError: with the option, its range, and the value.
        """
        for name in ("whole", "flip", "inverted"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainError(f"{name} must be a fraction in [0, 1], got {getattr(self, name)}")
        try:
            CropOptions(self.area, self.ratio)
        except PlanError as error:
            raise TrainError(str(error)) from error
        self.parsed_sizes()

    def parsed_sizes(self) -> list[tuple[int, int]]:
        """The sizes (H, W); empty if not given.

        Raises:
            TrainError: if the text is not a list of sizes.
        """
        if self.sizes is None:
            return []
        try:
            return [_parsed(part) for part in self.sizes.split(",")]
        except ValueError as error:
            raise TrainError(
                f"sizes must be pixel sizes such as 518 or 364x476 (height x width), separated by commas; got "
                f"{self.sizes!r}"
            ) from error


@dataclass(frozen=True)
class RunOptions:
    """Length, learning rate and logging of a run; loss, optimizer and schedule default to the published ones.

    Attributes:
        steps: number of optimizer steps.
        batch_size: views per forward pass and process.
        accumulate: number of batches to accumulate gradients over per step.
        learning_rate: peak learning rate, multiplied by sqrt(views per step over all processes / 256).
        final_rate: final learning rate.
        warmup: fraction of the steps with a rising learning rate.
        weight_decay: weight decay of AdamW.
        blank: fraction of content-free images (uniform colours and noise) per batch, rounded to whole images. Their
            clean features are known, because they are the same everywhere; 0 is as published.
        held_out: number of held-out images, never trained on. Defaults to a tenth, at most 100.
        evaluate_every: number of steps between evaluations on the held-out images.
        checkpoint_every: number of steps between checkpoints.
        precision: precision of the trained part; auto is bfloat16 if the hardware is fast at it, else float32. Weights
            are float32.
        seed: seed for the weights, the held-out images, and the views and their order.
        stop_at: stop after this step, to resume later; the schedule remains that of the whole run.
    """

    steps: int = 50_000
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 2e-4
    final_rate: float = 1e-6
    warmup: float = 0.15
    weight_decay: float = 1e-5
    blank: float = 0.0
    held_out: int | None = None
    evaluate_every: int = 1000
    checkpoint_every: int = 500
    precision: Precision = "auto"
    seed: int = 0
    stop_at: int | None = None

    def _least(self) -> dict[str, int]:
        """The minimum of each number."""
        positive = ("steps", "batch_size", "accumulate", "held_out", "evaluate_every", "checkpoint_every", "stop_at")
        zero = ("learning_rate", "final_rate", "weight_decay", "seed")
        return {**dict.fromkeys(positive, 1), **dict.fromkeys(zero, 0)}

    def validate(self) -> None:
        """Check the range of every option.

        Raises:
            TrainError: with the option, its range, and the value.
        """
        require_at_least(self, self._least(), TrainError)
        if not 0 <= self.warmup < 1:
            raise TrainError(f"warmup must be a fraction in [0, 1), got {self.warmup}")
        if not 0 <= self.blank < 1:
            raise TrainError(f"blank must be a fraction in [0, 1), got {self.blank}")
        if self.precision not in get_args(Precision):
            raise TrainError(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")

    def views_a_step(self, processes: int) -> int:
        """Views per optimizer step over all processes."""
        return self.batch_size * self.accumulate * processes

    @property
    def blanks(self) -> int:
        """Number of content-free images in a batch; a batch has at least one photo."""
        return min(round(self.blank * self.batch_size), self.batch_size - 1)

    @property
    def photos(self) -> int:
        """Number of views of photos in a batch."""
        return self.batch_size - self.blanks

    def photos_a_step(self, processes: int) -> int:
        """Views of photos per optimizer step over all processes."""
        return self.photos * self.accumulate * processes

    @property
    def last_step(self) -> int:
        """The last step of this process."""
        return self.steps if self.stop_at is None else min(self.stop_at, self.steps)

    def held_out_of(self, images: int) -> int:
        """The number of held-out images.

        Args:
            images: total number of images.

        Raises:
            TrainError: if no image would be left to train on.
        """
        count = self.held_out
        if count is None:
            count = max(min(round(_HELD_OUT_SHARE * images), _HELD_OUT_MOST), 1)
        if count >= images:
            raise TrainError(
                f"expected more than {count} images, because {count} are held out for evaluation; got {images}. Fit "
                "more images, or hold out fewer (--held-out)"
            )
        return count

    def recorded(self) -> dict[str, Any]:
        """Options that determine the result, as JSON values, without `stop_at`.

        An option with the only value that earlier versions supported is omitted, so that their runs can be resumed.
        """
        without = {"stop_at": self.stop_at} | self._only
        return {name: value for name, value in dataclasses.asdict(self).items() if value != without.get(name, ...)}

    @property
    def _only(self) -> dict[str, Any]:
        """Options added later, and their value in earlier versions."""
        return {"blank": 0.0}


def _parsed(text: str) -> tuple[int, int]:
    """(H, W) of ``518`` or ``364x476``."""
    sides = [int(side) for side in text.strip().lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError(text)
    return sides[0], sides[-1]
