"""One pair of photos with the same keypoints, and numbers from files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from denoising_vit.errors import EvaluationError

#: (x, y) in pixels from the top left one, whose middle is (0, 0).
Point = tuple[float, float]

#: No photo is so large; a number that is not finite is not less.
_FAR = 1e9


@dataclass(frozen=True)
class KeypointPair:
    """Two photos of things of one kind, and where both show the same.

    Attributes:
        name: of its file.
        source: id of the photo whose keypoints are given.
        target: id of the photo in which they are looked for.
        source_points: in pixels of the source.
        target_points: where they are right, in pixels of the target.
        box: x0, y0, x1, y1 of the object in the target, in pixels.
    """

    name: str
    source: str
    target: str
    source_points: tuple[Point, ...]
    target_points: tuple[Point, ...]
    box: tuple[float, float, float, float]

    @property
    def side(self) -> float:
        """The larger side of the target's box in pixels."""
        x0, y0, x1, y1 = self.box
        return max(x1 - x0, y1 - y0)


@dataclass(frozen=True)
class Written:
    """A pair as its file has it, and what it says of the sizes (W, H) of its photos, if anything."""

    pair: KeypointPair
    sizes: tuple[tuple[int, int] | None, tuple[int, int] | None]


def numbers(content: Mapping[str, Any], key: str, each: int) -> list[list[float]]:
    """Rows of ``each`` finite numbers.

    Raises:
        EvaluationError: if there is anything else under this key.
    """
    rows = content[key]
    if not (
        isinstance(rows, list)
        and all(isinstance(row, list) and len(row) == each and all(map(_is_number, row)) for row in rows)
    ):
        raise EvaluationError(f"{key}: expected {each} finite numbers each, got {json.dumps(rows)[:80]}")
    return [[float(value) for value in row] for row in rows]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _FAR
