"""Pairs of photos with the same keypoints, as SPair-71k has them (Min et al. 2019)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from denoising_vit.data import Skipped, spread
from denoising_vit.data.photos import photo_digest, read_photo
from denoising_vit.errors import EvaluationError, PhotoError
from denoising_vit.evaluation.correspondence.folders import KEYPOINTS, SPAIR, folders_in, locate
from denoising_vit.evaluation.correspondence.keypoint_folder import keypoint_folder
from denoising_vit.evaluation.correspondence.pair import KeypointPair, Point, Written, numbers
from denoising_vit.evaluation.data import JudgedImage, JudgedSet, SplitData
from denoising_vit.evaluation.layouts import read_text

#: Decoding releases Python's lock; more threads than this gain little and hold more photos in memory.
_THREADS = 4


@dataclass(frozen=True)
class PairedPhoto(JudgedImage):
    """A photo that pairs are made of."""

    @property
    def truth_digest(self) -> str:
        """Empty: what is known is known of pairs."""
        return ""


@dataclass(frozen=True)
class PairSet(JudgedSet[PairedPhoto]):
    """The photos, each once, and their pairs.

    Attributes:
        pairs: in the order in which they are judged.
    """

    pairs: tuple[KeypointPair, ...] = field(kw_only=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the photos, and of the pairs in their order."""
        content = hashlib.sha256(JudgedSet(self.split, self.images).digest.encode())
        for pair in self.pairs:
            content.update(json.dumps(asdict(pair)).encode())  # escapes what is not ASCII
        return content.hexdigest()


@dataclass(frozen=True)
class PairData(SplitData[PairedPhoto]):
    """Pairs of photos, in one split.

    Attributes:
        splits: ``val`` alone, whichever of the data set's splits it is.
    """

    splits: tuple[PairSet, ...]

    @property
    def val(self) -> PairSet:
        """What is judged."""
        return self.splits[-1]

    @property
    def pairs(self) -> tuple[KeypointPair, ...]:
        """All of them."""
        return self.val.pairs


def open_pairs(
    path: str | Path, *, split: str = "test", pairs: int = 0, progress: Callable[[], None] | None = None
) -> PairData:
    """Opens pairs in the layout of SPair-71k, or a folder of keypoints; every photo that is taken is read once.

    Pairs of SPair-71k are those of ``Layout/large/<split>.txt``, in its order, or all in ``PairAnnotation/<split>``;
    photos are in ``JPEGImages/<category>``. For a folder of keypoints see `keypoint_folder`.

    Args:
        path: the folder.
        split: of SPair-71k: ``trn``, ``val`` or ``test``; it becomes the split ``val``, which is what is judged.
        pairs: at most so many, spread evenly; 0 takes all.
        progress: called after each photo.

    Raises:
        EvaluationError: if there is no such layout or split, or no pair can be used.
    """
    if pairs < 0:
        raise EvaluationError(f"expected a number of pairs of at least 1, or 0 for all, got {pairs}")
    arrangement, root = locate(Path(path), [SPAIR, KEYPOINTS])
    try:
        if arrangement is SPAIR:
            names, folder = _names(root, split), root / "JPEGImages"
            found = [_parse(root, split, names[index]) for index in spread(len(names), pairs)]
        else:
            found, folder = keypoint_folder(root, pairs), root / "images"
        whole = [one for one in found if isinstance(one, Written)]
        photos = _photos(folder, {id for one in whole for id in (one.pair.source, one.pair.target)}, progress)
    except OSError as error:  # a folder that may not be looked into
        raise EvaluationError(f"{root}: cannot be read ({error.strerror or error})") from error
    checked = [one if isinstance(one, Skipped) else _checked(one, photos) for one in found]
    kept = tuple(one for one in checked if isinstance(one, KeypointPair))
    skipped = tuple(one for one in checked if isinstance(one, Skipped))
    if not kept:
        raise EvaluationError(
            f"{root}: expected pairs of photos with keypoints, none of {len(checked)} can be used; the first reason: "
            f"{skipped[0].item}: {skipped[0].reason}"
        )
    used = sorted({id for pair in kept for id in (pair.source, pair.target)})
    images = tuple(photo for id in used if isinstance(photo := photos[id], PairedPhoto))
    note, name = f"{len(kept)} pairs of {len(images)} photos", root.resolve().name
    if arrangement is SPAIR:
        note, name = f"{note}, split {split}", "SPair-71k" if split == "test" else f"SPair-71k {split}"
    return PairData(name, arrangement.layout, (PairSet("val", images, skipped=skipped, pairs=kept),), note)


