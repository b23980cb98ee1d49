"""One sheet that shows a decomposition: the photo, its raw and its denoised features, the artifact, what is left.

A denoiser's result has no artifact of its own to show: its sheet compares it with raw features and with stage 1's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from denoising_vit.decomposition.result import Decomposition
from denoising_vit.maps.clusters import cluster_maps
from denoising_vit.maps.norms import NORM_COLOURS, norm_maps
from denoising_vit.maps.pca import Features, PCABasis, to_arrays
from denoising_vit.maps.sheet import BESIDE, CELL, STEEPEST, Sheet, number, shorten, shrink
from denoising_vit.maps.similarity import SIMILARITY_COLOURS, similarity_maps

FINER = 4
"""How finely the first denoised picture is sampled, where a picture has the pixels to show it."""
ROUNDING = 1e-4
"""A residual below this share of the raw features' length is rounding."""


def draw_panel(
    photo: np.ndarray,
    result: Decomposition,
    path: str | Path,
    *,
    upsample: int = 1,
    title: str | None = None,
    exact: Decomposition | None = None,
) -> None:
    """Draw one decomposition as a PNG of about 2,200 pixels' width.

    Upper row: the photo, raw features (PCA, norm, k-means, similarity to the centre patch), the artifact G. Lower row:
    denoised features, finely sampled and then the same four maps in the same colours, and the norm of the residual.
    G has a PCA basis of its own, because it is small beside the rest. Patches are drawn with sharp edges: smoothing
    would hide the artifacts.

    A denoiser's result is drawn in columns instead, about 1,500 pixels wide: the photo, raw features, the denoiser's
    and, where given, stage 1's. Each row is one kind of map (PCA, norm, k-means, similarity to the centre patch), in
    the same basis, scale and clusters for all of its columns.

    Args:
        photo: (H, W, 3) uint8, the photo at its own aspect and any resolution.
        result: its decomposition.
        path: the file to write; always a PNG, whatever the name ends in.
        upsample: draw maps of denoised features on a grid this many times as fine as the patch grid.
        title: a line above the pictures.
        exact: stage 1's decomposition of the same photo, to be drawn beside a denoiser's result.

    Raises:
        ValueError: if the photo is not (H, W, 3) uint8, ``upsample`` is not a positive whole number, features are not
            finite, or ``exact`` is given beside a result that is no denoiser's.
        OSError: if the file cannot be written.
    """
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8 or photo.size == 0:
        raise ValueError(f"photo must be an (H, W, 3) uint8 array, got {photo.dtype} of shape {photo.shape}")
    aspect = photo.shape[1] / photo.shape[0]
    if result.info.get("method") == "denoiser":
        sheet = Sheet([aspect] * 4, 3 if exact is None else 4, title)
        _draw_columns(sheet, photo, result, exact, upsample)
    elif exact is not None:
        raise ValueError("exact is drawn beside the result of a denoiser only; this result is of another method")
    else:
        sheet = Sheet([aspect] * 2, 6, title, apart=5)
        sheet.picture(0, 0, shrink(photo, sheet.box(0)), "photo")
        _draw_features(sheet, result, upsample)
        _draw_rest(sheet, result)
        sheet.row_label(0, "raw")
        sheet.row_label(1, "denoised")
    sheet.caption(_caption(result, aspect), *_compared(result, exact))
    sheet.save(path)


