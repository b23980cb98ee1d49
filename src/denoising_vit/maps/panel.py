"""One sheet per decomposition: photo, raw and denoised features, artifact and residual.

A denoiser has no artifact to show, so its sheet compares it with raw features and with stage 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from denoising_vit.decomposition.options import STAGE_ONE
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.maps.colours import SIMILARITY_BAR, NormScale, PCABasis, similarity_maps
from denoising_vit.maps.features import Bar, to_map
from denoising_vit.maps.kinds import MAP_KINDS, SIMILARITY
from denoising_vit.maps.palette import Palette
from denoising_vit.maps.sheet import BESIDE, CELL, STEEPEST, Sheet, number, shorten

FINER = 4
"""Upsampling of the first denoised picture, if it has enough pixels."""
ROUNDING = 1e-4
"""A residual below this fraction of the norm of raw features is rounding error."""

_KINDS = ("pca", "norm", "kmeans")
_TITLES = [MAP_KINDS[kind].title for kind in (*_KINDS, SIMILARITY)]

Column = list[tuple[np.ndarray, Bar | None]]
"""PCA, norm, k-means and similarity of one map, with their colour bars."""


def draw_panel(
    photo: np.ndarray,
    result: Decomposition,
    path: str | Path,
    *,
    upsample: int = 1,
    title: str | None = None,
    exact: Decomposition | None = None,
) -> None:
    """Draw one decomposition as a PNG about 2,200 pixels wide.

    Upper row: the photo, raw features (PCA, norm, k-means, similarity to the centre patch), the artifact G. Lower row:
    denoised features, upsampled and then the same four maps in the same colours, and the norm of the residual. G is
    small relative to the features and has its own PCA basis. Patches have sharp edges, because smoothing would hide
    artifacts.

    A result without a separate artifact is drawn in columns instead, about 1,500 pixels wide: the photo, raw features,
    clean features and those of stage 1, if given. Each row is one kind of map in shared colours.

    Args:
        photo: (H, W, 3) uint8, any resolution.
        result: its decomposition.
        path: the file; always a PNG, whatever its suffix.
        upsample: draw denoised features on a grid finer than the patch grid by this factor.
        title: a line above the pictures.
        exact: stage 1's decomposition of the same photo, drawn next to a result without a separate artifact.

    Raises:
        ValueError: if the photo is not (H, W, 3) uint8, ``upsample`` is not a positive whole number, features are not
            finite, or ``exact`` is given with a result that separates an artifact.
        OSError: if the file cannot be written.
    """
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8 or photo.size == 0:
        raise ValueError(f"photo must be an (H, W, 3) uint8 array, got {photo.dtype} of shape {photo.shape}")
    aspect = photo.shape[1] / photo.shape[0]
    method = str(result.info.get("method", "exact"))
    separated = method in (*STAGE_ONE, "subtract")  # other methods do not separate G from the residual
    if exact is not None and separated:
        raise ValueError(f"exact is drawn only next to features that do not separate an artifact, got {method}")
    results = {"denoised" if separated else method: result} | ({} if exact is None else {"exact": exact})
    palette = Palette([result.raw, *(one.semantic for one in results.values())])
    maps = {"raw": result.raw} | {
        name: one.semantic if upsample == 1 else one.upsample(upsample) for name, one in results.items()
    }
    columns = _columns(maps, palette)
    height, width = result.raw.shape[:2]
    centre = (height // 2 + 0.5) / height, (width // 2 + 0.5) / width
    if not separated:
        sheet = Sheet([aspect] * 4, 1 + len(maps), title)
        for row, label in enumerate(_TITLES):
            ring = centre if row == 3 else None
            sheet.row_label(row, label)
            sheet.photo(row, photo, "photo", ring)
            for column, (name, drawn) in enumerate(columns.items(), 1):
                sheet.picture(row, column, drawn[row][0], name, ring=ring, bar=drawn[row][1])
    else:
        sheet = Sheet([aspect] * 2, 6, title, apart=5)
        sheet.photo(0, photo, "photo")
        finer = max(upsample, min(FINER, CELL // max(height, width)), 1)
        heading = f"denoised, {finer} × finer" if finer > 1 else "denoised"
        sheet.picture(1, 0, palette.colours("pca", result.upsample(finer)), heading)
        same = ("", ", same basis"), ("", ", same scale"), ("", ", same clusters"), ("", "")
        for row, (name, drawn) in enumerate(columns.items()):
            sheet.row_label(row, name)
            for column, title_of in enumerate(_TITLES):
                ring = centre if column == 3 else None
                pixels, bar = drawn[column]
                sheet.picture(row, 1 + column, pixels, title_of + same[column][row], ring=ring, bar=bar)
        _draw_rest(sheet, result)
    sheet.caption(_caption(result, aspect), *_compared(result, exact))
    sheet.save(path)


def _columns(maps: dict[str, Tensor], palette: Palette) -> dict[str, Column]:
    """The four kinds of maps of each of the features."""
    similar = similarity_maps(*maps.values())
    return {
        name: [*((palette.colours(kind, one), palette.bar(kind)) for kind in _KINDS), (pixels, SIMILARITY_BAR)]
        for (name, one), pixels in zip(maps.items(), similar, strict=True)
    }


def _draw_rest(sheet: Sheet, result: Decomposition) -> None:
    """The artifact and the residual, each on its own scale."""
    artifact = to_map(result.artifact)
    size = float(np.sqrt(np.square(artifact, dtype=np.float64).sum(-1).mean()))
    sheet.picture(0, 5, PCABasis.fit(artifact).colours(artifact), f"artifact G, RMS {number(size)}")
    residual = result.residual
    if float(residual.norm(dim=-1).max()) < ROUNDING * float(result.raw.norm(dim=-1).max()):
        residual = residual * 0  # after subtraction, only rounding errors remain, which must not look like structure
    scale = NormScale.fit(residual)
    heading = f"residual norm, {number(scale.low)} to {number(scale.high)}"
    sheet.picture(1, 5, scale.colours(residual), heading, bar=scale.bar)


def _caption(result: Decomposition, aspect: float) -> str:
    """Backbone, sizes and held-out scores, if known."""
    info, (height, width, channels) = result.info, result.raw.shape
    backbone = info.get("backbone", {})
    parts = [shorten(str(backbone[key]), 48) for key in ("name", "weights") if backbone.get(key)]
    if info.get("views"):
        parts.append(f"{info['views']} views")
    parts.append(f"{result.size[1]} × {result.size[0]} px, {width} × {height} patches, {channels} channels")
    parts += _heldout(result)
    if not 1 / STEEPEST <= aspect <= STEEPEST:
        real, drawn = (f"{aspect:.4g}:1", "4:1") if aspect > 1 else (f"1:{1 / aspect:.4g}", "1:4")
        parts.append(f"photo of {real} drawn at {drawn}")
    return BESIDE.join(parts)


def _compared(result: Decomposition, exact: Decomposition | None) -> list[str]:
    """A line about the cleaner and about stage 1; none for results without them."""
    denoiser = result.info.get("denoiser", {})
    parts = [f"denoiser {shorten(str(denoiser['source']), 40)}, {denoiser['digest'][:8]}"] if denoiser else []
    parts += [f"{name} {result.info[name][:8]}" for name in ("distilled", "subspace") if name in result.info]
    if exact is not None:
        views = exact.info.get("views")
        parts.append(", ".join([f"exact of {views} views" if views else "exact", *_heldout(exact)]))
    return [BESIDE.join(parts)] if parts else []


def _heldout(result: Decomposition) -> list[str]:
    scores = {"R²": result.heldout_r2, "cosine": result.heldout_cosine}
    return [f"held-out {name} {score:.3f}" for name, score in scores.items() if score is not None]
