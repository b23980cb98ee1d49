"""The result of denoising one image, and its safetensors file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from denoising_vit.errors import FormatError
from denoising_vit.files import KEY, compact, open_own, write_tensors
from denoising_vit.views.patch_grid import patch_centres, patch_count
from denoising_vit.views.sampling import sample_field

FORMAT = "denoising-vit/decomposition"
FORMAT_VERSION = 1

_REQUIRED = ("size", "patch_size", "stride", "info")


def write_decomposition(result: Decomposition, path: Path, extra: dict[str, Tensor] | None = None) -> None:
    """Write ``field``, ``semantic``, ``artifact``, ``raw``, a predicted ``residual`` and ``extra`` as float16."""
    tensors = {"field": result.field, "semantic": result.semantic, "artifact": result.artifact, "raw": result.raw}
    if result.predicted_residual is not None:
        tensors["residual"] = result.predicted_residual
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "size": result.size,
        "patch_size": result.patch_size,
        "stride": result.stride,
        "info": result.info,
    }
    content = {key: compact(value) for key, value in (tensors | (extra or {})).items()}
    write_tensors(content, path, {KEY: json.dumps(head)})


def read_head(path: Path) -> dict[str, Any]:
    """Read only the JSON metadata.

    Raises:
        FormatError: if the file is not a decomposition, or from a newer version.
    """
    with open_own(path, FORMAT, FORMAT_VERSION, "a decomposition", _REQUIRED) as (head, _):
        pass
    size, info = head["size"], head["info"]
    sides = [*size, head["patch_size"], head["stride"]] if isinstance(size, list) and len(size) == 2 else [None]
    if not all(isinstance(side, int) and side > 0 for side in sides) or not isinstance(info, dict):
        raise FormatError(f"{path}: damaged decomposition: sizes or record missing in its metadata")
    return head


def _require_shapes(path: Path, tensors: dict[str, Tensor], head: dict[str, Any]) -> None:
    """Check that the shapes of tensors match each other and the metadata."""
    patch, stride = head["patch_size"], head["stride"]
    grid = tuple(patch_count(side, patch, stride) for side in head["size"])
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    field = shapes.pop("field")
    if len(field) != 3 or any(shape != (*grid, field[-1]) for shape in shapes.values()):
        raise FormatError(f"{path}: damaged decomposition: its tensors do not match a grid of {grid[0]} x {grid[1]}")


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Separated features of one image: ``raw = semantic + artifact + residual`` on the patch grid, as in the paper.

    The sum is exact with the exact solver, but approximate with the neural field, which predicts the residual.

    Attributes:
        field: F on its own nodes, (Ry, Rx, C) float32; nodes are at cell centres of [0, 1]^2.
        artifact: G, (h, w, C) float32.
        raw: the backbone's features of the whole image, (h, w, C) float32.
        size: (H, W) in pixels of the backbone's input.
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels.
        predicted_residual: h as predicted from ``raw`` by a network, (h, w, C); None if none was fitted.
        info: settings, and accuracy on held-out views (``heldout_r2``, ``heldout_cosine``); JSON values.
    """

    field: Tensor = dataclasses.field(repr=False)
    artifact: Tensor = dataclasses.field(repr=False)
    raw: Tensor = dataclasses.field(repr=False)
    size: tuple[int, int]
    patch_size: int
    stride: int
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    predicted_residual: Tensor | None = dataclasses.field(default=None, repr=False)

    @cached_property
    def semantic(self) -> Tensor:
        """F at the patch centres, (h, w, C): the denoised features."""
        return sample_field(self.field, *self._centres())

    @property
    def residual(self) -> Tensor:
        """h, (h, w, C): predicted by a network if one was fitted, else ``raw - semantic - artifact``."""
        if self.predicted_residual is not None:
            return self.predicted_residual
        return self.raw - self.semantic - self.artifact

    @property
    def coords(self) -> Tensor:
        """(x, y) of the patch centres in [0, 1] of the image, (h, w, 2) float32."""
        rows, columns = (torch.from_numpy(centre).float() for centre in self._centres())
        return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)

    @property
    def heldout_r2(self) -> float | None:
        """Fraction of the variance of held-out views explained by F + G; None without held-out views."""
        return self.info.get("heldout_r2")

    @property
    def heldout_cosine(self) -> float | None:
        """Mean cosine between F + G and the features of held-out views; None without held-out views."""
        return self.info.get("heldout_cosine")

    def sample(self, coords: Tensor) -> Tensor:
        """F at any position: bilinear at ``coords`` (..., 2), (x, y) in [0, 1] from the image's top left -> (..., C).

        Coordinates outside the image take the value at its border.

        Raises:
            ValueError: if the last dimension is not 2.
        """
        if coords.shape[-1] != 2:
            raise ValueError(f"coords must be (x, y) pairs, shape (..., 2); got shape {tuple(coords.shape)}")
        coords = coords.to(self.field.device)
        nodes = torch.tensor([self.field.shape[1], self.field.shape[0]], device=coords.device)
        place = (coords.to(torch.float64) * nodes - 0.5).clamp(min=0).minimum(nodes - 1.0)
        lower = place.floor().long()
        upper = (lower + 1).minimum(nodes - 1)
        share = (place - lower).to(self.field)  # (..., 2)
        (x0, y0), (x1, y1) = lower.unbind(-1), upper.unbind(-1)
        sx, sy = share[..., :1], share[..., 1:]
        top = self.field[y0, x0] * (1 - sx) + self.field[y0, x1] * sx
        bottom = self.field[y1, x0] * (1 - sx) + self.field[y1, x1] * sx
        return top * (1 - sy) + bottom * sy

    def upsample(self, factor: int) -> Tensor:
        """F on a grid ``factor`` times finer than the patch grid, covering the same cells: (factor h, factor w, C).

        Raises:
            ValueError: if the factor is not a positive whole number.
        """
        if factor < 1 or factor != int(factor):
            raise ValueError(f"factor must be a whole number of at least 1, got {factor}")
        return sample_field(self.field, *(_refine(*args, factor) for args in self._sides()))

    def save(self, path: str | Path, *, upsample: int | None = None) -> None:
        """Write a safetensors file (float16) for :meth:`load`; ``sample`` and ``upsample`` work after loading.

        Args:
            path: the file.
            upsample: record this factor and, above 1, also store the clean features upsampled by it, under
                ``upsampled``, as `dvit denoise --upsample` does.

        Raises:
            ValueError: if ``upsample`` is not a positive whole number.
            OSError: if the file cannot be written.
        """
        finer = {} if upsample in (None, 1) else {"upsampled": self.upsample(upsample)}
        noted = self if upsample is None else dataclasses.replace(self, info=self.info | {"upsample": upsample})
        write_decomposition(noted, Path(path), finer)

    @classmethod
    def load(cls, path: str | Path) -> Decomposition:
        """Read a file written by :meth:`save`.

        Raises:
            FormatError: if the file is missing, damaged, of another type, or from a newer version.
        """
        path = Path(path)
        head = read_head(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key).float() for key in ("field", "artifact", "raw")}
                if "residual" in file.keys():  # noqa: SIM118, not a mapping
                    tensors["predicted_residual"] = file.get_tensor("residual").float()
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path}: damaged decomposition ({error})") from error
        _require_shapes(path, tensors, head)
        arguments: dict[str, Any] = tensors | {key: head[key] for key in _REQUIRED} | {"size": tuple(head["size"])}
        return cls(**arguments)

    def _sides(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        return (self.size[0], self.patch_size, self.stride), (self.size[1], self.patch_size, self.stride)

    def _centres(self) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = (patch_centres(*args) for args in self._sides())
        return rows, columns


def _refine(side: int, patch: int, stride: int, factor: int) -> np.ndarray:
    """Centres of the ``factor`` equal parts of each patch's cell (a cell is one stride wide), relative to the side."""
    count = patch_count(side, patch, stride)
    parts = (np.arange(count * factor) + 0.5) / factor - 0.5  # in strides, from the first patch centre
    return (parts * stride + patch / 2) / side
