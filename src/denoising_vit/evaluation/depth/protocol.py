"""Training and evaluation protocols of the linear depth probe: the published one and a quick one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from denoising_vit.errors import PlanError
from denoising_vit.evaluation.options import Pads, ProbeOptions, ProbeProtocol, warmed

#: Fraction of the learning rate at the start of the warm-up, and at the end of training.
_WARMUP_START, _RATE_END = 1e-3, 1e-8

#: AdamW's first beta falls from the first value to the second over this fraction of the steps, then rises again.
_MOMENTUM, _MOMENTUM_TURN = (0.95, 0.85), 0.3


@dataclass(frozen=True)
class DepthProtocol(ProbeProtocol):
    """Training and evaluation of a linear probe that predicts weights of depth bins.

    Defaults follow the published evaluation (DINOv2's, in mmsegmentation).

    Attributes:
        cycle: vary AdamW's first beta in one cycle, as published; otherwise it stays at 0.9.
        bins: number of evenly spaced depth bins.
        nearest: depth of the first bin in metres; nearer pixels are not evaluated.
        farthest: depth of the last bin in metres; farther pixels are not evaluated.
        class_token: concatenate the class token to each patch's features.
        upsample: upsampling factor of the features before the bins are weighted.
        gradient: weight of the gradient loss relative to the scale-invariant loss. The published code's term is
            always 0 (docs/decisions.md).
        together: images per group of the scale-invariant loss, which is averaged over groups; None for the whole batch.
        mean_first: number of initial steps in which the scale-invariant loss has no variance term.
        augment: random crops with new forward passes in every step; otherwise features of whole images are computed
            once.
        rotate: maximum rotation in degrees; half of the training photos are rotated.
        flip: probability of a horizontal flip of a training crop.
        crop: height and width of a training crop in pixels.
        gamma: range of the exponent on values from 0 to 255, for half of the training crops.
        brightness: range of the factor on these crops.
        colour: range of the factor on each of their channels.
        flip_test: average the predictions for a photo and its mirror image.
        normalisation: the model's own, or ImageNet's for every model, as in the published evaluation.
        pads: cut the pads off, or stretch the patch grid over the crop as if there were no pads, as in the released
            code.
        size: without crops, height and width of the model's input; None for the image's own, rounded to the patch grid.
    """

    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    gradient_limit: float | None = 35.0
    cycle: bool = True
    bins: int = 256
    nearest: float = 0.001
    farthest: float = 10.0
    class_token: bool = True
    upsample: int = 4
    gradient: float = 0.5
    together: int | None = None
    mean_first: int = 100
    augment: bool = True
    rotate: float = 2.5
    flip: float = 0.5
    crop: tuple[int, int] = (416, 544)
    gamma: tuple[float, float] = (0.9, 1.1)
    brightness: tuple[float, float] = (0.75, 1.25)
    colour: tuple[float, float] = (0.9, 1.1)
    flip_test: bool = True
    normalisation: Literal["own", "imagenet"] = "imagenet"
    pads: Pads = "cut"
    size: int | tuple[int, int] | None = None

    def learning_rate_at(self, step: int) -> float:
        """Cosine decay over all steps, times a warm-up that starts at a thousandth of the rate."""
        last = self.learning_rate * _RATE_END
        falling = last + (self.learning_rate - last) * (1 + math.cos(math.pi * step / self.steps)) / 2
        return warmed(falling, step, self.warmup, _WARMUP_START)

    def momentum_at(self, step: int) -> float:
        """AdamW's first beta of a step; it varies in one cycle if ``cycle`` is True."""
        if not self.cycle:
            return super().momentum_at(step)
        high, low = _MOMENTUM
        turn = max(_MOMENTUM_TURN * self.steps - 1, 1e-9)
        if step <= turn:
            return _eased(high, low, step / turn)
        return _eased(low, high, (step - turn) / max(self.steps - 1 - turn, 1e-9))


def _eased(start: float, end: float, done: float) -> float:
    """Cosine interpolation between two values."""
    return end + (start - end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


PAPER = DepthProtocol("paper", steps=38_400, warmup=12_800)

#: Protocol of the released code: two images on each of eight devices, and a gradient loss that is always 0.
RELEASED = replace(PAPER, gradient=0.0, together=2, pads="stretched")

#: The same probe on features of whole images, with one prediction per patch in training and the same warm-up fraction.
#: Small batches and a higher learning rate reach a lower loss in a minute than the published settings
#: (docs/decisions.md).
QUICK = DepthProtocol(
    "quick",
    steps=400,
    warmup=133,
    batch=4,
    learning_rate=2e-2,
    cycle=False,
    mean_first=0,
    augment=False,
    rotate=0.0,
    flip=0.0,
    flip_test=False,
    normalisation="own",
)


@dataclass(frozen=True)
class DepthOptions(ProbeOptions):
    """Options of the linear probe; omitted options take the preset's value.

    Attributes:
        farthest: depth of the last bin in metres; farther pixels are not evaluated.
        gradient: weight of the gradient loss; 0 as in the published code, where the term is always 0.
    """

    farthest: float = 10.0
    gradient: float = 0.5

    def protocol(self) -> DepthProtocol:
        """The preset with the given options; PlanError if one is out of range."""
        base = PAPER if self.preset == "paper" else QUICK
        settled = self.applied(base, "crops of 416 x 544 pixels, and whole photos")
        if not 0 <= self.gradient < math.inf:
            raise PlanError(f"gradient must be at least 0, got {self.gradient}")
        if not base.nearest < self.farthest < math.inf:
            raise PlanError(f"farthest must be a depth of more than {base.nearest} m, got {self.farthest}")
        return replace(settled, farthest=self.farthest, gradient=self.gradient)
