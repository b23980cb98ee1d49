"""Answers: denoised features of a photo in the file format of `dvit denoise`, kept temporarily in private folders."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from denoising_vit.artifact import NONE
from denoising_vit.backbones import Backbone
from denoising_vit.data.photos import read_photo_bytes, shrunk
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.denoise import denoise_image
from denoising_vit.errors import AppError, PhotoError
from denoising_vit.extractors import KINDS
from denoising_vit.files import atomic_path
from denoising_vit.progress import OnProgress
from denoising_vit.show.app.models import Model, Models
from denoising_vit.views.patch_grid import nearest_sizes

#: Maximum photo size in pixels; its float copy takes 12 bytes per pixel, for each of many visitors.
MAX_PIXELS = 50_000_000

#: Longer side of the photo that is kept with an answer.
_SHOWN = 1200

#: Maximum number of views and output scale, because other visitors wait.
MOST_VIEWS, MOST_SCALE = 128, 4

_HELD_OUT = 8

#: Maximum number of characters of a photo's name in the names of its results.
_NAME = 80

#: Seconds until an answer is removed.
LIFETIME = 3600.0

#: Maximum number of answers; the oldest are removed first.
MOST = 64


class Keep:
    """Private folders for answers and for served files, removed at the end of the context."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="dvit-app-"))  # mode 0700
        self._answers = self._root / "answers"
        self.served = self._root / "served"
        for folder in (self._answers, self.served):
            folder.mkdir()

    def new(self) -> Path:
        """Create an empty folder; remove answers that are too old or too many."""
        ages = sorted((folder.stat().st_mtime, folder) for folder in self._answers.iterdir())
        stale = sum(age < time.time() - LIFETIME for age, _ in ages)
        for _, folder in ages[: max(stale, len(ages) - MOST + 1)]:
            self.forget(folder)
        return Path(tempfile.mkdtemp(dir=self._answers))

    def forget(self, folder: Path | None) -> None:
        """Remove an answer, if it still exists."""
        if folder is not None and folder.parent == self._answers:
            shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> Keep:
        return self

    def __exit__(self, *_exception: object) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


@dataclass(frozen=True)
class Settings:
    """Settings of one request; ``views``, ``wide`` (wide crops) and ``scale`` (upsampling) apply to exact only."""

    backbone: str
    method: str
    layer: int = -1
    size: int | None = None
    views: int = 32
    wide: bool = False
    scale: int = 1


@dataclass(frozen=True, eq=False)
class Answer:
    """The result for one photo, in a folder; ``photo`` is (H, W, 3) uint8, at most 1,200 pixels on a side."""

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
        """Read the files of :func:`answer`; AppError if they have been removed."""
        try:
            with Image.open(folder / "photo.png", formats=["PNG"]) as image:
                photo = np.array(image.convert("RGB"))
            result = Decomposition.load(next(folder.glob("*.safetensors")))
        except (OSError, StopIteration) as error:
            raise AppError("this result has been deleted; denoise the photo again") from error
        return cls(folder, photo, result, result.info["upsample"], {})


def read_upload(path: Path) -> np.ndarray:
    """An uploaded photo or a sample as (H, W, 3) uint8; PhotoError, without its folder, if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PhotoError(f"{path.name} has been deleted; choose or upload it again") from error
    return read_photo_bytes(content, path.name, max_pixels=MAX_PIXELS)


def answer(models: Models, keep: Keep, photo: Path, settings: Settings, progress: OnProgress | None = None) -> Answer:
    """Denoise a photo's features and write the answer's files; an exception from ``progress`` cancels the work.

    Raises:
        PhotoError: if the photo cannot be read.
        AppError: if the backbone is unavailable, or does not support the method.
        BackboneError: if the layer does not exist.
        SizeError, PlanError: if size or views are invalid.
    """
    started = time.perf_counter()
    pixels = read_upload(photo)
    read = time.perf_counter()
    model = models.get(settings.backbone, settings.layer)
    result = denoise_image(
        model.backbone, pixels, progress=progress, options=options_of(model, settings), **cleaner_of(model, settings)
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
    """Stage 1 options; AppError if the backbone does not support the method, or a setting is out of range."""
    if settings.method not in model.methods:
        raise AppError(
            f"{model.backbone.name} at layer {model.backbone.layer} does not support method {settings.method!r}; "
            f"available: {', '.join(model.methods)}. Add others with dvit app --denoiser FILE or --artifact FILE"
        )
    largest = largest_size(model.backbone)
    for name, value, most in (("views", settings.views, MOST_VIEWS), ("scale", settings.scale, MOST_SCALE)):
        if not 1 <= value <= most:
            raise AppError(f"{name} must be between 1 and {most} on this page, got {value}")
    if settings.size is not None and settings.size > largest:
        raise AppError(f"size must be at most {largest} pixels on this page, got {settings.size}")
    area = DenoiseOptions.context().area if settings.wide else DenoiseOptions.area
    return DenoiseOptions(
        method=settings.method, views=settings.views, held_out=_HELD_OUT, size=settings.size, area=area
    )


def largest_size(backbone: Backbone) -> int:
    """Maximum side in pixels on the page: 1.5 times the backbone's own, because other visitors wait."""
    return nearest_sizes(backbone.default_size * 3 // 2, backbone.patch_size, backbone.stride)[0]


def cleaner_of(model: Model, settings: Settings) -> dict[str, Any]:
    """The cleaner of the method, as an option of `denoise_image`."""
    if settings.method == "exact":
        if settings.wide:  # wide crops cannot separate an artifact from content
            return {"artifact": model.artifact or NONE}
        return {} if model.fits_artifact else {"artifact": model.artifact}
    uses = KINDS[settings.method].uses
    return {uses: getattr(model, uses)} if uses in ("artifact", "denoiser") else {}


def draw_sheet(found: Answer) -> Path:
    """The picture of `dvit denoise` as a file next to the features, drawn on first use."""
    from denoising_vit.maps import draw_panel  # takes seconds to import

    path = found.features.with_suffix(".panel.png")
    if not path.exists():
        with atomic_path(path) as temporary:
            draw_panel(found.photo, found.result, temporary, upsample=found.scale)
    return path
