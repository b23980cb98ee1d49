"""Whether an export computes what PyTorch does: features of fixed images, kept beside it and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from denoising_vit.backbones.fingerprint import synthetic_image

#: Features, and prefix tokens where the export gives them.
Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]

#: Images that features are compared on: how many, and the patches down and across.
CHECKED = ((2, 4, 5), (1, 9, 6), (1, 7, 7))

#: The largest difference of a feature, relative to features of unit root mean square where theirs is larger.
TOLERANCES = {"timm": 1e-4, "huggingface": 1e-4, "safetensors": 1e-4, "program": 1e-4, "onnx": 1e-3}

#: How much the mean cosine of int8 may differ from what was measured when it was made: processors round differently.
INT8_SLACK = 0.005


@dataclass(frozen=True)
class Comparison:
    """How far two runs of the same images are apart.

    Attributes:
        difference: the largest of all features and prefix tokens, absolute.
        scale: root mean square of the reference, at least 1.
        cosine: mean cosine of features, over patches and images.
        least_cosine: that of the worst patch.
    """

    difference: float
    scale: float
    cosine: float
    least_cosine: float

    @property
    def relative(self) -> float:
        """The largest difference, relative to the scale."""
        return self.difference / self.scale


def check_image(batch: int, height: int, width: int, *, pixels: bool) -> Tensor:
    """Fixed images (B, 3, H, W) made without a random generator: normalised, or in [0, 1]."""
    waves = synthetic_image(max(height, width))[..., :height, :width]
    others = [waves * (1 - 0.3 * index) if index % 2 == 0 else waves.flip(-1) for index in range(batch)]
    images = torch.cat(others)
    return ((images + 2) / 4).clamp(0, 1) if pixels else images


def record(run: Run, sizes: Sequence[Sequence[int]], *, pixels: bool) -> dict[str, Tensor]:
    """What a run gives for the images of these sizes (B, H, W), as tensors of a file."""
    kept = {}
    for index, (batch, height, width) in enumerate(sizes):
        features, prefix = run(check_image(batch, height, width, pixels=pixels))
        kept[f"features_{index}"] = features.detach().float().cpu().contiguous()
        if prefix is not None:
            kept[f"prefix_{index}"] = prefix.detach().float().cpu().contiguous()
    return kept


def compare(reference: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Comparison | None:
    """How far they are apart; None where they are not of the same things, or not finite."""
    if reference.keys() != found.keys() or not reference:
        return None
    pairs = [(reference[name], found[name]) for name in reference]
    if any(theirs.shape != ours.shape or not torch.isfinite(ours).all() for theirs, ours in pairs):
        return None
    cosines = torch.cat(
        [
            cosine_similarity(reference[name], found[name], dim=-1).flatten()
            for name in reference
            if name.startswith("features")
        ]
    )
    squares = torch.cat([theirs.flatten() for theirs, _ in pairs]).square().mean()
    return Comparison(
        difference=max(float((theirs - ours).abs().max()) for theirs, ours in pairs if theirs.numel()),
        scale=max(float(squares.sqrt()), 1.0),
        cosine=float(cosines.mean()),
        least_cosine=float(cosines.min()),
    )
