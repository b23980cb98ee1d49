"""Which depth data a folder holds: NYUv2 as it was published, or folders of photos and depth maps."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from denoising_vit.data import Skipped, spread
from denoising_vit.data.photos import photo_digest, read_photo
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import JudgedSet, SplitData, shared_photos
from denoising_vit.evaluation.depth.images import DepthImage, read_depth
from denoising_vit.evaluation.layouts import Pair, check_count, inspect_all, listed, pairs_in_folders, read_text

#: Layout of NYUv2; its photos are of one size.
NYU, NYU_SIZE = "nyu", (480, 640)

#: Depths in metres between which the middle of all depths is plausible, indoors and outdoors.
_PLAUSIBLE = 0.05, 200.0

#: Names of folders of photos and of depth maps, the first that is there.
_PHOTOS, _DEPTHS = ("rgb", "images"), ("depth", "depths")

#: How pairs of photos and masks are told of.
_MASK = re.compile(r"\ba (second )?mask\b")

_EXPECTED = (
    "expected NYUv2 with nyu_train.txt and nyu_test.txt (photo, depth map and focal length a line), or rgb/ and depth/ "
    "with files of the same names (16-bit PNG), in the folder itself or in train/ and val/"
)


@dataclass(frozen=True)
class DepthData(SplitData[DepthImage]):
    """Photos with depth.

    Attributes:
        blocks: where there is one split alone: how many blocks of consecutive photos are judged in turn, each by
            probes trained on the others; 0 where there are two splits.
    """

    blocks: int = 0


def open_depth(
    path: str | Path,
    *,
    scale: float = 1000.0,
    images: int = 0,
    blocks: int = 5,
    progress: Callable[[], None] | None = None,
) -> DepthData:
    """Opens depth data; every photo and depth map that is taken is read once.

    Args:
        path: the folder.
        scale: units of the depth maps' numbers in a metre; 1000 for millimetres.
        images: at most so many of each split, spread evenly; 0 takes all.
        blocks: where the data has no splits: blocks of consecutive photos that are judged in turn.
        progress: called after each photo.

    Raises:
        EvaluationError: if there is no such layout, nothing usable in a split, too few photos for the blocks, or all
            depths are implausible at this scale.
    """
    check_count(images)
    if not 0 < scale < float("inf"):
        raise EvaluationError(f"depth scale must be a positive number of units in a metre, got {scale}")
    root = Path(path)
    if not root.is_dir():
        raise EvaluationError(f"{root}: {_EXPECTED}; found {'a file' if root.exists() else 'nothing'} there")
    layout, found = _find(root)
    splits = [
        _opened(root, split, layout, pairs, skipped, scale, images, progress)
        for split, (pairs, skipped) in found.items()
    ]
    if len(splits) > 1:
        return DepthData(root.name, layout, tuple(splits), shared_photos(*splits))
    if blocks < 2 or len(splits[0].images) < 2 * blocks:
        raise EvaluationError(
            f"{root}: {len(splits[0].images)} photos without splits cannot be judged in {blocks} blocks; expected 2 "
            "blocks or more, and twice as many photos as blocks"
        )
    note = f"no splits: {blocks} blocks of consecutive photos are judged in turn, probes are trained on the others"
    return DepthData(root.name, layout, tuple(splits), note, blocks=blocks)


_Files = dict[str, tuple[list[Pair], list[Skipped]]]


def _find(root: Path) -> tuple[str, _Files]:
    lists = {"train": root / "nyu_train.txt", "val": root / "nyu_test.txt"}
    there = [path.is_file() for path in lists.values()]
    if all(there):
        return NYU, {split: _listed(root, path) for split, path in lists.items()}
    if any(there):
        missing = next(path.name for path, known in zip(lists.values(), there, strict=True) if not known)
        raise EvaluationError(f"{root} looks like NYUv2, but lacks {missing}")
    if (whole := _folders(root)) is not None:
        return "folders", {"val": whole}
    halves = {split: _folders(root / split) for split in ("train", "val")}
    known = {split: pairs for split, pairs in halves.items() if pairs is not None}
    if len(known) == 2:
        return "folders", known
    raise EvaluationError(f"{root}: {_EXPECTED}; found {listed(root)}")


def _folders(root: Path) -> tuple[list[Pair], list[Skipped]] | None:
    photos, depths = (
        next((root / name for name in names if (root / name).is_dir()), None) for names in (_PHOTOS, _DEPTHS)
    )
    if photos is None or depths is None:
        return None
    pairs, skipped = pairs_in_folders(photos, depths)
    # The words alone: names of files may hold them as well.
    return pairs, [Skipped(item.item, _MASK.sub(r"a \1depth map", item.reason, count=1)) for item in skipped]


def _listed(root: Path, path: Path) -> tuple[list[Pair], list[Skipped]]:
    """Pairs of a list, sorted by photo as the published code does; lines without depth are left out."""
    pairs: dict[str, Pair] = {}
    skipped = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        words = line.split()
        if not words:
            continue
        if len(words) < 2:
            skipped.append(
                Skipped(f"{path.name}:{number}", f"expected a photo, a depth map and a focal length: {line}")
            )
        elif words[1] == "None":
            skipped.append(Skipped(words[0].lstrip("/"), "no depth map in the list"))
        else:
            photo, depth = (word.lstrip("/\\") for word in words[:2])
            if ".." in Path(photo).parts or ".." in Path(depth).parts:
                skipped.append(Skipped(photo, "expected a place below the folder, got one above it"))
            elif photo in pairs:
                skipped.append(Skipped(photo, f"named a second time in {path.name}"))
            else:
                pairs[photo] = Pair(photo, root / photo, root / depth)
    if not pairs:
        raise EvaluationError(f"{path}: expected a photo, a depth map and a focal length a line, found none")
    return [pairs[photo] for photo in sorted(pairs)], skipped


def _opened(
    root: Path,
    split: str,
    layout: str,
    pairs: Sequence[Pair],
    skipped: Sequence[Skipped],
    scale: float,
    images: int,
    progress: Callable[[], None] | None,
) -> JudgedSet[DepthImage]:
    chosen = [pairs[index] for index in spread(len(pairs), images)]
    usable, unusable = inspect_all(lambda pair: _inspected(split, pair, scale, layout), chosen, progress)
    failed = [*skipped, *unusable]
    if not usable:
        first = f"; the first reason: {failed[0].item}: {failed[0].reason}" if failed else ""
        raise EvaluationError(f"{root}: none of {len(pairs)} photos of {split} can be used{first}")
    _require_plausible(root, split, [middle for _, middle in usable], scale)
    return JudgedSet(split, tuple(image for image, _ in usable), skipped=tuple(failed))


def _inspected(split: str, pair: Pair, scale: float, layout: str) -> tuple[DepthImage, float] | Skipped:
    """The image, and the middle of its depths in metres."""
    photo, numbers = read_photo(pair.photo), read_depth(pair.mask)
    if photo.shape[:2] != numbers.shape:
        (height, width), (rows, columns) = photo.shape[:2], numbers.shape
        return Skipped(pair.id, f"the photo has {width} x {height} pixels, its depth map {columns} x {rows}")
    if layout == NYU and numbers.shape != NYU_SIZE:
        return Skipped(pair.id, f"expected 640 x 480 pixels, as NYUv2 has, got {numbers.shape[1]} x {numbers.shape[0]}")
    known = numbers[numbers > 0]
    if not known.size:
        return Skipped(pair.id, "no pixel of the depth map has a depth")
    height, width = numbers.shape
    image = DepthImage(
        split=split,
        id=pair.id,
        photo=pair.photo,
        height=height,
        width=width,
        digest=photo_digest(photo),
        depth=pair.mask,
        scale=scale,
        depth_digest=photo_digest(numbers.astype("<i4")),
        least=float(known.min()) / scale,
    )
    return image, float(np.median(known)) / scale


def _require_plausible(root: Path, split: str, middles: Sequence[float], scale: float) -> None:
    middle, (low, high) = float(np.median(middles)), _PLAUSIBLE
    if not low <= middle <= high:
        raise EvaluationError(
            f"{root}: at {scale:g} units in a metre, half of the depths of {split} are below {middle:.3g} m, which is "
            f"implausible (expected {low:g} to {high:g}); give the right --depth-scale, 1000 for millimetres"
        )


def block_splits(data: DepthData) -> list[tuple[JudgedSet[DepthImage], JudgedSet[DepthImage]]]:
    """(train, val) of each block in turn; the photos beside a block are left out of its training, being nearly in it.

    Of data with two splits, these.
    """
    if not data.blocks:
        return [(data.train, data.val)]
    images = data.val.images
    bounds = [round(block * len(images) / data.blocks) for block in range(data.blocks + 1)]
    return [
        (
            replace(data.val, split="train", images=images[: max(start - 1, 0)] + images[stop + 1 :]),
            replace(data.val, images=images[start:stop]),
        )
        for start, stop in itertools.pairwise(bounds)
    ]
