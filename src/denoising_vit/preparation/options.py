"""Options of the preparation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from denoising_vit.backbones.catalog import Dtype
from denoising_vit.errors import PlanError, require_at_least


@dataclass(frozen=True)
class PrepareOptions:
    """Steps and options of the preparation of each backbone.

    Attributes:
        sample: number of photos for everything except the denoiser, spread evenly over the data set; 0 uses all.
        size: height and width of the images in pixels. Defaults to each backbone's own.
        denoiser: train a denoiser on all photos; at least a hundred, preferably several hundred. Needs the extra
            `train`.
        steps: number of training steps of the denoiser.
        batch_size: views per training step.
        learning_rate: peak learning rate, multiplied by sqrt(batch_size / 256); the default gives 0.001, as for the
            denoiser in the package.
        seed: seed for crops, probes and training.
        weights: weights of the backbones, as in the other verbs.
        device: auto, cpu, cuda, cuda:1, mps.
        dtype: auto is bfloat16 if the hardware is fast at it, else float32.
    """

    sample: int = 64
    size: int | None = None
    denoiser: bool = True
    steps: int = 2500
    batch_size: int = 32
    learning_rate: float = 0.0028
    seed: int = 0
    weights: str = "auto"
    device: str = "auto"
    dtype: Dtype = "auto"

    def validate(self) -> None:
        """Check the range of every option.

        Raises:
            PlanError: with the option, its range and its value.
        """
        least = {"sample": 0, "size": 1, "steps": 1, "batch_size": 1, "learning_rate": 0, "seed": 0}
        require_at_least(self, least, PlanError)

    def recorded(self) -> dict[str, Any]:
        """Options that determine the files; training options only with training, so that it can be added later."""
        training = () if self.denoiser else ("steps", "batch_size", "learning_rate")
        return {name: value for name, value in asdict(self).items() if name not in ("denoiser", "device", *training)}
