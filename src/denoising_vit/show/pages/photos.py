"""The page of a batch of photos: maps and metrics of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from denoising_vit.decomposition.result import Decomposition
from denoising_vit.maps.kinds import MAP_KINDS
from denoising_vit.show.options import ShowOptions
from denoising_vit.show.pages.rendering import Picture, jpeg_uri, png_uri, render, scale_colours
from denoising_vit.show.sheets import ShownPhoto, palette_of, pictures

#: Maps of each photo.
KINDS = "pca,norm,kmeans,similarity,artifact,residual"

#: Number of photos with maps on the page; further photos have metrics only.
MOST = 100


@dataclass(frozen=True)
class _Section:
    """A photo, its maps by features (None for a missing map), and the colour bars: name, URI, ends."""

    name: str
    photo: Picture
    lines: dict[str, list[Picture | None]]
    scales: list[tuple[str, str, tuple[float, float]]]


@dataclass
class PhotosPage:
    """Collects finished photos and renders the page."""

    command: str | None  # command line that repeats the run
    _sections: list[_Section] = field(default_factory=list)
    _left_out: int = 0

    def add(self, name: str, pixels: np.ndarray, result: Decomposition, exact: Decomposition | None = None) -> None:
        """Add a photo (H, W, 3) uint8 with its decomposition, and stage 1's to compare; keeps a few dozen kilobytes.

        Raises:
            ValueError: if features are not finite.
        """
        if len(self._sections) >= MOST:
            self._left_out += 1
            return
        method = str(result.info.get("method", "exact"))
        found = {"raw": result, method: result} | ({} if exact is None else {"exact": exact})
        photo = ShownPhoto(name, pixels, found)
        options = ShowOptions(maps=KINDS)
        drawn = pictures(photo, palette_of([photo], options), options)
        drawn = {kind: maps for kind, maps in drawn.items() if any(maps.values())}
        lines: dict[str, list[Picture | None]] = {feature: [] for feature in found}
        scales = []
        for kind, maps in drawn.items():
            title = MAP_KINDS[kind].title
            for feature, one in maps.items():
                alt = f"{title} of {feature} features of {name}"
                lines[feature].append(one and Picture(png_uri(one.pixels), photo.aspect, title, alt))
            if bar := next((one.bar for one in maps.values() if one and one.bar), None):
                scales.append((title, scale_colours(bar[0]), bar[1]))
        shown = Picture(jpeg_uri(pixels), photo.aspect, "photo", f"the photo {name}")
        self._sections.append(_Section(name, shown, lines, scales))

    def render(self, rows: list[dict[str, Any]], about: dict[str, str | None], backbone: str) -> str:
        """The page as HTML, from a row of `dvit denoise --json` for each photo and details of the run by name."""
        return render(
            "photos.html",
            backbone=backbone,
            rows=[row for row in rows if row["status"] != "failed"],
            failed=[row for row in rows if row["status"] == "failed"],
            sections=self._sections,
            left_out=self._left_out,
            about=about,
            command=self.command,
        )
