"""A folder of photos with named keypoints: pairs are made of every two photos that share some."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from denoising_vit.data import Skipped, spread
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.correspondence.folders import folders_in, images_in
from denoising_vit.evaluation.correspondence.pair import KeypointPair, Point, Written, numbers

#: A photo's keypoints by their names, and the box of its object.
_Marked = tuple[dict[str, Point], tuple[float, float, float, float]]


def keypoint_folder(root: Path, pairs: int) -> list[Written | Skipped]:
    """Pairs of photos that share keypoints, in both directions, and what cannot be used.

    ``images/NAME.jpg`` (any format) has ``keypoints/NAME.json``: {"keypoints": {"left eye": [x, y], ...}}, in pixels
    from the middle of the top left one, and perhaps "box": [x0, y0, x1, y1] of the object; without it, the box is the
    one around all its keypoints. Where photos are in folders of images/, pairs are made within these.

    Args:
        root: of images/ and keypoints/.
        pairs: at most so many, spread evenly; 0 takes all.
    """
    found: list[Written | Skipped] = []
    marked: list[tuple[Path, str, _Marked]] = []
    for below in (Path(), *map(Path, folders_in(root / "images"))):
        for name in images_in(root / "images" / below):
            path = (root / "keypoints" / below / name).with_suffix(".json")
            try:
                marked.append((below, (below / name).as_posix(), _marked(path)))
            except (OSError, ValueError, RecursionError, EvaluationError) as error:
                reason = "no such file" if isinstance(error, FileNotFoundError) else error
                found.append(Skipped((below / name).as_posix(), f"{path}: expected keypoints as JSON ({reason})"))
    shared = [
        (one, other)
        for one, other in itertools.permutations(marked, 2)
        if one[0] == other[0] and one[2][0].keys() & other[2][0].keys()
    ]
    for index in spread(len(shared), pairs):
        (_, source, (points, _)), (_, target, (wanted, box)) = shared[index]
        names = [name for name in points if name in wanted]
        at = [tuple(each[name] for name in names) for each in (points, wanted)]
        found.append(Written(KeypointPair(f"{source} {target}", source, target, at[0], at[1], box), (None, None)))
    if not found:
        raise EvaluationError(f"{root}: expected two photos or more in images/ that share keypoints, found none")
    return found


def _marked(path: Path) -> _Marked:
    content = json.loads(path.read_bytes())
    named = content.get("keypoints") if isinstance(content, dict) else None
    if not isinstance(named, Mapping) or not named:
        raise EvaluationError('expected {"keypoints": {"left eye": [x, y], ...}} with at least one keypoint')
    points = numbers({"keypoints": list(named.values())}, "keypoints", 2)
    rows: Any = [content["box"]] if "box" in content else [_around(points)]
    ((x0, y0, x1, y1),) = numbers({"box": rows}, "box", 4)
    if not (x1 > x0 and y1 > y0):
        raise EvaluationError(f"expected a box x0, y0, x1, y1 with an area, got {x0}, {y0}, {x1}, {y1}; give another")
    return {name: (x, y) for name, (x, y) in zip(named, points, strict=True)}, (x0, y0, x1, y1)


def _around(points: list[list[float]]) -> list[float]:
    """The box around points, whose pixels it holds."""
    x, y = zip(*points, strict=True)
    return [min(x), min(y), max(x) + 1, max(y) + 1]
