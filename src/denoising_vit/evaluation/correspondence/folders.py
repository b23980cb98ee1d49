"""Which of the known data sets a folder holds, and what is in a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from denoising_vit.data.folders import image_names
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.layouts import listed, visible


@dataclass(frozen=True)
class Arrangement:
    """What has to be where.

    Attributes:
        layout: its name.
        roots: places below the given folder where it may begin.
        required: folders that have to be there.
        words: the same for people.
    """

    layout: str
    roots: tuple[str, ...]
    required: tuple[str, ...]
    words: str


DAVIS = Arrangement(
    "davis",
    (".", "DAVIS"),
    ("JPEGImages", "Annotations"),
    "DAVIS (frames in JPEGImages/480p/<sequence> and masks of the same names in Annotations/480p/<sequence>)",
)

SPAIR = Arrangement(
    "spair",
    (".", "SPair-71k"),
    ("PairAnnotation", "JPEGImages"),
    "SPair-71k (pairs in PairAnnotation/<split>/*.json and photos in JPEGImages/<category>)",
)

KEYPOINTS = Arrangement(
    "keypoints",
    (".",),
    ("images", "keypoints"),
    "a folder of keypoints (photos in images/ and their keypoints in files of the same names in keypoints/*.json)",
)


def locate(path: Path, arrangements: Sequence[Arrangement]) -> tuple[Arrangement, Path]:
    """Which arrangement a folder has, and where it begins.

    Raises:
        EvaluationError: if it has none of them, or there is no folder.
    """
    expected = " or ".join(arrangement.words for arrangement in arrangements)
    try:
        if not path.is_dir():
            what = "a file" if path.exists() else "nothing"
            raise EvaluationError(f"{path}: expected the folder of a data set, found {what} there")
        for arrangement in arrangements:
            for below in arrangement.roots:
                root = path / below
                if all((root / name).is_dir() for name in arrangement.required):
                    return arrangement, root
        raise EvaluationError(f"{path}: expected {expected}; found {listed(path)}")
    except OSError as error:  # a folder that may not be looked into, a name too long for the file system
        raise EvaluationError(f"{path}: cannot be read ({error.strerror or error})") from error


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; none where it is none."""
    return sorted(entry.name for entry in visible(folder) if entry.is_dir()) if folder.is_dir() else []


def images_in(folder: Path) -> list[str]:
    """Names of the image files in a folder, in the order of the numbers in them; none where it is none."""
    if not folder.is_dir():
        return []
    names = image_names((entry.name for entry in visible(folder) if entry.is_file()), str(folder))
    return sorted(names, key=_by_number)


def _by_number(name: str) -> tuple[list[str | int], str]:
    """Frame 9 comes before frame 10, whether or not numbers have zeros in front."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name
