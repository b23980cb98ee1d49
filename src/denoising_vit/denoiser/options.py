"""Options of stage 2: which views are training pairs, and how the denoiser is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from denoising_vit.errors import TrainError
from denoising_vit.training.options import RunOptions, ViewOptions


@dataclass(frozen=True)
class PairOptions(ViewOptions):
    """Which views of an image are training pairs: the raw features of a view, and F at its patches.

    F is a function of the place in the image, so any crop of a fitted image is a pair, at any size.

    Attributes:
        sizes: heights and widths in pixels of what the backbone is shown, in turn: `518x518,364x476`. Without it, the
            size of the fit.
        whole: share of the pairs that show the whole image, mirrored or not; 1 is as published.
        flip: probability that a crop is mirrored; with 0, no whole image is mirrored either.
        keep: views of each image and size that are drawn once, and whose features are computed once and kept on disk;
            the whole image is among them, and its mirror image unless nothing is mirrored. With 0, every step draws
            new ones, and the backbone runs in every step.
    """

    whole: float = 0.25
    keep: int = 8

    def validate(self) -> None:
        """Checks every option's range.

        Raises:
            TrainError: naming the option, its range, and what came.
        """
        super().validate()
        if self.keep < 0:
            raise TrainError(f"keep must be 0 or more, got {self.keep}")
        if self.whole < 1 and 0 < self.keep <= self.wholes:
            first = "the whole image and its mirror image come" if self.flip else "the whole image comes"
            raise TrainError(
                f"of {self.keep} views that are kept none is a crop: {first} first. "
                f"Expected --pairs.keep {self.wholes + 1} or more, or --pairs.whole 1"
            )

    @property
    def kept(self) -> tuple[int, int] | None:
        """How many views of each image are kept, whole ones first and then crops; None where each step draws anew."""
        wholes = min(self.wholes, self.keep)
        return (wholes, self.keep - wholes) if self.keep else None


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """How a denoiser is trained.

    Attributes:
        blocks: transformer blocks of the denoiser.
        start: identity begins with blocks that pass features on as they are, which a short training is better for;
            random begins as published.
        shrink: factor on what the blocks add to features, in the denoiser that is judged and written; a little below 1
            undoes some of what a short training on few images learned by heart. Training itself is the same.
    """

    blocks: int = 1
    start: Literal["identity", "random"] = "identity"
    shrink: float = 1.0

    def _least(self) -> dict[str, int]:
        return super()._least() | {"blocks": 1}

    def validate(self) -> None:
        """Checks every option's range.

        Raises:
            TrainError: naming the option, its range, and what came.
        """
        super().validate()
        if self.start not in ("identity", "random"):
            raise TrainError(f"start must be identity or random, got {self.start!r}")
        if not 0 < self.shrink <= 1:
            raise TrainError(f"shrink must be a factor in (0, 1], got {self.shrink}")

    def recorded(self) -> dict[str, Any]:
        """As for all runs; options that came later are left out where they are what was always done, so that earlier
        runs go on.
        """
        always = {"accumulate": 1, "start": "identity"}
        return {name: value for name, value in super().recorded().items() if value != always.get(name, ...)}
