"""The page of a batch of photos: what was taken away from the features of each, and what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from denoising_vit.decomposition.result import Decomposition
from denoising_vit.show.drawing import Picture as Drawn
from denoising_vit.show.drawing import palette_of, pictures
from denoising_vit.show.gathering import ShownPhoto
from denoising_vit.show.options import MAPS, ShowOptions
from denoising_vit.show.pages.rendering import Picture, jpeg_uri, png_uri, render
from denoising_vit.show.pages.scales import scale_colours

#: Maps that are shown of each photo.
KINDS = "pca,norm,kmeans,similarity,artifact,residual"

#: Photos that are shown with their maps; of the others there are figures only.
MOST = 100


@dataclass(frozen=True)
class _Line:
    """Maps of one kind of features: its name, and a picture for each of the kinds of maps that it has."""

    name: str
    maps: list[Picture | None]


@dataclass(frozen=True)
class _Section:
    """A photo with its maps, and the scales of norms."""

    name: str
    photo: Picture
    lines: list[_Line]
    scales: list[tuple[str, str, tuple[float, float]]]


@dataclass
class PhotosPage:
    """Collects photos while they are done, and makes the page of them.

    Attributes:
        command: that does all of it again.
    """

    command: str | None
    _sections: list[_Section] = field(default_factory=list)
    _left_out: int = 0

    def add(self, name: str, pixels: np.ndarray, result: Decomposition, exact: Decomposition | None = None) -> None:
        """Takes a photo and its features: a few dozen kilobytes are kept of it.

        Args:
            name: of the photo.
            pixels: (H, W, 3) uint8.
            result: what its features were separated into.
            exact: what stage 1 makes of them, to be shown beside another method's.

        Raises:
            ValueError: if features are not finite.
        """
        if len(self._sections) >= MOST:
            self._left_out += 1
            return
        method = str(result.info.get("method", "denoised"))
        found = {"raw": result, method: result} | ({} if exact is None else {"exact": exact})
        photo = ShownPhoto(name, pixels, found)
        options = ShowOptions(maps=KINDS)
        drawn = pictures(photo, palette_of([photo], options), options)
        lines = [_Line(feature, _maps_of(feature, photo, drawn)) for feature in found]
        bars = {kind: next((one.bar for one in maps.values() if one and one.bar), None) for kind, maps in drawn.items()}
        scales = [(MAPS[kind], scale_colours(bar[0]), bar[1]) for kind, bar in bars.items() if bar is not None]
        self._sections.append(
            _Section(name, Picture(jpeg_uri(pixels), photo.aspect, "photo", f"the photo {name}"), lines, scales)
        )

    def render(self, rows: list[dict[str, Any]], about: dict[str, str | None], backbone: str) -> str:
        """The page as HTML.

        Args:
            rows: what became of each photo: ``image``, ``status``, ``views``, ``heldout_r2``, ``heldout_cosine``,
                ``seconds``, ``note``.
            about: how it was made, by name.
            backbone: what it is called.
        """
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


def _maps_of(feature: str, photo: ShownPhoto, drawn: Mapping[str, Mapping[str, Drawn | None]]) -> list[Picture | None]:
    """The maps of these features, in the order of kinds that any have; None for those that these have not."""
    return [
        None
        if (one := maps[feature]) is None
        else Picture(
            png_uri(one.pixels), photo.aspect, MAPS[kind], f"{MAPS[kind]} of {feature} features of {photo.name}"
        )
        for kind, maps in drawn.items()
        if any(maps.values())
    ]
