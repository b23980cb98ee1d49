"""How a linear probe for segmentation is trained and judged: the published protocol, and a quick one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from denoising_vit.evaluation.options import Pads, Preset, ProbeOptions, warmed


@dataclass(frozen=True)
class Protocol:
    """Training and judging of a linear probe: batch norm and a 1 x 1 convolution, on cross-entropy.

    Numbers without a source are those of the published evaluation (that of DINOv2, in mmsegmentation).

    Attributes:
        preset: what it started from.
        steps: of AdamW.
        batch: images a step.
        learning_rate: at its highest.
        weight_decay: of AdamW.
        warmup: steps of linear warm-up, from a millionth.
        augment: whether every step sees random crops, forward passes and all; without it, features of whole images are
            taken once.
        short_side: pixels that an image's shorter side is scaled to, before the random scale.
        long_side: pixels that its longer side must not exceed then.
        scale: least and largest random scale.
        crop: side of a training crop in pixels.
        most: largest share that one class may have of a crop's labels; ten crops are tried.
        flip: probability of a horizontal flip.
        distort: whether brightness, contrast, saturation and hue are changed at random.
        window: side in pixels of the windows that test images are cut into.
        window_stride: distance between these windows in pixels.
        normalisation: of images: the model's own, or ImageNet's for every model, as in the published evaluation.
        pads: scores are brought to the pixels where the patches are, and pads are cut off; or the patch grid is
            stretched over the crop as if there were no pads, as the released code does.
        size: without crops: height and width at which images are shown; None is their own, rounded to the patch grid.
    """

    preset: Preset
    steps: int
    warmup: int
    batch: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    augment: bool = True
    short_side: int = 512
    long_side: int = 2048
    scale: tuple[float, float] = (0.5, 2.0)
    crop: int = 512
    most: float = 0.75
    flip: float = 0.5
    distort: bool = True
    window: int = 512
    window_stride: int = 341
    normalisation: Literal["own", "imagenet"] = "imagenet"
    pads: Pads = "cut"
    size: int | tuple[int, int] | None = None

    @property
    def gradient_limit(self) -> None:
        """None: gradients are taken as they are."""

    def momentum_at(self, step: int) -> float:
        """AdamW's first beta, always its default."""
        return 0.9

    def learning_rate_at(self, step: int) -> float:
        """The rate of a step, 0 to steps - 1: falling linearly to 0, times the warm-up."""
        falling = self.learning_rate * (1 - step / self.steps)
        return warmed(falling, step, self.warmup, _WARMUP_START)


#: Share of the learning rate that the warm-up begins with.
_WARMUP_START = 1e-6

PAPER = Protocol("paper", steps=40_000, warmup=1_500)

#: What the released code runs.
RELEASED = replace(PAPER, pads="stretched")

#: The same probe on features of whole images, with the same share of warm-up. With ten times the learning rate it is
#: within a point of where four times as many steps take it; with the published one, not (docs/decisions.md).
QUICK = Protocol("quick", steps=1_500, warmup=56, learning_rate=1e-2, augment=False, normalisation="own")


@dataclass(frozen=True)
class SegmentationOptions(ProbeOptions):
    """How the linear probe is trained; what is not given is the preset's."""

    def protocol(self) -> Protocol:
        """The preset with what was changed.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        base = PAPER if self.preset == "paper" else QUICK
        return self.applied(base, "crops of 512 pixels of images scaled to that side")
