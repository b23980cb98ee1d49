"""Pairs of photos with the same keypoints: SPair-71k (Min et al. 2019), or a folder of keypoints."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from denoising_vit.data import Skipped
from denoising_vit.data.photos import read_photo
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.correspondence.davis import DAVIS, ClipData, open_clips
from denoising_vit.evaluation.data import Box, EvaluationData, EvaluationImage, EvaluationSet, described
from denoising_vit.evaluation.layouts import (
    Layout,
    Unread,
    at_most,
    find_layout,
    folders_in,
    images_in,
    inspect_all,
    read_names,
    readable,
    require_usable,
)
from denoising_vit.files import parse_json

#: (x, y) in pixels; the centre of the top left pixel is (0, 0).
Point = tuple[float, float]

#: Upper limit of coordinates; it excludes infinity and NaN.
_LIMIT = 1e9


@dataclass(frozen=True)
class KeypointPair:
    """Two photos of objects of one kind with corresponding keypoints.

    Attributes:
        name: name of the pair's file.
        source: id of the photo with given keypoints.
        target: id of the photo to search.
        source_points: keypoints in pixels of the source.
        target_points: correct matches in pixels of the target.
        box: x0, y0, x1, y1 of the object in the target, in pixels.
    """

    name: str
    source: str
    target: str
    source_points: tuple[Point, ...]
    target_points: tuple[Point, ...]
    box: Box

    @property
    def side(self) -> float:
        """The larger side of the target's box in pixels."""
        x0, y0, x1, y1 = self.box
        return max(x1 - x0, y1 - y0)


@dataclass(frozen=True)
class PairedPhoto(EvaluationImage):
    """A photo of one or more pairs."""

    @property
    def truth_digest(self) -> str:
        """Empty: annotations belong to pairs."""
        return ""