def _draw_columns(
    sheet: Sheet, photo: np.ndarray, result: Decomposition, exact: Decomposition | None, upsample: int
) -> None:
    """The photo beside raw features, the denoiser's, and stage 1's where they are given: one kind of map a row."""
    found = {"raw": result.raw, "denoiser": _sampled(result, upsample)}
    if exact is not None:
        found["exact"] = _sampled(exact, upsample)
    maps: tuple[Features, ...] = tuple(found.values())
    basis = PCABasis.fit(result.raw, *(one.semantic for one in (result, exact) if one is not None))
    norms, span = norm_maps(*maps)
    colours = [basis.colours(features) for features in maps], norms, cluster_maps(*maps), similarity_maps(*maps)
    height, width = result.raw.shape[:2]
    centre = (height // 2 + 0.5) / height, (width // 2 + 0.5) / width
    small = shrink(photo, sheet.box(0))
    for row, (label, pictures) in enumerate(zip(("PCA", "norm", "k-means", "similarity to ○"), colours, strict=True)):
        ring = centre if row == 3 else None
        sheet.row_label(row, label)
        sheet.picture(row, 0, small, "photo", ring)
        for column, (name, picture) in enumerate(zip(found, pictures, strict=True), 1):
            sheet.picture(row, column, picture, name, ring)
            if row in (1, 3):
                sheet.bar(row, column, *((NORM_COLOURS, span) if row == 1 else (SIMILARITY_COLOURS, (-1, 1))))


def _sampled(result: Decomposition, upsample: int) -> Tensor:
    """F on the patch grid, or on one that is so many times as fine: (n h, n w, C)."""
    return result.semantic if upsample == 1 else result.upsample(upsample)


def _draw_features(sheet: Sheet, result: Decomposition, upsample: int) -> None:
    """Raw and denoised maps, in the same colours for both."""
    semantic = _sampled(result, upsample)
    height, width = result.raw.shape[:2]
    finer = max(upsample, min(FINER, CELL // max(height, width)), 1)
    basis = PCABasis.fit(result.raw, result.semantic)
    sheet.picture(
        1, 0, basis.colours(result.upsample(finer)), f"denoised, {finer} × finer" if finer > 1 else "denoised"
    )
    maps: tuple[Features, Features] = (result.raw, semantic)
    norms, span = norm_maps(*maps)
    clusters, likeness = cluster_maps(*maps), similarity_maps(*maps)
    centre = (height // 2 + 0.5) / height, (width // 2 + 0.5) / width
    for row, features in enumerate(maps):
        sheet.picture(row, 1, basis.colours(features), "PCA" if row == 0 else "PCA, same basis")
        sheet.picture(row, 2, norms[row], "norm" if row == 0 else "norm, same scale")
        sheet.bar(row, 2, NORM_COLOURS, span)
        sheet.picture(row, 3, clusters[row], "k-means" if row == 0 else "k-means, same clusters")
        sheet.picture(row, 4, likeness[row], "similarity to ○", ring=centre)
        sheet.bar(row, 4, SIMILARITY_COLOURS, (-1, 1))


def _draw_rest(sheet: Sheet, result: Decomposition) -> None:
    """The artifact and the residual, each on a scale of its own."""
    (artifact,) = to_arrays(result.artifact, maps=True)
    size = float(np.sqrt(np.square(artifact, dtype=np.float64).sum(-1).mean()))
    sheet.picture(0, 5, PCABasis.fit(artifact).colours(artifact), f"artifact G, RMS {number(size)}")
    residual = result.residual
    if float(residual.norm(dim=-1).max()) < ROUNDING * float(result.raw.norm(dim=-1).max()):
        residual = residual * 0  # nothing is left after a subtraction; rounding is not to be drawn as if it were
    (left,), span = norm_maps(residual)
    sheet.picture(1, 5, left, f"residual norm, {number(span[0])} to {number(span[1])}")
    sheet.bar(1, 5, NORM_COLOURS, span)


def _caption(result: Decomposition, aspect: float) -> str:
    """What was run on what, and how well it predicts held-out views; whatever of it is known."""
    info, (height, width, channels) = result.info, result.raw.shape
    backbone = info.get("backbone", {})
    parts = [shorten(str(backbone[key]), 48) for key in ("name", "weights") if backbone.get(key)]
    if info.get("views"):
        parts.append(f"{info['views']} views")
    parts.append(f"{result.size[1]} × {result.size[0]} px, {width} × {height} patches, {channels} channels")
    if result.heldout_r2 is not None:
        parts.append(f"held-out R² {result.heldout_r2:.3f}")
    if result.heldout_cosine is not None:
        parts.append(f"held-out cosine {result.heldout_cosine:.3f}")
    if not 1 / STEEPEST <= aspect <= STEEPEST:
        real, drawn = (f"{aspect:.4g}:1", "4:1") if aspect > 1 else (f"1:{1 / aspect:.4g}", "1:4")
        parts.append(f"photo of {real} drawn at {drawn}")
    return BESIDE.join(parts)


def _compared(result: Decomposition, exact: Decomposition | None) -> list[str]:
    """What a denoiser's result came from, and what was run beside it: a line, or none for results of other methods."""
    denoiser = result.info.get("denoiser", {})
    parts = [f"denoiser {shorten(str(denoiser['source']), 40)}, {denoiser['digest'][:8]}"] if denoiser else []
    if exact is not None:
        views, r2, cosine = exact.info.get("views"), exact.heldout_r2, exact.heldout_cosine
        known = [f"exact of {views} views" if views else "exact"]
        known += [f"held-out R² {r2:.3f}"] if r2 is not None else []
        known += [f"held-out cosine {cosine:.3f}"] if cosine is not None else []
        parts.append(", ".join(known))
    return [BESIDE.join(parts)] if parts else []
