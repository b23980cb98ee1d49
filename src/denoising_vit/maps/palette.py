"""Palettes: the colours shared by all maps of a comparison, optionally saved to a small safetensors file."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import is_recorded, mismatch, names_backbone
from denoising_vit.errors import FormatError
from denoising_vit.files import KEY, Mark, below, read_record, require_ours, require_version, write_tensors
from denoising_vit.maps.clusters import Clusters
from denoising_vit.maps.colours import Foreground, NormScale, PCABasis
from denoising_vit.maps.features import Bar, Features, lookup, to_arrays
from denoising_vit.maps.kinds import MAP_KINDS, TITLES

#: Approximate number of vectors to fit a palette of many maps on.
ENOUGH = 131_072

FORMAT = "denoising-vit/palette"
FORMAT_VERSION = 1

#: Colourings in a file, by their attribute of a palette.
_STORED = {
    "basis": PCABasis,
    "clusters": Clusters,
    "norms": NormScale,
    "foreground": Foreground,
    "foreground_basis": PCABasis,
}

#: Kinds drawn by a single colouring.
_WHOLE = ("pca", "kmeans", "norm")

_COMPONENTS, _COMPONENT_COLOURS = ("first", "second", "third"), "viridis"


class Palette:
    """The colourings of one comparison, each fitted on first use.

    Args:
        maps: features (h, w, C) to compare; they determine all colours together.
        fitted: known colourings by attribute: ``basis``, ``clusters``, ``norms``, ``foreground``, ``foreground_basis``.
        backbone: record of the backbone, if known.
        most: approximate number of vectors to fit on; more are thinned to evenly spaced rows and columns.

    Raises:
        ValueError: if there are neither maps nor colourings, a map is not (h, w, C), channels differ, or values are not
            finite.
    """

    def __init__(
        self,
        maps: Sequence[Features],
        *,
        fitted: Mapping[str, Any] | None = None,
        backbone: dict[str, Any] | None = None,
        most: int = ENOUGH,
    ) -> None:
        self.backbone = backbone
        self._maps = [] if not maps and fitted else _thinned(to_arrays(*maps, maps=True), most)
        vars(self).update(fitted or {})  # replaces properties that would be fitted

    @functools.cached_property
    def basis(self) -> PCABasis:
        """PCA basis, also for single components."""
        return PCABasis.fit(*self._maps)

    @functools.cached_property
    def clusters(self) -> Clusters:
        """k-means clusters."""
        return Clusters.fit(*self._maps)

    @functools.cached_property
    def norms(self) -> NormScale:
        """Scale of norms."""
        return NormScale.fit(*self._maps)

    @functools.cached_property
    def foreground(self) -> Foreground:
        """Foreground threshold."""
        return Foreground.fit(*self._maps)

    @functools.cached_property
    def foreground_basis(self) -> PCABasis:
        """PCA basis of the foreground alone; of all features if there is no foreground."""
        inner = np.concatenate([array[self.foreground.mask(array)] for array in self._maps])  # (N, C)
        return PCABasis.fit(*([inner] if len(inner) else self._maps))

    def colours(self, kind: str, features: Features) -> np.ndarray:
        """Features (h, w, C) as a picture (h, w, 3) uint8.

        Args:
            kind: one of :data:`TITLES`.
            features: one map.

        Raises:
            ValueError: if the kind is unknown, the shape is not (h, w, C) with this C, or values are not finite.
        """
        if kind in _WHOLE:
            return getattr(self, MAP_KINDS[kind].fields[0]).colours(features)
        if kind in _COMPONENTS:
            return lookup(self.basis.shares(features)[..., _COMPONENTS.index(kind)], _COMPONENT_COLOURS)
        if kind not in TITLES:
            raise ValueError(f"unknown kind of map {kind!r}; choose from {', '.join(TITLES)}")
        inside = self.foreground.mask(features)[..., None]
        shown = 255 if kind == "foreground" else self.foreground_basis.colours(features)
        return np.where(inside, shown, np.zeros(3, np.uint8)).astype(np.uint8)

    def bar(self, kind: str) -> Bar | None:
        """The colour bar of a kind of map, if it has one."""
        return self.norms.bar if kind == "norm" else None


def _thinned(arrays: list[np.ndarray], most: int) -> list[np.ndarray]:
    """The maps unchanged if small, else evenly spaced rows and columns of each, including the borders."""
    share = min(1.0, (most / sum(array.shape[0] * array.shape[1] for array in arrays)) ** 0.5)
    if share == 1:
        return arrays
    kept = []
    for array in arrays:
        rows, columns = (
            np.unique(np.rint(np.linspace(0, side - 1, max(2, round(side * share)))).astype(int))
            for side in array.shape[:2]
        )
        kept.append(array[rows][:, columns])
    return kept


def write_palette(
    palette: Palette, path: str | Path, fields: Collection[str] = tuple(_STORED), *, mark: Mark | None = None
) -> None:
    """Write colourings of a palette, fitting unused ones first.

    Args:
        palette: the palette.
        path: a .safetensors file.
        fields: attributes of the palette to write; defaults to all.
        mark: mark of the file; with a mark, only a file with the same mark is replaced.

    Raises:
        OutputError: if a file with another mark or without a mark exists.
        FormatError: if the name does not end in .safetensors.
        OSError: if the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise FormatError(f"{path}: expected a name ending in .safetensors")
    tensors = {
        f"{name}.{field}": torch.from_numpy(np.array(value, np.float64, order="C"))
        for name in _STORED
        if name in fields
        for field, value in vars(getattr(palette, name)).items()
    }
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "backbone": palette.backbone}
    if set(fields) < _STORED.keys():
        head["fields"] = sorted(fields)
    if mark is not None:
        head["made"] = str(mark)
    new = mark is not None and not require_ours(Path(path), mark)
    write_tensors(tensors, Path(path), {KEY: json.dumps(head)}, new=new)


