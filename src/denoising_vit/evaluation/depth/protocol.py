"""How a linear probe for depth is trained and judged: the published protocol, and a quick one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from denoising_vit.errors import PlanError
from denoising_vit.evaluation.options import Pads, Preset, ProbeOptions, warmed

#: Share of the learning rate that the warm-up begins with, and share of it that is left at the end.
_WARMUP_START, _RATE_END = 1e-3, 1e-8

#: AdamW's first beta falls from the larger to the smaller value over this share of the steps, then rises again.
_MOMENTUM, _MOMENTUM_TURN = (0.95, 0.85), 0.3


@dataclass(frozen=True)
class DepthProtocol:
    """Training and judging of a linear probe: weights of depth bins, whose mean is the depth.

    Numbers without a source are those of the published evaluation (that of DINOv2, in mmsegmentation).

    Attributes:
        preset: what it started from.
        steps: of AdamW.
        warmup: steps of linear warm-up, from a thousandth.
        batch: images a step.
        learning_rate: at its highest.
        weight_decay: of AdamW.
        gradient_limit: largest norm of the gradients.
        cycle: whether AdamW's first beta falls and rises in one cycle, as published; else it stays at 0.9.
        bins: evenly spaced depths.
        nearest: depth in metres of the first bin; nearer pixels are not judged.
        farthest: of the last bin; farther pixels are not judged.
        class_token: whether the class token is set beside the features of each patch.
        upsample: times by which features are upsampled before bins are weighed.
        gradient: weight of the gradient loss beside the scale-invariant one. The published code's own comes to nothing
            (docs/decisions.md).
        together: images whose errors the scale-invariant loss takes together, the loss being the mean over such
            groups; None for all images of a step.
        mean_first: steps in which the scale-invariant loss looks at the mean error alone.
        augment: whether every step sees random crops, forward passes and all; without it, features of whole images are
            taken once.
        rotate: largest angle in degrees by which half of the training photos are turned.
        flip: probability that a training crop is mirrored.
        crop: height and width of a training crop in pixels.
        gamma: least and largest exponent of the colours of half of the training crops (of values 0 to 255).
        brightness: least and largest factor on them.
        colour: least and largest factor on each channel.
        flip_test: whether the prediction is the mean of that of a photo and that of its mirror image.
        normalisation: of images: the model's own, or ImageNet's for every model, as in the published evaluation.
        pads: depth is brought to the pixels where the patches are, and pads are cut off; or the patch grid is stretched
            over the crop as if there were no pads, as the released code does.
        size: without crops: height and width at which images are shown; None is their own, rounded to the patch grid.
    """

    preset: Preset
    steps: int
    warmup: int
    batch: int = 16
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    gradient_limit: float = 35.0
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
        """The rate of a step, 0 to steps - 1: half a cosine over all steps, times the warm-up."""
        last = self.learning_rate * _RATE_END
        falling = last + (self.learning_rate - last) * (1 + math.cos(math.pi * step / self.steps)) / 2
        return warmed(falling, step, self.warmup, _WARMUP_START)

    def momentum_at(self, step: int) -> float:
        """AdamW's first beta in a step, 0 to steps - 1."""
        if not self.cycle:
            return 0.9
        high, low = _MOMENTUM
        turn = max(_MOMENTUM_TURN * self.steps - 1, 1e-9)
        if step <= turn:
            return _eased(high, low, step / turn)
        return _eased(low, high, (step - turn) / max(self.steps - 1 - turn, 1e-9))


def _eased(start: float, end: float, done: float) -> float:
    """Between two values by half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


PAPER = DepthProtocol("paper", steps=38_400, warmup=12_800)

#: What the released code runs: two images on each of eight devices, a gradient loss that is always 0.
RELEASED = replace(PAPER, gradient=0.0, together=2, pads="stretched")

#: The same probe on features of whole images, one prediction a patch in training, with the same share of warm-up. Few
#: images a step and a higher rate take its loss lower in a minute than the published ones (docs/decisions.md).
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
    """How the linear probe is trained; what is not given is the preset's.

    Attributes:
        farthest: depth in metres of the last bin; pixels that are farther are not judged.
        gradient: weight of the gradient loss; 0 does what the published code does, whose term is always 0.
    """

    farthest: float = 10.0
    gradient: float = 0.5

    def protocol(self) -> DepthProtocol:
        """The preset with what was changed.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        base = PAPER if self.preset == "paper" else QUICK
        settled = self.applied(base, "crops of 416 x 544 pixels, and whole photos")
        if not 0 <= self.gradient < math.inf:
            raise PlanError(f"gradient must be 0 or more, got {self.gradient}")
        if not base.nearest < self.farthest < math.inf:
            raise PlanError(f"farthest must be a depth of more than {base.nearest} m, got {self.farthest}")
        return replace(settled, farthest=self.farthest, gradient=self.gradient)
