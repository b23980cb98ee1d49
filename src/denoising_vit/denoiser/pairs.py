"""Training pairs kept on disk: raw features of views, and F at their patches."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.decomposition.inputs import fitting_batch
from denoising_vit.denoiser.options import PairOptions
from denoising_vit.denoiser.targets import Fitted, Targets, Unusable
from denoising_vit.errors import TrainError
from denoising_vit.files import atomic_path
from denoising_vit.training.pair_files import HEAD, NO_ROOM, STATE, RowWriter, read_reasons, reserve, write_reason
from denoising_vit.training.run_folder import backbone_identity, differences, held, read_object
from denoising_vit.training.samples import Sample, kept_view

#: Status of an image.
_TO_DO, _DONE, _UNUSABLE = 0, 1, 2

_NO_REASON = "unusable; the reason was not recorded"


class KeptPairs:
    """The kept views of images: raw features and targets in float16, in plain files.

    An interrupted :meth:`fill` can be resumed. Several processes may fill different images in the same files.

    Args:
        folder: folder of the files.
        targets: photos and fields.
        images: indices of the images with kept views.
        backbone: the frozen backbone.
        sizes: (H, W) of the views.
        views: the views; ``keep`` per image and size.
        seed: seed for the views.
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
        self._reasons: dict[str, str] = {}
        self._arrays: list[tuple[np.memmap, np.memmap]] = []

    @property
    def crops(self) -> range:
        """Numbers of the kept views that are crops."""
        return range(self._views.wholes, self._views.keep)

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that determine the pairs, without the sampling frequency of whole images."""
        views = {name: value for name, value in asdict(self._views).items() if name not in ("whole", "sizes")}
        if not self._views.flip:
            views["wholes"] = self._views.wholes  # earlier versions kept a mirror image even without flips
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
        """Size of all pairs in bytes."""
        values = sum(math.prod(grid) for grid in self._grids) * self._backbone.embed_dim
        return 2 * 2 * len(self.images) * self._views.keep * values

    def open(self, *, create: bool) -> None:
        """Open the files for reading; on network file systems, only a new open shows rows written by other machines.

        Args:
            create: create missing files; only one process may do so.

        Raises:
            TrainError: if the folder has pairs of other settings, or the disk is full.
            OSError: if it cannot be written to.
        """
        head = self.folder / HEAD
        if head.is_file():
            self._require_same(head)
        elif create:
            with held(self.folder, "pairs"):
                if not head.is_file():
                    self._create()
                    with atomic_path(head, new=True) as temporary:
                        temporary.write_text(json.dumps(self.identity, indent=1))
        state, *arrays = (self._mapped(*file) for file in self._files())
        self._state, self._reasons = np.array(state), {}
        self._arrays = list(zip(arrays[::2], arrays[1::2], strict=True))

    def _files(self) -> Iterator[tuple[Path, type, tuple[int, ...]]]:
        """Path, type and shape of the status file, then of raw features and targets (N, keep, h, w, C) at each size."""
        images, keep, channels = len(self.images), self._views.keep, self._backbone.embed_dim
        yield self.folder / STATE, np.uint8, (images,)
        for place, (h, w) in enumerate(self._grids):
            for kind in ("raw", "target"):
                yield self.folder / f"{kind}-{place}-{h}x{w}.f16", np.float16, (images, keep, h, w, channels)

    def _create(self) -> None:
        """Create empty files with reserved disk space."""
        files = [(path, math.prod(shape) * np.dtype(kind).itemsize) for path, kind, shape in self._files()]
        existing, state = [path for path, _ in files if os.path.lexists(path)], self.folder / STATE
        # A process killed here leaves a status file of zeros.
        if existing and not (state.is_file() and not any(state.read_bytes())):
            raise TrainError(
                f"{self.folder} has {existing[0].name} but no {HEAD}, so its backbone is unknown; choose another "
                "folder (--cache), or move the files away"
            )
        for path in existing:
            path.unlink(missing_ok=True)
        free = shutil.disk_usage(self.folder).free
        if self.bytes > free:
            raise self._no_room(f"but only {free / 1e9:.1f} GB are free")
        try:
            for path, size in files:
                reserve(path, size)
        except OSError as error:
            for path, _ in files:
                path.unlink(missing_ok=True)
            if error.errno not in NO_ROOM:
                raise
            raise self._no_room(f"which is not available ({error.strerror})") from error

    def _no_room(self, why: str) -> TrainError:
        return TrainError(
            f"{self.folder}: the features of {self._views.keep} views of {len(self.images)} images take "
            f"{self.bytes / 1e9:.1f} GB, {why}; keep fewer views (--pairs.keep), or choose another folder (--cache)"
        )

    def _mapped(self, path: Path, kind: type, shape: tuple[int, ...]) -> np.memmap:
        size = math.prod(shape) * np.dtype(kind).itemsize
        if not path.is_file() or path.stat().st_size != size:  # memmap would extend it with zeros
            raise TrainError(f"{path}: damaged, expected {size} bytes; delete {self.folder} to compute it again")
        return np.memmap(path, kind, "r", shape=shape)

    def todo(self) -> list[int]:
        """Images without pairs."""
        return [image for image, row in self._rows.items() if self._opened[row] == _TO_DO]

    def usable(self) -> tuple[int, ...]:
        """Images with pairs."""
        return tuple(image for image, row in self._rows.items() if self._opened[row] == _DONE)

    def unusable(self) -> dict[str, str]:
        """Reasons why images are unusable, by id; also from earlier runs."""
        reasons, ids = read_reasons(self.folder) | self._reasons, self._targets.ids
        names = [ids[image] for image, row in self._rows.items() if self._opened[row] == _UNUSABLE]
        return {name: reasons.get(name, _NO_REASON) for name in names}

    def fill(self, images: Sequence[int], on_image: Callable[[], None] = lambda: None) -> None:
        """Compute and keep the pairs of images.

        Args:
            images: images without pairs.
            on_image: called after each image.

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
                    self._reasons[name], mark = result.reason, _UNUSABLE
                else:
                    halves = [half for size in self._sizes for half in self._halves(result, size)]
                    writer.write(row, halves)
                    mark = _DONE
                writer.mark(row, mark)
                self._opened[row] = mark
                on_image()

    def marks(self) -> tuple[dict[int, int], dict[str, str]]:
        """Status by row of all processed images, and reasons of failures by id.

        Processes exchange these values (:meth:`adopt`) instead of reading files that other machines write.
        """
        return {row: int(mark) for row, mark in enumerate(self._opened) if mark != _TO_DO}, dict(self._reasons)

    def adopt(self, marks: dict[int, int], reasons: dict[str, str]) -> None:
        """Add the status and reasons from another process."""
        for row, mark in marks.items():
            self._opened[row] = mark
        self._reasons |= reasons

    def batches(self, plan: Iterable[list[Sample]]) -> Iterator[tuple[list[Sample], Tensor, Tensor]]:
        """Samples with their raw features and targets, batch by batch."""
        for samples in plan:
            yield samples, *self.read(samples)

    def read(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Raw features and targets (B, h, w, C) float32 of samples of one size."""
        places = [(self._rows[sample.image], sample.number) for sample in samples]
        raw, target = (
            torch.from_numpy(np.stack([array[place] for place in places])) for array in self._arrays[samples[0].size]
        )
        return raw.float(), target.float()

    @property
    def _opened(self) -> np.ndarray:
        assert self._state is not None, "open() comes first"
        return self._state

    def _halves(self, fitted: Fitted, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Raw features and targets (keep, h, w, C) float16 of an image at one size."""
        name, backbone = self._targets.ids[fitted.index], self._backbone
        crops = [kept_view(self._seed, fitted.index, n, size, self._views) for n in range(self._views.keep)]
        image, field = fitted.image.to(backbone.device), fitted.field.float()
        shown = [crop.render(image, backbone.mean, backbone.std) for crop in crops]
        batch = fitting_batch(backbone.device, math.prod(backbone.grid_size(*crops[0].padded)))
        with torch.no_grad():
            raw = [backbone(torch.stack(shown[at : at + batch])).cpu() for at in range(0, len(shown), batch)]
        yield _half(torch.cat(raw), name, "features")
        sampled = [crop.sample(field, backbone.patch_size, backbone.stride) for crop in crops]
        yield _half(torch.stack(sampled), name, "targets")

    def _require_same(self, head: Path) -> None:
        recorded = read_object(head)
        if recorded is None:
            raise TrainError(
                f"{head}: damaged (expected a JSON object); delete {self.folder} to compute its features again"
            )
        if different := differences(recorded, self.identity):
            raise TrainError(
                f"{self.folder} has pairs of other settings: {'; '.join(different)}. Choose another folder (--cache), "
                "or delete it"
            )


def _half(features: Tensor, name: str, what: str) -> np.ndarray:
    half = features.half()
    if not torch.isfinite(half).all():
        raise TrainError(f"{name}: {what} that are not finite or exceed the range of float16; training has not started")
    return half.numpy()
