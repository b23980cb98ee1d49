"""Renders templates, pictures and figures to one HTML file without scripts or network access."""

from __future__ import annotations

import base64
import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

from denoising_vit.environment import package_version
from denoising_vit.files import Mark, atomic_path, owned_path
from denoising_vit.maps.features import lookup
from denoising_vit.maps.norms import NORM_COLOURS


@dataclass(frozen=True)
class Picture:
    """An image on a page: data URI, width over height as drawn, heading, text for screen readers."""

    uri: str
    ratio: float
    heading: str
    alt: str


def render(template: str, package: str = "denoising_vit.show.pages", **values: Any) -> str:
    """A page from a template.

    Args:
        template: file name.
        package: package of the template; ``base.html`` and ``macros.html`` come from this one.
        **values: variables of the template; text is escaped.
    """
    packages = dict.fromkeys((package, "denoising_vit.show.pages"))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, ".") for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "percent": "{:.1%}".format, "basename": basename}
    return environment.get_template(template).render(version=package_version(), **values)


def write_page(page: str, path: Path, mark: Mark | None = None) -> None:
    """Writes a page atomically; with a mark, only a file with the same mark is replaced.

    Raises:
        OutputError: if there is a file with another mark or none.
        OSError: if the file cannot be written.
    """
    # File names need not be valid text; invalid characters are escaped.
    with atomic_path(Path(path)) if mark is None else owned_path(Path(path), mark) as temporary:
        temporary.write_bytes(page.encode("utf-8", "backslashreplace"))


def png_uri(picture: np.ndarray) -> str:
    """A map (h, w, 3) uint8 as a data URI, one pixel for each patch; the page enlarges it without smoothing."""
    return _uri(Image.fromarray(np.ascontiguousarray(picture)), "png", optimize=True)


def jpeg_uri(photo: np.ndarray, longest: int = 640) -> str:
    """A photo (H, W, 3) uint8 as a data URI, shrunk to ``longest`` pixels on its longer side."""
    step = max(1, max(photo.shape[:2]) // (4 * longest))
    image = Image.fromarray(np.ascontiguousarray(photo[::step, ::step]))
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _uri(image, "jpeg", quality=85)


@functools.cache
def scale_colours(name: str = NORM_COLOURS) -> str:
    """A colour bar one pixel high as a data URI."""
    return png_uri(lookup(np.linspace(0, 1, 128)[None], name))


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return data_uri(buffer.getvalue(), f"image/{kind}")


def data_uri(content: bytes, kind: str) -> str:
    """Content of a media type as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def figure(value: float | None) -> str:
    """Three significant digits; a dash for None."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 999.5:
        return f"{value:.0f}".replace("-", "−")
    return f"{value:#.3g}".rstrip(".").replace("-", "−")


def basename(name: str) -> str:
    """The last part of a path or URL."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1]
