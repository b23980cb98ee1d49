"""From templates, pictures and figures to one HTML file: no scripts, nothing from the network."""

from __future__ import annotations

import base64
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


@dataclass(frozen=True)
class Picture:
    """An image for a page.

    Attributes:
        uri: its content, as a data URI.
        ratio: width to height as it is drawn.
        heading: what stands above it.
        alt: what it shows, for those who do not see it.
    """

    uri: str
    ratio: float
    heading: str
    alt: str


def render(template: str, package: str = "denoising_vit.show.pages", **values: Any) -> str:
    """A page from a template.

    Args:
        template: its file name.
        package: where it lies; what all pages share (``base.html``, ``macros.html``) lies here.
        **values: what it is filled with; text is escaped.
    """
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader(name, ".") for name in dict.fromkeys((package, "denoising_vit.show.pages"))]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "percent": percent, "basename": basename}
    return environment.get_template(template).render(version=package_version(), **values)


def write_page(page: str, path: Path, mark: Mark | None = None) -> None:
    """Writes a page; there is either all of it or what was there before.

    Args:
        page: its text.
        path: the file.
        mark: of what it is made; with one, no file is replaced that has another.

    Raises:
        OutputError: if there is a file with another mark, or none.
        OSError: if the file cannot be written.
    """
    # Names of files need not be valid text; what is not is shown escaped.
    with atomic_path(Path(path)) if mark is None else owned_path(Path(path), mark) as temporary:
        temporary.write_bytes(page.encode("utf-8", "backslashreplace"))


def png_uri(picture: np.ndarray) -> str:
    """A map (h, w, 3) uint8, a pixel a patch: the page enlarges it without smoothing, which would hide artifacts."""
    return _uri(Image.fromarray(np.ascontiguousarray(picture)), "png", optimize=True)


def jpeg_uri(photo: np.ndarray, longest: int = 640) -> str:
    """A photo (H, W, 3) uint8, its longest side this many pixels at most: for looking at, not for measuring."""
    step = max(1, max(photo.shape[:2]) // (4 * longest))
    image = Image.fromarray(np.ascontiguousarray(photo[::step, ::step]))
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _uri(image, "jpeg", quality=85)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return data_uri(buffer.getvalue(), f"image/{kind}")


def data_uri(content: bytes, kind: str) -> str:
    """Content of a media type as part of a page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def figure(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 999.5:
        return f"{value:.0f}".replace("-", "−")
    return f"{value:#.3g}".rstrip(".").replace("-", "−")


def percent(share: float) -> str:
    """A share as the words of findings have it."""
    return f"{share:.1%}"


def basename(name: str) -> str:
    """The last part of a path or address."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1]