def read_palette(path: str | Path, backbone: Backbone | None = None) -> Palette:
    """Read a file of :func:`write_palette`.

    Args:
        path: the file.
        backbone: backbone of the features to colour; palettes of another backbone raise FormatError.

    Raises:
        FormatError: if the file is missing, damaged, of another type, from a newer version, or of another backbone.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FormatError(f"{path}: no such palette; `dvit show PHOTOS --save-palette FILE` writes one")
    try:
        head, tensors = read_record(path), load_file(path)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: not a palette, or damaged: expected a safetensors file ({error})") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise FormatError(f"{path}: not a palette; `dvit show PHOTOS --save-palette FILE` writes one")
    require_version(path, head, FORMAT_VERSION)
    recorded: Any = head.get("backbone")
    if backbone is not None and names_backbone(recorded) and not is_recorded(recorded, backbone):
        remedy = "A palette is valid for one backbone only; create one: dvit show --save-palette FILE"
        raise FormatError(mismatch(f"{path}: a palette of", recorded, backbone, remedy))
    fields = head.get("fields", list(_STORED))
    if not isinstance(fields, list):
        raise FormatError(f"{path}: damaged palette: expected a list of its fields, got {fields!r}")
    return Palette([], fitted=_colourings(path, tensors, fields), backbone=recorded)


def _colourings(path: Path, tensors: dict[str, np.ndarray], fields: Collection[str]) -> dict[str, Any]:
    shapes = {name: value.shape for name, value in tensors.items()}
    channels = next((shape[-1:] for name, shape in shapes.items() if name.endswith((".mean", ".centres"))), ())
    basis = {"mean": channels, "components": (*channels, 3), "low": (3,), "high": (3,)}
    expected = {
        "basis": basis,
        "clusters": {"centres": (*shapes.get("clusters.centres", ())[:1], *channels)},
        "norms": {"low": (), "high": ()},
        "foreground": {"mean": channels, "direction": channels, "threshold": ()},
        "foreground_basis": basis,
    }
    wanted = {f"{name}.{key}": shape for name in _STORED if name in fields for key, shape in expected[name].items()}
    if shapes != wanted or not all(np.isfinite(value).all() for value in tensors.values()):
        raise FormatError(f"{path}: damaged palette: parts are missing, inconsistent or not finite")
    values = {name: value if value.ndim else float(value) for name, value in tensors.items()}
    return {name: kind(**below(f"{name}.", values)) for name, kind in _STORED.items() if name in fields}
