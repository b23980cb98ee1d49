"""Pictures of held-out images: raw features, the denoiser's, and what it is to give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from denoising_vit.denoiser.pairs import KeptPairs
from denoising_vit.denoiser.targets import Targets
from denoising_vit.errors import TrainError
from denoising_vit.files import atomic_path
from denoising_vit.maps import PCABasis, draw_rows
from denoising_vit.training.samples import Sample, whole_view

#: Images on a panel.
SHOWN = 4


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
            TrainError: if it cannot be written.
        """
        device = next(iter(denoiser.parameters())).device if isinstance(denoiser, torch.nn.Module) else None
        rows = []
        for image in self.images[:SHOWN]:
            raw, target = self.pairs.read([Sample(image, 0, 0, whole_view((1, 1), mirrored=False))])
            clean = denoiser(raw.to(device)).cpu()
            rows.append((self.ids[image], self.targets.photo(image), (raw[0], clean[0], target[0])))
        draw_panel(self.folder, step, ("raw", f"denoiser, step {step}", "F (target)"), rows)


def draw_panel(
    folder: Path, step: int, headings: Sequence[str], rows: Sequence[tuple[str, np.ndarray, Sequence[Tensor]]]
) -> None:
    """Writes ``step-N.png``: a row an image, all features of a row in one PCA basis.

    Args:
        folder: made where it does not exist.
        step: N.
        headings: of the features.
        rows: name, pixels (H, W, 3) uint8, and features (h, w, C) of each image.

    Raises:
        TrainError: if it cannot be written.
    """
    pictures = []
    for name, photo, maps in rows:
        basis = PCABasis.fit(*maps)
        pictures.append((name, [photo, *(basis.colours(features) for features in maps)]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / f"step-{step:07}.png") as temporary:
            draw_rows(headings, pictures, temporary)
    except OSError as error:
        raise TrainError(f"{folder}: a panel cannot be written ({error}); --resume goes on") from error
