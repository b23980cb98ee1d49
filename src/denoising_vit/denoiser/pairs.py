"""Training pairs that are kept on disk: raw features of views, and F at their patches."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import weights_key
from denoising_vit.decomposition.inputs import fitting_batch
from denoising_vit.denoiser.options import PairOptions
from denoising_vit.denoiser.targets import Fitted, Targets, Unusable
from denoising_vit.errors import TrainError
from denoising_vit.files import atomic_path
from denoising_vit.training.pair_files import HEAD, NO_ROOM, STATE, RowWriter, read_reasons, reserve, write_reason
from denoising_vit.training.run_folder import differences, held, read_object
from denoising_vit.training.samples import Sample, kept_view
from denoising_vit.views.crops import Crop

#: What became of an image.
_TO_DO, _DONE, _UNUSABLE = 0, 1, 2

#: What is told of an image that has no pairs where the reason is gone.
_UNTOLD = "it could not be used; what was noted of why is gone"


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
        self._state: np.ndarray | None = None
        self._told: dict[str, str] = {}
        self._arrays: list[tuple[np.memmap, np.memmap]] = []

    @property
    def keep(self) -> int:
        """Views of each image and size."""
        return self._views.keep

    @property
    def crops(self) -> range:
        """Numbers of those that are crops."""
        return range(self._views.wholes, self.keep)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the pairs; JSON values. How often whole images are drawn does not."""
        views = {name: value for name, value in asdict(self._views).items() if name not in ("whole", "sizes")}
        if not self._views.flip:
            views["wholes"] = self._views.wholes  # there used to be a mirrored one whatever was asked for
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
        """Opens the files for reading, or makes them; only one process may make them.

        What other machines have written before is seen: network file systems look again when a file is opened.

        Raises:
            TrainError: if the folder holds other pairs, or there is no room.
            OSError: if it cannot be written to.
        """
        head = self.folder / HEAD
        if head.is_file():
            self._require_same(head)
        elif create:
            with held(self.folder, "pairs"):
                if not head.is_file():
                    self._make()
                    with atomic_path(head, new=True) as temporary:
                        temporary.write_text(json.dumps(self.identity, indent=1))
        state, *arrays = (self._mapped(*file) for file in self._files())
        self._state, self._told = np.array(state), {}
        self._arrays = list(zip(arrays[::2], arrays[1::2], strict=True))

    def _files(self) -> Iterator[tuple[Path, type, tuple[int, ...]]]:
        """Path, type and shape of the state, then of raw features and targets (N, keep, h, w, C) of each size."""
        images, keep, channels = len(self.images), self._views.keep, self._backbone.embed_dim
        yield self.folder / STATE, np.uint8, (images,)
        for place, (h, w) in enumerate(self._grids):
            for kind in ("raw", "target"):
                yield self.folder / f"{kind}-{place}-{h}x{w}.f16", np.float16, (images, keep, h, w, channels)

    def _make(self) -> None:
        """Makes the files, empty, with their room on the disk."""
        self._require_leftovers()
        files = [(path, math.prod(shape) * np.dtype(kind).itemsize) for path, kind, shape in self._files()]
        for path, _ in files:
            path.unlink(missing_ok=True)  # of a process that was killed just here
        free = shutil.disk_usage(self.folder).free
        if self.bytes > free:
            raise self._no_room(f"{free / 1e9:.1f} GB are free")
        try:
            for path, size in files:
                reserve(path, size)
        except OSError as error:
            for path, _ in files:
                path.unlink(missing_ok=True)
            if error.errno not in NO_ROOM:
                raise
            raise self._no_room(f"which are not free ({error.strerror})") from error

    def _require_leftovers(self) -> None:
        """Refuses files of these names that a process which was stopped here did not leave: its state is all zeros.

        Raises:
            TrainError: naming the folder and a file.
        """
        there = [path for path, *_ in self._files() if os.path.lexists(path)]
        state = self.folder / STATE
        if there and not (state.is_file() and not any(state.read_bytes())):
            raise TrainError(
                f"{self.folder} holds {there[0].name} and no {HEAD}, so it is not known whose features they are; name "
                "another place (--cache), or move them away"
            )

    def _no_room(self, why: str) -> TrainError:
        return TrainError(
            f"{self.folder}: the features of {self._views.keep} views of {len(self.images)} images take "
            f"{self.bytes / 1e9:.1f} GB, {why}; keep fewer views (--pairs.keep), or name another place (--cache)"
        )

    def _mapped(self, path: Path, kind: type, shape: tuple[int, ...]) -> np.memmap:
        size = math.prod(shape) * np.dtype(kind).itemsize
        if not path.is_file() or path.stat().st_size != size:  # it would be filled up with zeros
            raise TrainError(f"{path}: damaged, expected {size} bytes; remove {self.folder} to compute them anew")
        return np.memmap(path, kind, "r", shape=shape)

    def todo(self) -> list[int]:
        """The images whose pairs are not there yet."""
        return [image for image, row in self._rows.items() if self._opened[row] == _TO_DO]

    def usable(self) -> tuple[int, ...]:
        """The images that have pairs."""
        return tuple(image for image, row in self._rows.items() if self._opened[row] == _DONE)

    def unusable(self) -> dict[str, str]:
        """Why images have no pairs, by id; of this run and of those before it."""
        reasons, ids = read_reasons(self.folder), self._targets.ids
        reasons |= self._told
        names = [ids[image] for image, row in self._rows.items() if self._opened[row] == _UNUSABLE]
        return {name: reasons.get(name, _UNTOLD) for name in names}

    def fill(self, images: Sequence[int], on_image: Callable[[], None] = lambda: None) -> None:
        """Sees the views of images, and keeps their pairs.

        Args:
            images: which of them; not those that are there already.
            on_image: called after each.

        Raises:
            TrainError: if a target is missing, or features are not finite.
            OSError: if the files cannot be written to.
        """
        with RowWriter([path for path, *_ in self._files()]) as writer:
            for result in self._targets.stream(images):
                row = self._rows[result.index]
                if isinstance(result, Unusable):
                    name = self._targets.ids[result.index]
                    write_reason(self.folder, name, result.reason)
                    self._told[name], mark = result.reason, _UNUSABLE
                else:
                    halves = [half for place, size in enumerate(self._sizes) for half in self._halves(result, size)]
                    writer.write(row, halves)
                    mark = _DONE
                writer.mark(row, mark)
                self._opened[row] = mark
                on_image()

    def marks(self) -> tuple[dict[int, int], dict[str, str]]:
        """What this process knows: what became of each image that is not to do any more, by row, and why some failed.

        Processes exchange it (:meth:`adopt`) instead of reading it from files that others write.
        """
        return {row: int(mark) for row, mark in enumerate(self._opened) if mark != _TO_DO}, dict(self._told)

    def adopt(self, marks: dict[int, int], told: dict[str, str]) -> None:
        """Takes what all processes know together."""
        for row, mark in marks.items():
            self._opened[row] = mark
        self._told |= told

    def read(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Raw features and targets (B, h, w, C) float32 of samples of one size."""
        raw, target = self._arrays[samples[0].size]
        places = [(self._rows[sample.image], sample.number) for sample in samples]
        return _stacked(raw, places), _stacked(target, places)

    def features(self, raw: Tensor) -> Tensor:
        """What :meth:`read` gave first are features already."""
        return raw

    @property
    def _opened(self) -> np.ndarray:
        assert self._state is not None, "open() comes first"
        return self._state

    def _halves(self, fitted: Fitted, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Raw features and target (keep, h, w, C) float16 of an image at one size."""
        name = self._targets.ids[fitted.index]
        crops = [kept_view(self._seed, fitted.index, n, size, self._views) for n in range(self._views.keep)]
        yield _half(see(self._backbone, fitted.image, crops), name, "features")
        yield _half(sampled(fitted.field, crops, self._backbone), name, "target")

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


@torch.no_grad()
def see(backbone: Backbone, image: Tensor, crops: Sequence[Crop]) -> Tensor:
    """Raw features (V, h, w, C) float32, on the CPU, of crops of one size of an image (3, H, W) in [0, 1]."""
    batch = fitting_batch(backbone.device, math.prod(backbone.grid_size(*crops[0].padded)))
    image = image.to(backbone.device)
    shown = [crop.render(image, backbone.mean, backbone.std) for crop in crops]
    return torch.cat([backbone(torch.stack(shown[at : at + batch])).cpu() for at in range(0, len(shown), batch)])


def sampled(field: Tensor, crops: Sequence[Crop], backbone: Backbone) -> Tensor:
    """F at the patches of crops of one size, (V, h, w, C) float32."""
    field = field.float()
    return torch.stack([crop.sample(field, backbone.patch_size, backbone.stride) for crop in crops])


def backbone_identity(backbone: Backbone) -> dict[str, Any]:
    """What of a backbone decides its features; JSON values."""
    told = {name: getattr(backbone, name) for name in ("name", "layer", "norm", "stride", "mean", "std")}
    weights = {"fingerprint": backbone.fingerprint.short, "digest": weights_key(backbone)}
    return told | weights | {"dtype": str(backbone.dtype).removeprefix("torch.")}


def _stacked(array: np.memmap, places: Sequence[tuple[int, int | None]]) -> Tensor:
    return torch.from_numpy(np.stack([array[place] for place in places])).float()


def _half(features: Tensor, name: str, what: str) -> np.ndarray:
    half = features.half()
    if not torch.isfinite(half).all():
        raise TrainError(f"{name}: {what} that are not finite, or too large for float16; none were trained on")
    return half.numpy()