def _names(root: Path, split: str) -> list[str]:
    folder = root / "PairAnnotation" / split
    if not split or not folder.is_dir():
        there = ", ".join(folders_in(folder.parent if split else folder)) or "none"
        raise EvaluationError(f"{root}: expected pairs of the split {split!r} in PairAnnotation; found splits: {there}")
    source = root / "Layout" / "large" / f"{split}.txt"
    if source.is_file():
        names = list(dict.fromkeys(line.strip() for line in read_text(source).split("\n") if line.strip()))
    else:
        source, names = folder, sorted(entry.stem for entry in folder.iterdir() if entry.suffix == ".json")
    if not names:
        raise EvaluationError(f"{source}: expected pairs, found none")
    return names


def _parse(root: Path, split: str, name: str) -> Written | Skipped:
    path = root / "PairAnnotation" / split / f"{name}.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Skipped(name, f"no such file: {path}")
    except (OSError, ValueError, RecursionError) as error:
        return Skipped(name, f"{path}: expected a pair as JSON ({error})")
    try:
        return _written(name, content)
    except EvaluationError as error:
        return Skipped(name, f"{path}: {error}")


def _written(name: str, content: object) -> Written:
    """A pair from its file's content.

    Raises:
        EvaluationError: if something is missing, or is not what it should be.
    """
    if not isinstance(content, dict):
        raise EvaluationError(f"expected a pair with its keypoints, got {type(content).__name__}")
    needed = ("category", "src_imname", "trg_imname", "src_kps", "trg_kps", "trg_bndbox")
    if missing := [key for key in needed if key not in content]:
        raise EvaluationError(f"expected {', '.join(needed)}; {', '.join(missing)} missing")
    source, target = (numbers(content, key, 2) for key in ("src_kps", "trg_kps"))
    if not source or len(source) != len(target):
        raise EvaluationError(f"expected as many keypoints in both photos, got {len(source)} and {len(target)}")
    (x0, y0, x1, y1), *_ = numbers({"trg_bndbox": [content["trg_bndbox"]]}, "trg_bndbox", 4)
    if not (x1 > x0 and y1 > y0):
        raise EvaluationError(f"expected a box x0, y0, x1, y1 with an area (trg_bndbox), got {x0}, {y0}, {x1}, {y1}")
    pair = KeypointPair(
        name,
        _id(content, "src_imname"),
        _id(content, "trg_imname"),
        tuple((x, y) for x, y in source),
        tuple((x, y) for x, y in target),
        (x0, y0, x1, y1),
    )
    return Written(pair, (_size(content, "src_imsize"), _size(content, "trg_imsize")))


def _id(content: Mapping[str, Any], key: str) -> str:
    """The photo's path below JPEGImages; parts that would lead elsewhere are none."""
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


def _photos(folder: Path, ids: Iterable[str], progress: Callable[[], None] | None) -> dict[str, PairedPhoto | str]:
    """Each photo, read once, or why it cannot be used."""
    found: dict[str, PairedPhoto | str] = {}
    names = sorted(ids)
    pool = ThreadPoolExecutor(_THREADS, "pairs")
    try:
        for id, photo in zip(names, pool.map(lambda id: _photo(folder / id, id), names), strict=True):
            found[id] = photo
            if progress is not None:
                progress()
    finally:
        pool.shutdown(cancel_futures=True)  # whoever interrupts does not wait for the rest
    return found


def _photo(path: Path, id: str) -> PairedPhoto | str:
    try:
        pixels = read_photo(path)
    except (PhotoError, OSError) as error:
        return str(error)
    height, width = pixels.shape[:2]
    return PairedPhoto("val", id, path, height, width, photo_digest(pixels))


def _checked(written: Written, photos: Mapping[str, PairedPhoto | str]) -> KeypointPair | Skipped:
    """The pair, if its photos are there and its keypoints in them."""
    pair = written.pair
    sides = (pair.source, pair.source_points), (pair.target, pair.target_points)
    for (id, points), size in zip(sides, written.sizes, strict=True):
        photo = photos[id]
        if isinstance(photo, str):
            return Skipped(pair.name, photo)
        if reason := _misplaced(photo, points, size):
            return Skipped(pair.name, f"{photo.photo}: {reason}")
    return pair


def _misplaced(photo: PairedPhoto, points: Sequence[Point], size: tuple[int, int] | None) -> str | None:
    there = f"{photo.width} x {photo.height}"
    if size not in (None, (photo.width, photo.height)):
        return f"the pair's keypoints are of a photo of {size[0]} x {size[1]} pixels, this one has {there}"
    # The far border is allowed: in Pascal VOC, which the photos are from, the first pixel is number 1.
    for x, y in points:
        if not (0 <= x <= photo.width and 0 <= y <= photo.height):
            return f"keypoint {x:g}, {y:g} is outside of the photo of {there} pixels"
    return None
