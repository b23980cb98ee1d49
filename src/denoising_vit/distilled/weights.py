"""Weights written by stage 3, as a file that can be shared."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError

from denoising_vit.backbones import Backbone, load_backbone
from denoising_vit.backbones.recorded import names_backbone
from denoising_vit.errors import FormatError
from denoising_vit.files import DISTILLED, atomic_path, read_record
from denoising_vit.hub.pretrained import Pretrained


@dataclass(frozen=True)
class DistilledWeights(Pretrained):
    """Weights of a ViT that gives clean features by itself: a file written by `dvit distill`, and its record.

    Attributes:
        path: the file; it must stay where it is.
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
            FormatError: if the file is missing, damaged, or something else.
        """
        path = Path(path).expanduser()
        try:
            record = read_record(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"{path}: missing, damaged, or not a safetensors file ({error})") from error
        if not isinstance(record, dict) or record.get("format") != cls.FORMAT:
            raise FormatError(f"{path}: expected a file written by dvit distill, with {cls.FORMAT!r} metadata")
        if not names_backbone(record.get("backbone")):
            raise FormatError(f"{path}: damaged: backbone or fingerprint missing in its metadata")
        return cls(path, record)

    def backbone(self, **options: Any) -> Backbone:
        """The distilled ViT: images (B, 3, H, W) to clean features (B, h, w, C).

        Args:
            **options: options of :func:`~denoising_vit.load_backbone`, such as ``device`` and ``dtype``.

        Raises:
            WeightsError: if the weights are damaged.
        """
        told = self.record["backbone"]
        recorded: dict[str, Any] = {name: told[name] for name in ("layer", "norm") if told.get(name) is not None}
        return load_backbone(told["name"], weights=self.path, **recorded | options)
