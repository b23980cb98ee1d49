"""Weights written by stage 3, as a file that can be shared."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from denoising_vit.backbones import Backbone, load_backbone
from denoising_vit.backbones.difference import WHOLE_VERSION, whole_record, write_difference
from denoising_vit.backbones.loading import distilled_path, with_weights
from denoising_vit.backbones.recorded import require_record, require_recorded
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.distilled.contrast import final_norm, restored
from denoising_vit.errors import FormatError, PlanError, TrainError
from denoising_vit.files import DISTILLED, KEY, atomic_path, compact, read_record, write_tensors
from denoising_vit.hub.pretrained import Pretrained
from denoising_vit.training_free.common import photo_images


@dataclass(frozen=True)
class DistilledWeights(Pretrained):
    """Weights of a ViT that gives clean features by itself: a file written by `dvit distill`, and its record.

    Attributes:
        path: the file; it must not be moved.
        record: backbone and training, from the file; JSON values.
    """

    FORMAT = DISTILLED

    path: Path
    record: dict[str, Any] = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Copy the file."""
        if self.path != Path(path):
            with atomic_path(Path(path)) as temporary:
                shutil.copyfile(self.path, temporary)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the record of a file; :meth:`backbone` reads the weights.

        Raises:
            FormatError: if the file is missing, damaged or of another type.
        """
        path = Path(path).expanduser()
        try:
            record = read_record(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"{path}: missing, damaged, or not a safetensors file ({error})") from error
        if not isinstance(record, dict) or record.get("format") != cls.FORMAT:
            raise FormatError(f"{path}: expected a file written by dvit distill, with {cls.FORMAT!r} metadata")
        require_record(path, record.get("backbone"))
        return cls(path, record)

    def reduce(self, path: str | Path, *, rank: int = 32, base: Backbone | None = None) -> Self:
        """Write a small file: the difference from the weights that it was trained from, with matrices of low rank.

        It can be used like the whole file where those weights are available.

        Args:
            path: the new file.
            rank: rank of the difference of each matrix; higher is larger and more accurate.
            base: the backbone that it was trained from, float32; loaded by name if None.

        Raises:
            PlanError: if the rank is not positive, or the new file is this one.
            FormatError: if the file is damaged, or its weights were trained from weights other than those available.
        """
        if rank < 1:
            raise PlanError(f"rank must be at least 1, got {rank}")
        base, trained = self._pair(path, base)
        write_difference(Path(path), _state(base), _state(trained), rank, self.record)
        return self.load(path)

    def restore_contrast(
        self,
        path: str | Path,
        photos: Any,
        *,
        size: tuple[int, int] | None = None,
        base: Backbone | None = None,
    ) -> Self:
        """Write whole weights whose features have the mean and variance of those of the original backbone.

        Each channel is scaled and shifted, because stage 3 reduces contrast; see
        :mod:`denoising_vit.distilled.contrast`.

        Args:
            path: the new file.
            photos: a few dozen photos: a folder, paths, PIL images or (H, W, 3) uint8 arrays.
            size: (H, W) in pixels to which photos are resized; defaults to the backbone's own.
            base: the backbone that it was trained from; loaded by name if None.

        Raises:
            PlanError: if the new file is this one, the model has no final norm with a bias, or its features do not
                vary.
            PhotoError: if a photo cannot be read, or there are none.
            FormatError: if the file is damaged, or its weights were trained from weights other than those available.
            TrainError: if a weight is not finite, or the new file cannot be written.
        """
        base, trained = self._pair(path, base)
        norm = final_norm(trained)  # rejects unsuitable models before any photo is read
        images = photo_images(photos, base, size or (base.default_size, base.default_size))
        with torch.no_grad():
            pairs = ((trained(image), base(image)) for image in images)
            state, change = restored(_state(trained), norm, pairs, len(images))
        write_distilled(state, Path(path), whole_record(self.record) | change)
        return self.load(path)

    def _pair(self, path: str | Path, base: Backbone | None) -> tuple[Backbone, Backbone]:
        """The original backbone and the distilled ViT, float32, to write another file.

        Raises:
            PlanError: if the new file is this one.
            FormatError: if the weights were trained from others.
        """
        if Path(path).resolve() == self.path.resolve():
            raise PlanError(f"{path} is the file that is read; give the new file another name")
        recorded, how = self._loaded
        base = base or load_backbone(recorded["name"], **how, dtype="float32", device="cpu")
        require_recorded(
            recorded, base, f"{self.path}: weights trained from", FormatError, remedy="Load the whole file instead"
        )
        return base, self.backbone(dtype="float32", device="cpu")

    def backbone(self, **options: Any) -> Backbone:
        """The distilled ViT: images (B, 3, H, W) to clean features (B, h, w, C).

        Args:
            **options: options of :func:`~denoising_vit.load_backbone`, such as ``device`` and ``dtype``.

        Raises:
            WeightsError: if the weights are damaged.
        """
        recorded, how = self._loaded
        return load_backbone(recorded["name"], weights=self.path, **how | options)

    @property
    def _loaded(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The recorded backbone, and the options that it was loaded with."""
        recorded = self.record["backbone"]
        return recorded, {key: recorded[key] for key in ("layer", "norm") if recorded.get(key) is not None}


def write_distilled(state: dict[str, Tensor], path: Path, record: dict[str, Any]) -> None:
    """Write weights for `load_backbone(name, weights=path)`, in float16 unless values exceed its range.

    ``timm.create_model(name, num_classes=0, checkpoint_path=path)`` also reads the file.

    Args:
        state: weights by their names in timm.
        path: a .safetensors file.
        record: the backbone and its training; JSON values.

    Raises:
        TrainError: if a value is not finite, or the file cannot be written.
    """
    if bad := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise TrainError(f"{path}: {bad[0]} has values that are not finite; the run diverged")
    head = {"format": DISTILLED, "format_version": WHOLE_VERSION, **record}
    tensors = {name: compact(value) if value.is_floating_point() else value for name, value in state.items()}
    try:
        write_tensors(tensors, path, {KEY: json.dumps(head)})
    except OSError as error:
        raise TrainError(
            f"{path}: the model could not be written ({error}); dvit distill continues a run with --resume"
        ) from error


def trained_further(backbone: Backbone, start: str | Path) -> Backbone:
    """A copy of a backbone with distilled weights, to train further.

    Args:
        backbone: the backbone with its original weights, float32.
        start: the file, or ``distilled`` for the package's.

    Raises:
        FormatError: if the file is damaged, or its weights were trained from other weights.
        WeightsError: if the file is missing, or the package has none for this backbone.
        BackboneError: if the backbone is not from timm.
    """
    path = distilled_path(backbone, start, how="--start FILE")
    recorded = DistilledWeights.load(path).record["backbone"]
    require_recorded(
        recorded,
        backbone,
        f"{path}: weights trained from",
        FormatError,
        remedy="Start from weights that were distilled from this backbone",
    )
    return with_weights(backbone, path)


def _state(backbone: Backbone) -> dict[str, Tensor]:
    """Weights by their names in timm, on the CPU."""
    assert isinstance(backbone, TimmBackbone)  # like every model that stage 3 trains
    return {name: value.cpu() for name, value in backbone.model.state_dict().items()}
