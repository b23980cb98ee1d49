"""Photos to begin with: the one in the package, scikit-image's where installed, and those of a folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from denoising_vit.data import find_photos
from denoising_vit.errors import AppError

_SHIPPED = Path(__file__).parent / "samples"

#: Photographs in scikit-image's own folder, all in the public domain.
_SCIKIT_IMAGE = {"astronaut": "astronaut.png", "coffee": "coffee.png", "rocket": "rocket.jpg"}


def find_samples(folder: Path | None = None) -> dict[str, Path]:
    """Sample photos by what they are called, those of the folder first.

    Raises:
        AppError: if a folder is given and holds no photos.
    """
    own = {} if folder is None else _in_folder(folder)
    shipped = {path.stem: path for path in sorted(_SHIPPED.glob("*.jpg"))}
    return own | {name: path for name, path in (shipped | _of_scikit_image()).items() if name not in own}


def _in_folder(folder: Path) -> dict[str, Path]:
    photos, _ = find_photos([str(folder)])
    if not photos:
        raise AppError(f"examples must be a folder with photos, got {folder}, which has no image files")
    return {str(path.relative_to(folder)): path for path in photos}


def _of_scikit_image() -> dict[str, Path]:
    spec = importlib.util.find_spec("skimage")  # found, not imported: that takes a second
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return {name: folder / file for name, file in _SCIKIT_IMAGE.items() if (folder / file).is_file()}