@dataclass(frozen=True)
class PairSet(EvaluationSet[PairedPhoto]):
    """Photos, each once, and their pairs in the order of evaluation."""

    pairs: tuple[KeypointPair, ...] = field(kw_only=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the photos and of the pairs in order."""
        content = hashlib.sha256(EvaluationSet(self.split, self.images).digest.encode())
        for pair in self.pairs:
            content.update(json.dumps(asdict(pair)).encode())  # escapes non-ASCII characters
        return content.hexdigest()


@dataclass(frozen=True)
class PairData(EvaluationData[PairSet]):
    """Pairs of photos in one split."""

    @property
    def pairs(self) -> tuple[KeypointPair, ...]:
        """All pairs."""
        return self.val.pairs


class _Annotated(NamedTuple):
    """A pair, and the sizes (W, H) of its photos if its file has them."""

    pair: KeypointPair
    sizes: tuple[tuple[int, int] | None, tuple[int, int] | None] = (None, None)


#: Function that finds the pairs of a split below a root, up to a maximum number (0 for all).
Finder = Callable[[Path, str, int], list[_Annotated | Skipped]]


def open_pairs(
    path: str | Path, *, split: str = "test", pairs: int = 0, progress: Callable[[], None] | None = None
) -> PairData:
    """Open pairs in the layout of SPair-71k, or a folder of keypoints, and read every photo once.

    SPair-71k: the pairs of ``Layout/large/<split>.txt`` in that order, or else all in ``PairAnnotation/<split>``;
    photos are in ``JPEGImages/<category>``.

    In a folder of keypoints, ``images/NAME.jpg`` (any format) has ``keypoints/NAME.json``: {"keypoints": {"left eye":
    [x, y], ...}}, in pixels with the origin at the centre of the top left pixel, and optionally "box": [x0, y0, x1, y1]
    of the object; without it, the box encloses all keypoints. Any two photos with common keypoints make two pairs, one
    per direction; photos in subfolders of images/ are paired within their subfolder.

    Args:
        path: the folder.
        split: split of SPair-71k: ``trn``, ``val`` or ``test``; it becomes the evaluated split, ``val``.
        pairs: maximum number of pairs, spread evenly; 0 uses all.
        progress: called after each photo.

    Raises:
        EvaluationError: if the layout or the split is unknown, or no pair is usable.
    """
    layout, root = find_layout(Path(path), [SPAIR, KEYPOINTS])
    with readable(root):
        found = layout.open(root, split, pairs)
        folder = root / layout.required[0]
        pairs_found = [one.pair for one in found if isinstance(one, _Annotated)]
        ids = sorted({id for pair in pairs_found for id in (pair.source, pair.target)})
        usable, failed = inspect_all(_read_photo, [Unread(id, folder / id) for id in ids], progress)
    photos: dict[str, PairedPhoto | str] = {photo.id: photo for photo in usable}
    photos |= {entry.item: f"{folder / entry.item}: {entry.reason}" for entry in failed}
    checked = [one if isinstance(one, Skipped) else _checked(one, photos) for one in found]
    kept = tuple(one for one in checked if isinstance(one, KeypointPair))
    skipped = tuple(one for one in checked if isinstance(one, Skipped))
    require_usable(kept, "pairs of photos with keypoints", len(checked), skipped, root)
    used = {id for pair in kept for id in (pair.source, pair.target)}
    images = tuple(photo for photo in usable if photo.id in used)
    note, name = f"{len(kept)} pairs of {len(images)} photos", root.resolve().name
    if layout is SPAIR:
        note, name = f"{note}, split {split}", "SPair-71k" if split == "test" else f"SPair-71k {split}"
    return PairData(name, layout.name, (PairSet("val", images, skipped=skipped, pairs=kept),), note)


def _read_photo(unread: Unread) -> PairedPhoto:
    return PairedPhoto(**described("val", unread.id, unread.photo, read_photo(unread.photo)))


def _checked(annotated: _Annotated, photos: Mapping[str, PairedPhoto | str]) -> KeypointPair | Skipped:
    """The pair, if its photos are readable and contain its keypoints."""
    pair = annotated.pair
    sides = (pair.source, pair.source_points), (pair.target, pair.target_points)
    for (id, points), size in zip(sides, annotated.sizes, strict=True):
        photo = photos[id]
        if isinstance(photo, str):
            return Skipped(pair.name, photo)
        if reason := _misplaced(photo, points, size):
            return Skipped(pair.name, f"{photo.photo}: {reason}")
    return pair


def _misplaced(photo: PairedPhoto, points: Sequence[Point], size: tuple[int, int] | None) -> str | None:
    there = f"{photo.width} x {photo.height}"
    if size not in (None, (photo.width, photo.height)):
        return f"the keypoints are for a photo of {size[0]} x {size[1]} pixels, but this photo has {there}"
    # The far border is allowed: Pascal VOC, the source of the photos, counts pixels from 1.
    for x, y in points:
        if not (0 <= x <= photo.width and 0 <= y <= photo.height):
            return f"keypoint {x:g}, {y:g} is outside the photo of {there} pixels"
    return None


def _find_spair(root: Path, split: str, count: int) -> list[_Annotated | Skipped]:
    folder = root / "PairAnnotation" / split
    if not split or not folder.is_dir():
        there = ", ".join(folders_in(root / "PairAnnotation")) or "none"
        raise EvaluationError(f"{root}: expected pairs of the split {split!r} in PairAnnotation; found splits: {there}")
    source = root / "Layout" / "large" / f"{split}.txt"
    if source.is_file():
        names, _ = read_names(source)
    else:
        names = sorted(entry.stem for entry in folder.iterdir() if entry.suffix == ".json")
        if not names:
            raise EvaluationError(f"{folder}: expected pairs, found none")
    return [_spair_pair(folder / f"{name}.json", name) for name in at_most(names, count, "pairs")]


def _spair_pair(path: Path, name: str) -> _Annotated | Skipped:
    try:
        return _spair_content(name, parse_json(path.read_bytes()))
    except FileNotFoundError:
        return Skipped(name, f"no such file: {path}")
    except EvaluationError as error:
        return Skipped(name, f"{path}: {error}")
    except (OSError, ValueError) as error:
        return Skipped(name, f"{path}: expected a pair as JSON ({error})")


def _spair_content(name: str, content: object) -> _Annotated:
    if not isinstance(content, dict):
        raise EvaluationError(f"expected a pair with its keypoints, got {type(content).__name__}")
    needed = ("category", "src_imname", "trg_imname", "src_kps", "trg_kps", "trg_bndbox")
    if missing := [key for key in needed if key not in content]:
        raise EvaluationError(f"expected {', '.join(needed)}; {', '.join(missing)} missing")
    source, target = (_points(content[key], key) for key in ("src_kps", "trg_kps"))
    if not source or len(source) != len(target):
        raise EvaluationError(f"expected equal numbers of keypoints, got {len(source)} and {len(target)}")
    ids = _photo_id(content, "src_imname"), _photo_id(content, "trg_imname")
    pair = KeypointPair(name, *ids, source, target, _box(content["trg_bndbox"], "trg_bndbox"))
    return _Annotated(pair, (_size(content, "src_imsize"), _size(content, "trg_imsize")))


def _photo_id(content: Mapping[str, Any], key: str) -> str:
    """The photo's path below JPEGImages; path separators and parent folders are rejected."""
    parts = content["category"], content[key]
    for part in parts:
        if not isinstance(part, str) or part in ("", ".", "..") or "/" in part or "\\" in part or "\0" in part:
            raise EvaluationError(f"expected names in category and {key}, got {json.dumps(parts)[:80]}")
    return "/".join(parts)


def _size(content: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    match content.get(key):
        case [int(width), int(height), *_]:
            return width, height
    return None


def _find_keypoints(root: Path, _split: str, count: int) -> list[_Annotated | Skipped]:
    found: list[_Annotated | Skipped] = []
    photos: list[tuple[Path, str, dict[str, Point], Box]] = []
    for below in (Path(), *map(Path, folders_in(root / "images"))):
        for name in images_in(root / "images" / below):
            path, id = (root / "keypoints" / below / name).with_suffix(".json"), (below / name).as_posix()
            try:
                photos.append((below, id, *_keypoints(parse_json(path.read_bytes()))))
            except (OSError, ValueError, EvaluationError) as error:
                reason = "no such file" if isinstance(error, FileNotFoundError) else error
                found.append(Skipped(id, f"{path}: expected keypoints as JSON ({reason})"))
    shared = [
        (one, other)
        for one, other in itertools.permutations(photos, 2)
        if one[0] == other[0] and one[2].keys() & other[2].keys()
    ]
    for (_, source, points, _), (_, target, matches, box) in at_most(shared, count, "pairs"):
        names = [name for name in points if name in matches]
        given, wanted = tuple(points[name] for name in names), tuple(matches[name] for name in names)
        found.append(_Annotated(KeypointPair(f"{source} {target}", source, target, given, wanted, box)))
    if not found:
        raise EvaluationError(f"{root}: expected at least two photos in images/ with common keypoints, found none")
    return found


def _keypoints(content: object) -> tuple[dict[str, Point], Box]:
    """A photo's keypoints by name, and the box of its object."""
    named = content.get("keypoints") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(named, Mapping) or not named:
        raise EvaluationError('expected {"keypoints": {"left eye": [x, y], ...}} with at least one keypoint')
    points = _points(list(named.values()), "keypoints")
    x, y = zip(*points, strict=True)
    around = [min(x), min(y), max(x) + 1, max(y) + 1]  # the last pixel is inside
    return dict(zip(named, points, strict=True)), _box(content.get("box", around), "box")


def _points(rows: object, key: str) -> tuple[Point, ...]:
    return tuple((x, y) for x, y in _numbers(rows, key, 2))


def _box(row: object, key: str) -> Box:
    ((x0, y0, x1, y1),) = _numbers([row], key, 4)
    if not (x1 > x0 and y1 > y0):
        raise EvaluationError(f"expected a box x0, y0, x1, y1 with an area ({key}), got {x0}, {y0}, {x1}, {y1}")
    return x0, y0, x1, y1


def _numbers(rows: object, key: str, each: int) -> list[list[float]]:
    """Rows of ``each`` finite numbers."""
    if not (
        isinstance(rows, list)
        and all(isinstance(row, list) and len(row) == each and all(map(_is_number, row)) for row in rows)
    ):
        raise EvaluationError(f"{key}: expected {each} finite numbers each, got {json.dumps(rows)[:80]}")
    return [[float(value) for value in row] for row in rows]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LIMIT


#: Pairs, for keypoint matching. The first required folder has the photos.
SPAIR: Layout[Finder] = Layout(
    "SPair-71k", ("JPEGImages", "PairAnnotation"), _find_spair, roots=(".", "SPair-71k"), name="spair"
)
KEYPOINTS: Layout[Finder] = Layout(
    "photos with keypoints in JSON files of the same names", ("images", "keypoints"), _find_keypoints, name="keypoints"
)


def open_correspondence(
    path: str | Path,
    *,
    sequences: int = 0,
    split: str = "test",
    pairs: int = 0,
    progress: Callable[[], None] | None = None,
) -> ClipData | PairData:
    """Open videos in the layout of DAVIS, pairs in that of SPair-71k, or a folder of keypoints.

    Reads at most ``sequences`` videos or ``pairs`` pairs, spread evenly; 0 reads all.
    """
    layout, _ = find_layout(Path(path), [SPAIR, DAVIS, KEYPOINTS])
    if layout is DAVIS:
        return open_clips(path, progress=progress, sequences=sequences)
    return open_pairs(path, split=split, pairs=pairs, progress=progress)
