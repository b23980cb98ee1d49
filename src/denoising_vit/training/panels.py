"""Pictures of held-out images: raw features, the denoiser's, and what it is to give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from denoising_vit.files import atomic_path
from denoising_vit.training.pairs import KeptPairs
from denoising_vit.training.samples import Sample, whole_view
from denoising_vit.training.targets import Targets
from denoising_vit.visualize import PCABasis, draw_rows

#: Images on a panel.
_SHOWN = 4


@dataclass
class HeldOutPanel:
    """Draws the same held-out images after each evaluation.

    Attributes:
        folder: where pictures go.
        targets: where the photos are.
        pairs: raw features and targets.
        images: that are held out.
        ids: names of all images.
    """

    folder: Path
    targets: Targets
    pairs: KeptPairs
    images: Sequence[int]
    ids: Sequence[str]

    @torch.no_grad()
    def draw(self, denoiser: Callable[[Tensor], Tensor], step: int) -> None:
        """Writes ``step-N.png``: a row an image, all features of a row in one PCA basis.

        Raises:
            PhotoError: if a photo is gone.
            OSError: if it cannot be written.
        """
        shown = list(self.images[:_SHOWN])
        device = next(iter(denoiser.parameters())).device if isinstance(denoiser, torch.nn.Module) else None
        rows = []
        for image in shown:
            raw, target = self.pairs.read([Sample(image, 0, 0, whole_view((1, 1), mirrored=False))])
            clean = denoiser(raw.to(device)).cpu()
            maps = [raw[0], clean[0], target[0]]
            basis = PCABasis.fit(*maps)
            rows.append((self.ids[image], [self.targets.photo(image), *(basis.colours(features) for features in maps)]))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:07}.png"
        with atomic_path(path) as temporary:
            draw_rows(("photo", "raw", f"denoiser, step {step}", "F (target)"), rows, temporary)
