"""From a photo and settings to an answer: clean features in the file that `dvit denoise` writes, and what it shows."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from denoising_vit.backbones import Backbone
from denoising_vit.data.photos import read_photo_bytes
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.denoise import Progress, denoise_image
from denoising_vit.errors import AppError, PhotoError
from denoising_vit.extractors import KINDS
from denoising_vit.files import atomic_path
from denoising_vit.show.app.keeping import Keep
from denoising_vit.show.app.models import Model, Models
from denoising_vit.views.patch_grid import nearest_sizes

#: Largest photo, in pixels; its float copy takes 12 bytes a pixel, and many may look at the page.
MAX_PIXELS = 50_000_000

#: Longer side of the photo as it is kept with an answer.
_SHOWN = 1200

#: Views and output scale at most: others wait for the answer.
MOST_VIEWS, MOST_SCALE = 128, 4

_HELD_OUT = 8

#: Letters of a photo's name that name its results.
_NAME = 80


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        backbone: name of one that the page has.
        method: a kind of clean features.
        layer: block whose output is taken, negative from the end.
        size: side of the square that the photo is shown to the backbone in, in pixels; None for its own.
        views: crops that exact fits.
        scale: exact only; how many times finer than the patches clean features are drawn and stored.
    """

    backbone: str
    method: str = "denoiser"
    layer: int = -1
    size: int | None = None
    views: int = 32
    scale: int = 1


@dataclass(frozen=True, eq=False)
class Answer:
    """What was found in one photo, and the files that hold it.

    Attributes:
        folder: of the files.
        photo: the photo, (H, W, 3) uint8, at most 1,200 pixels on a side.
        result: its features.
        scale: how many times finer than the patches clean features are drawn.
        seconds: reading, denoising and writing took, by name.
    """

    folder: Path
    photo: np.ndarray
    result: Decomposition
    scale: int
    seconds: dict[str, float]

    @property
    def features(self) -> Path:
        """The safetensors file."""
        return next(self.folder.glob("*.safetensors"))

    @classmethod
    def load(cls, folder: Path) -> Answer:
        """Reads back what :func:`answer` left in a folder.

        Raises:
            AppError: if it has been removed since.
        """
        try:
            with Image.open(folder / "photo.png", formats=["PNG"]) as image:
                photo = np.array(image.convert("RGB"))
            result = Decomposition.load(next(folder.glob("*.safetensors")))
        except (OSError, StopIteration) as error:
            raise AppError("this answer is no longer kept; denoise the photo again") from error
        return cls(folder, photo, result, result.info["upsample"], {})


def read_upload(path: Path) -> np.ndarray:
    """A photo of a visitor or a sample, (H, W, 3) uint8.

    Raises:
        PhotoError: if it cannot be read or used; the message names the file without its folder.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PhotoError(f"{path.name} is no longer kept; choose or upload it again") from error
    return read_photo_bytes(content, path.name, max_pixels=MAX_PIXELS)


def answer(models: Models, keep: Keep, photo: Path, settings: Settings, progress: Progress | None = None) -> Answer:
    """Cleans a photo's features and writes them down.

    Args:
        models: has the backbone.
        keep: where the answer's files go.
        photo: its file.
        settings: how.
        progress: called as ``progress(done, total)`` after each batch of views; what it raises ends the work.

    Raises:
        PhotoError: if the photo cannot be read or used.
        AppError: if the backbone is not at hand, or has no such method.
        BackboneError: if it has no such layer.
        SizeError, PlanError: if size or views do not do.
    """
    started = time.perf_counter()
    pixels = read_upload(photo)
    read = time.perf_counter()
    model = models.get(settings.backbone, settings.layer)
    result = denoise_image(
        model.backbone, pixels, progress=progress, options=options_of(model, settings), **_cleaner(model, settings)
    )
    result = dataclasses.replace(result, info=result.info | {"photo": result.info["photo"] | {"name": photo.name}})
    denoised = time.perf_counter()
    scale = settings.scale if settings.method == "exact" else 1
    folder = keep.new()
    small = shrunk(pixels, _SHOWN)
    result.save(folder / f"{photo.stem[:_NAME]}.safetensors", upsample=scale)
    Image.fromarray(small).save(folder / "photo.png", compress_level=1)
    seconds = {"reading": read - started, "denoising": denoised - read, "writing": time.perf_counter() - denoised}
    return Answer(folder, small, result, scale, seconds)


def options_of(model: Model, settings: Settings) -> DenoiseOptions:
    """The options of stage 1 that settings stand for.

    Raises:
        AppError: if the backbone has no such method, or the output scale is out of range.
    """
    if settings.method not in model.methods:
        raise AppError(
            f"{model.backbone.name} at layer {model.backbone.layer} has no method {settings.method!r} here; there are "
            f"{', '.join(model.methods)}. dvit app --denoiser FILE or --artifact FILE gives it more"
        )
    largest = largest_size(model.backbone)
    for name, value, most in (("views", settings.views, MOST_VIEWS), ("scale", settings.scale, MOST_SCALE)):
        if not 1 <= value <= most:
            raise AppError(f"{name} must be 1 to {most} on this page, got {value}")
    if settings.size is not None and settings.size > largest:
        raise AppError(f"size must be at most {largest} pixels on this page, got {settings.size}")
    return DenoiseOptions(method=settings.method, views=settings.views, held_out=_HELD_OUT, size=settings.size)


def largest_size(backbone: Backbone) -> int:
    """The largest side in pixels that the page shows a backbone, 1.5 times its own: others wait for the answer."""
    return nearest_sizes(backbone.default_size * 3 // 2, backbone.patch_size, backbone.stride)[0]


def _cleaner(model: Model, settings: Settings) -> dict[str, Any]:
    if settings.method == "exact":
        return {} if model.fits_artifact else {"artifact": model.artifact}
    needs = KINDS[settings.method].needs
    return {} if needs is None else {needs: getattr(model, needs)}


def draw_sheet(found: Answer) -> Path:
    """The picture that `dvit denoise` draws, as a file beside the features; drawn once."""
    from denoising_vit.maps import draw_panel  # takes seconds to import

    path = found.features.with_suffix(".panel.png")
    if not path.exists():
        with atomic_path(path) as temporary:
            draw_panel(found.photo, found.result, temporary, upsample=found.scale)
    return path


def shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    """A photo (H, W, 3) with its longer side at most ``side`` pixels, and no side less than one."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return np.array(image)
