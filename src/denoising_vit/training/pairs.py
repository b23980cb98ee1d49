"""Training pairs: raw features of views and F at their patches, kept on disk or made when they are asked for."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.crops import Crop
from denoising_vit.errors import TrainError
from denoising_vit.extraction import fitting_batch
from denoising_vit.files import atomic_path
from denoising_vit.training.options import PairOptions
from denoising_vit.training.samples import Sample, kept_view
from denoising_vit.training.targets import Fitted, StoredTargets, Targets, Unusable

#: What became of an image.
_TO_DO, _DONE, _UNUSABLE = 0, 1, 2

#: The file that tells why images have no pairs.
_REASONS = "unusable.jsonl"

#: Fields and photos that fresh pairs hold in memory.
_HELD = 512


class KeptPairs:
    """The views that are kept of images: raw features and targets in float16, in plain files.

    Filling goes on where it was stopped. Several processes fill different images of the same files.

    Args:
        folder: where they are.
        targets: images and fields.
        images: indices of those whose views are kept.
        backbone: the extractor, frozen.
        sizes: (H, W) of the views.
        views: which views; ``keep`` of each image and size.
        seed: of the views.

    Raises:
        TrainError: if the folder holds other pairs, or there is no room for these.
    """

    def __init__(
        self,
        folder: Path,
        targets: Targets,
        images: Sequence[int],
        backbone: Backbone,
        sizes: Sequence[tuple[int, int]],
        views: PairOptions,
        seed: int,
    ) -> None:
        self.folder, self._targets, self._backbone = folder, targets, backbone
        self.images = tuple(images)
        self._rows = {image: row for row, image in enumerate(self.images)}
        self._sizes, self._views, self._seed = tuple(sizes), views, seed
        self._grids = [backbone.grid_size(*size) for size in self._sizes]
        self._state: np.memmap | None = None
        self._arrays: list[tuple[np.memmap, np.memmap]] = []

    @property
    def keep(self) -> int:
        """Views of each image and size."""
        return self._views.keep

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the pairs; JSON values. How often whole images are drawn does not."""
        views = {name: value for name, value in asdict(self._views).items() if name not in ("whole", "sizes")}
        mine = {
            "backbone": backbone_identity(self._backbone),
            "targets": self._targets.identity,
            "images": len(self.images),
            "sizes": [list(size) for size in self._sizes],
            "views": views,
            "seed": self._seed,
        }
        return json.loads(json.dumps(mine))

    @property
    def bytes(self) -> int:
        """Of all pairs, when they are there."""
        values = sum(math.prod(grid) for grid in self._grids) * self._backbone.embed_dim
        return 2 * 2 * len(self.images) * self._views.keep * values

    def open(self, *, create: bool) -> None:
        """Opens the files, or makes them; only one process may make them.

        Raises:
            TrainError: if the folder holds other pairs, or there is no room.
            OSError: if it cannot be written to.
        """
        head = self.folder / "pairs.json"
        there = head.is_file()
        if there:
            self._require_same(head)
        elif create:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if self.bytes > free:
                raise TrainError(
                    f"{self.folder}: the features of {self._views.keep} views of {len(self.images)} images take "
                    f"{self.bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; keep fewer views (--pairs.keep), or "
                    "name another place (--cache)"
                )
        self._open("r+" if there or not create else "w+")
        if not there and create:
            with atomic_path(head) as temporary:
                temporary.write_text(json.dumps(self.identity, indent=1))

    def _open(self, mode: Literal["r+", "w+"]) -> None:
        images, keep, channels = len(self.images), self._views.keep, self._backbone.embed_dim

        def opened(name: str, kind: type, shape: tuple[int, ...]) -> np.memmap:
            path, size = self.folder / name, math.prod(shape) * np.dtype(kind).itemsize
            if mode == "r+" and (not path.is_file() or path.stat().st_size != size):  # it would be filled up with zeros
                raise TrainError(f"{path}: damaged, expected {size} bytes; remove {self.folder} to compute them anew")
            return np.memmap(path, kind, mode, shape=shape)

        self._state = opened("state.u8", np.uint8, (images,))
        self._arrays = []
        for place, (h, w) in enumerate(self._grids):
            names = (f"{kind}-{place}-{h}x{w}.f16" for kind in ("raw", "target"))
            raw, target = (opened(name, np.float16, (images, keep, h, w, channels)) for name in names)
            self._arrays.append((raw, target))

    def todo(self) -> list[int]:
        """The images whose pairs are not there yet."""
        return [image for image, row in self._rows.items() if self._opened[row] == _TO_DO]

    def usable(self) -> tuple[int, ...]:
        """The images that have pairs."""
        return tuple(image for image, row in self._rows.items() if self._opened[row] == _DONE)

    def unusable(self) -> dict[str, str]:
        """Why images have no pairs, by id; of this run and of those before it."""
        path = self.folder / _REASONS
        return dict(map(json.loads, path.read_text(encoding="utf-8").splitlines())) if path.is_file() else {}

    def fill(self, images: Sequence[int], on_image: Callable[[int, str | None], None]) -> None:
        """Sees the views of images, and keeps their pairs.

        Args:
            images: which of them; not those that are there already.
            on_image: called after each with its index, and why it cannot be used or None.

        Raises:
            TrainError: if a target is missing, or features are not finite.
            OSError: if the files cannot be written to.
        """
        for result in self._targets.stream(images):
            if isinstance(result, Unusable):
                with (self.folder / _REASONS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps([self._targets.ids[result.index], result.reason]) + "\n")
                self._opened[self._rows[result.index]] = _UNUSABLE
                on_image(result.index, result.reason)
                continue
            for place, size in enumerate(self._sizes):
                self._keep(result, place, size)
            self._opened[self._rows[result.index]] = _DONE
            on_image(result.index, None)

    def read(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Raw features and targets (B, h, w, C) float32 of samples of one size."""
        raw, target = self._arrays[samples[0].size]
        places = [(self._rows[sample.image], sample.number) for sample in samples]
        return _stacked(raw, places), _stacked(target, places)

    def features(self, raw: Tensor) -> Tensor:
        """What :meth:`read` gave first are features already."""
        return raw

    @property
    def _opened(self) -> np.memmap:
        assert self._state is not None, "open() comes first"
        return self._state

    def _keep(self, fitted: Fitted, place: int, size: tuple[int, int]) -> None:
        name = self._targets.ids[fitted.index]
        crops = [kept_view(self._seed, fitted.index, n, size, self._views) for n in range(self._views.keep)]
        raw, target = self._arrays[place]
        row = self._rows[fitted.index]
        raw[row] = _half(see(self._backbone, fitted.image, crops), name, "features")
        target[row] = _half(sampled(fitted.field, crops, self._backbone), name, "target")

    def _require_same(self, head: Path) -> None:
        there = read_object(head)
        if there is None:
            raise TrainError(
                f"{head}: damaged (expected a JSON object); remove {self.folder}, its features are computed anew"
            )
        if different := differences(there, self.identity):
            raise TrainError(
                f"{self.folder} holds other pairs: {'; '.join(different)}. Name another place (--cache), or remove it"
            )


class FreshPairs:
    """Pairs of new views: photos and fields are read ahead, the backbone runs in every step.

    Args:
        targets: of a store.
        backbone: the extractor, frozen.
    """

    def __init__(self, targets: StoredTargets, backbone: Backbone) -> None:
        self._backbone = backbone
        self._fitted = lru_cache(_HELD)(targets.at)

    def read(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Rendered views (B, 3, H, W), normalised, and targets (B, h, w, C) float32 of samples of one size."""
        images, target = [], []
        for sample in samples:
            fitted = self._fitted(sample.image)
            images.append(sample.crop.render(fitted.image, self._backbone.mean, self._backbone.std))
            target.append(sampled(fitted.field, [sample.crop], self._backbone)[0])
        return torch.stack(images), torch.stack(target)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Raw features (B, h, w, C) float32 of rendered views."""
        return self._backbone(images)


Pairs = KeptPairs | FreshPairs


@torch.no_grad()
def see(backbone: Backbone, image: Tensor, crops: Sequence[Crop]) -> Tensor:
    """Raw features (V, h, w, C) float32, on the CPU, of crops of one size of an image (3, H, W) in [0, 1]."""
    batch = fitting_batch(backbone.device, math.prod(backbone.grid_size(*crops[0].padded)))
    image = image.to(backbone.device)
    shown = [crop.render(image, backbone.mean, backbone.std) for crop in crops]
    return torch.cat([backbone(torch.stack(shown[at : at + batch])).cpu() for at in range(0, len(shown), batch)])


def sampled(field: Tensor, crops: Sequence[Crop], backbone: Backbone) -> Tensor:
    """F at the patches of crops of one size, (V, h, w, C) float32."""
    return torch.stack([crop.sample(field.float(), backbone.patch_size, backbone.stride) for crop in crops])


def backbone_identity(backbone: Backbone) -> dict[str, Any]:
    """What of a backbone decides its features; JSON values."""
    told = {name: getattr(backbone, name) for name in ("name", "layer", "norm", "stride")}
    return told | {"fingerprint": backbone.fingerprint.short, "dtype": str(backbone.dtype).removeprefix("torch.")}


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where it holds none."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def differences(there: dict[str, Any], here: dict[str, Any], path: str = "") -> list[str]:
    """Each value in which two records differ, with both sides."""
    found = []
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{path}{name}.")
        elif old != new:
            found.append(f"{path}{name} was {_short(old)}, now {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _stacked(array: np.memmap, places: Sequence[tuple[int, int | None]]) -> Tensor:
    return torch.from_numpy(np.stack([array[place] for place in places])).float()


def _half(features: Tensor, name: str, what: str) -> np.ndarray:
    half = features.half()
    if not torch.isfinite(half).all():
        raise TrainError(f"{name}: {what} that are not finite, or too large for float16; none were trained on")
    return half.numpy()
