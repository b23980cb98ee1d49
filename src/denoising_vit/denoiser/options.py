"""Options of stage 2: the views to use as training pairs, and the training of the denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from denoising_vit.errors import TrainError
from denoising_vit.training.options import RunOptions, ViewOptions


@dataclass(frozen=True)
class PairOptions(ViewOptions):
    """Views to use as training pairs: raw features of the view, and F at its patches.

    F is a function of the position in the image, so any crop of a fitted image is a pair, at any size.

    Attributes:
        sizes: heights and widths of the backbone's input in pixels, one drawn per step: `518x518,364x476`. Defaults to
            the size of the fit.
        whole: fraction of pairs that show the whole image, mirrored or not; 1 is as published.
        flip: probability that a crop is mirrored; with 0, whole images are not mirrored either.
        keep: number of views per image and size to draw once and keep on disk with their features: the whole image, its
            mirror image unless `flip` is 0, and crops. With 0, every step draws new views and runs the backbone.
    """

    whole: float = 0.25
    keep: int = 8

    def validate(self) -> None:
        """Check the range of every option.

        Raises:
            TrainError: with the option, its range, and the value.
        """
        super().validate()
        if self.keep < 0:
            raise TrainError(f"keep must be at least 0, got {self.keep}")
        if self.whole < 1 and 0 < self.keep <= self.wholes:
            first = "the whole image and its mirror image come" if self.flip else "the whole image comes"
            raise TrainError(
                f"none of the {self.keep} kept views is a crop, because {first} first; "
                f"expected --pairs.keep {self.wholes + 1} or more, or --pairs.whole 1"
            )

    @property
    def kept(self) -> tuple[int, int] | None:
        """Numbers of whole views and of crops kept per image; None if each step draws new views."""
        wholes = min(self.wholes, self.keep)
        return (wholes, self.keep - wholes) if self.keep else None


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """Training of a denoiser.

    Attributes:
        blocks: number of transformer blocks of the denoiser.
        start: initial weights: identity passes features through at the start, which suits short training; random is as
            published.
        shrink: factor on the blocks' residual branches in the evaluated and written denoiser; slightly below 1 reduces
            overfitting after short training on few images. Training itself is unaffected.
    """

    blocks: int = 1
    blank: float = 0.5
    start: Literal["identity", "random"] = "identity"
    shrink: float = 1.0

    def _least(self) -> dict[str, int]:
        return super()._least() | {"blocks": 1}

    def validate(self) -> None:
        """Check the range of every option.

        Raises:
            TrainError: with the option, its range, and the value.
        """
        super().validate()
        if self.start not in ("identity", "random"):
            raise TrainError(f"start must be identity or random, got {self.start!r}")
        if not 0 < self.shrink <= 1:
            raise TrainError(f"shrink must be a factor in (0, 1], got {self.shrink}")

    @property
    def _only(self) -> dict[str, Any]:
        return super()._only | {"accumulate": 1, "start": "identity"}
