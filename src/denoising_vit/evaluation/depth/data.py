"""Depth data: NYUv2 as published, or folders of photos and depth maps."""

from __future__ import annotations

import functools
import itertools
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from denoising_vit.data import Skipped
from denoising_vit.data.photos import MAX_PIXELS, photo_digest, read_photo, use_image
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import EvaluationData, EvaluationImage, EvaluationSet, described, shared_photos
from denoising_vit.evaluation.layouts import (
    Layout,
    Pair,
    Pairs,
    at_most,
    check_same_size,
    find_layout,
    inspect_all,
    pairs_in_folders,
    read_text,
    require_usable,
)

#: Layout of NYUv2, and the size of its photos.
NYU, NYU_SIZE = "nyu", (480, 640)

#: Plausible range in metres of a data set's median depth, indoors or outdoors.
_PLAUSIBLE = 0.05, 200.0

#: Pillow's grayscale modes with more than 8 bits.
_DEEP = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})


@dataclass(frozen=True)
class DepthImage(EvaluationImage):
    """A photo with its depth map.

    Attributes:
        depth: file of the depth map, which has the photo's size.
        scale: depth map units per metre; 1000 for millimetres.
        depth_digest: digest of the depth map's values.
        least: smallest known depth in metres.
        angle: rotation of photo and depth map about the centre in degrees. Pixels from outside are black, without
            depth.
    """

    depth: Path
    scale: float
    depth_digest: str
    least: float
    angle: float = 0.0

    @property
    def truth_digest(self) -> str:
        """Digest of the depth map and its scale."""
        return f"{self.depth_digest} {self.scale:g}"

    def rotated(self, angle: float) -> Self:
        """The image rotated by an angle in degrees."""
        return replace(self, angle=angle)

    def pixels(self) -> np.ndarray:
        """The photo, (H, W, 3) uint8."""
        pixels = super().pixels()
        if self.angle:
            pixels = np.asarray(Image.fromarray(pixels).rotate(self.angle, Image.Resampling.BILINEAR))
        return pixels

    def metres(self) -> Tensor:
        """Depth (H, W) float32 in metres, 0 where unknown."""
        metres = read_depth(self.depth).astype(np.float32) / self.scale
        if self.angle:
            metres = np.array(Image.fromarray(metres).rotate(self.angle, Image.Resampling.NEAREST))
        return torch.from_numpy(metres)


def read_depth(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a depth map, a grayscale image with at least 16 bits: (H, W) int32, 0 where unknown.

    Raises:
        EvaluationError: if the file is missing, damaged or too large, or has 8 bits or colours.
    """
    try:
        return use_image(path, lambda image: _values(image, path, max_pixels))
    except EvaluationError:
        raise
    except FileNotFoundError as error:
        raise EvaluationError(f"{path}: no such file, expected a depth map") from error
    except UnidentifiedImageError as error:
        raise EvaluationError(f"{path}: not an image file that can be read, expected depth as 16-bit PNG") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, RuntimeError, ... for damaged files
        raise EvaluationError(f"{path}: damaged depth map ({error})") from error


def _values(image: Image.Image, path: Path, max_pixels: int) -> np.ndarray:
    """Values of an opened depth map; checks the header before decoding."""
    if image.width * image.height > max_pixels:
        raise EvaluationError(f"{path}: {image.width} x {image.height} pixels exceed the limit of {max_pixels:,}")
    if image.mode in ("L", "P", "1"):
        raise EvaluationError(
            f"{path}: expected 16-bit depth, got 8 bits, which is too coarse (is it a visualisation of a depth map?); "
            "give the original values as a 16-bit PNG"
        )
    if image.mode not in _DEEP:
        raise EvaluationError(
            f"{path}: expected one 16-bit value per pixel, got an image of mode {image.mode}; give a 16-bit grayscale "
            "PNG"
        )
    return np.asarray(image).astype(np.int32).clip(min=0)  # negative values mark unknown depth


@dataclass(frozen=True)
class DepthData(EvaluationData[EvaluationSet[DepthImage]]):
    """Photos with depth.

    Attributes:
        blocks: for data without splits, number of blocks of consecutive photos; each block is evaluated with probes
            trained on the others. 0 for data with two splits.
        scenes: scene number of each ``val`` photo by id, from :func:`scenes_of`; empty if unknown.
    """

    blocks: int = 0
    scenes: Mapping[str, int] = field(default_factory=dict)

    @property
    def over(self) -> str:
        """Unit of the groups that intervals are taken over: blocks, scenes if they are known, or images."""
        return "blocks" if self.blocks else "scenes" if self.scenes else "images"

    @property
    def groups(self) -> np.ndarray | None:
        """The scene of each ``val`` photo, (photos,) int64; None if unknown."""
        return np.array([self.scenes[image.id] for image in self.val.images]) if self.scenes else None


def open_depth(
    path: str | Path,
    *,
    scale: float = 1000.0,
    images: int = 0,
    blocks: int = 5,
    progress: Callable[[], None] | None = None,
) -> DepthData:
    """Open depth data, reading every photo and depth map once.

    Args:
        path: the folder.
        scale: depth map units per metre; 1000 for millimetres.
        images: maximum number of images per split, spread evenly; 0 uses all.
        blocks: for data without splits, number of blocks of consecutive photos; each is evaluated in turn.
        progress: called after each photo.

    Raises:
        EvaluationError: if the layout is unknown, a split has no usable photo, there are too few photos for the
            blocks, or the depths are implausible at this scale.
    """
    if not 0 < scale < float("inf"):
        raise EvaluationError(f"depth scale must be a positive number of units per metre, got {scale}")
    path = Path(path)
    layout, root = find_layout(path, _LAYOUTS)
    if layout.name != NYU and any((root / name).is_file() for name in _LAYOUTS[0].required):
        find_layout(path, _LAYOUTS[:1])  # raises: NYUv2 with a missing list must not match another layout
    splits, files = [], layout.open(root)
    for split, (pairs, skipped) in files.items():
        pairs = at_most(pairs, images)
        inspect = functools.partial(_inspected, split=split, scale=scale, layout=layout.name)
        usable, failed = inspect_all(inspect, pairs, progress)
        failed = [*skipped, *failed]
        require_usable(usable, f"photos with depth maps in the split {split}", len(pairs), failed, path)
        _require_plausible(path, split, [median for _, median in usable], scale)
        splits.append(EvaluationSet(split, tuple(image for image, _ in usable), skipped=tuple(failed)))
    if len(splits) > 1:
        scenes = scenes_of(*([pair.id for pair in pairs] for pairs, _ in files.values())) if layout.name == NYU else {}
        return DepthData(path.name, layout.name, tuple(splits), shared_photos(*splits), scenes=scenes)
    count = len(splits[0].images)
    if blocks < 2 or count < 2 * blocks:
        raise EvaluationError(
            f"{path}: {count} photos without splits cannot be evaluated in {blocks} blocks; expected at least 2 blocks "
            "and at least twice as many photos as blocks"
        )
    note = f"no splits: {blocks} blocks of consecutive photos are evaluated in turn, with probes trained on the others"
    return DepthData(path.name, layout.name, tuple(splits), note, blocks=blocks)


def _nyu(root: Path) -> dict[str, Pairs]:
    return {"train": _listed(root, root / "nyu_train.txt"), "val": _listed(root, root / "nyu_test.txt")}


def _folder(root: Path) -> Pairs:
    photos, depths = (
        next(root / name for name in names if (root / name).is_dir())
        for names in (("rgb", "images"), ("depth", "depths"))
    )
    return pairs_in_folders(photos, depths, "depth map")


_FOLDERS = "photos and 16-bit depth maps (PNG) of the same names"

#: The first match is used.
_LAYOUTS: Sequence[Layout[Callable[[Path], dict[str, Pairs]]]] = (
    Layout("NYUv2", ("nyu_train.txt", "nyu_test.txt"), _nyu, name=NYU),
    Layout(_FOLDERS, ("rgb|images", "depth|depths"), lambda root: {"val": _folder(root)}, name="folders"),
    Layout(
        f"{_FOLDERS} in two splits",
        ("train/rgb|train/images", "train/depth|train/depths", "val/rgb|val/images", "val/depth|val/depths"),
        lambda root: {split: _folder(root / split) for split in ("train", "val")},
        name="folders",
    ),
)


def _listed(root: Path, path: Path) -> Pairs:
    """Pairs of a list, sorted by photo as in the published code, without lines that have no depth map."""
    pairs: dict[str, Pair] = {}
    skipped = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        words = line.split()
        if not words:
            continue
        photo, depth = (word.lstrip("/\\") for word in (*words, "")[:2])
        if not depth:
            reason = f"expected a photo, a depth map and a focal length: {line}"
            skipped.append(Skipped(f"{path.name}:{number}", reason))
        elif depth == "None":
            skipped.append(Skipped(photo, "no depth map in the list"))
        elif ".." in (*Path(photo).parts, *Path(depth).parts):
            skipped.append(Skipped(photo, "expected a path below the folder, got one above it"))
        elif photo in pairs:
            skipped.append(Skipped(photo, f"named a second time in {path.name}"))
        else:
            pairs[photo] = Pair(photo, root / photo, root / depth)
    if not pairs:
        raise EvaluationError(f"{path}: expected a photo, a depth map and a focal length per line, found none")
    return Pairs([pairs[photo] for photo in sorted(pairs)], skipped)


def scenes_of(train: Sequence[str], val: Sequence[str]) -> dict[str, int]:
    """Group the photos of ``val`` so that no scene is in two groups: group number by id.

    Frames of NYUv2's labelled set are numbered scene by scene, and each scene is in one split only. So if frame numbers
    are unique over both splits, a group is a run of ``val`` photos without a training photo in between: one scene or
    several. Otherwise a group is a folder; the published lists have one per kind of room.

    Args:
        train: ids of the training photos, such as ``bathroom/rgb_00045.jpg``.
        val: ids of the evaluated photos.

    Returns:
        The groups; empty if the photos are neither numbered nor in folders.
    """
    numbers = {id: re.findall(r"\d+", Path(id).stem)[-1:] for id in (*train, *val)}
    if all(numbers.values()) and len({int(number) for (number,) in numbers.values()}) == len(numbers):
        held_out = set(val)
        order = sorted(numbers, key=lambda id: int(numbers[id][0]))
        runs = [list(run) for is_val, run in itertools.groupby(order, held_out.__contains__) if is_val]
    else:
        runs = [list(run) for _, run in itertools.groupby(sorted(val, key=posixpath.dirname), posixpath.dirname)]
    return {id: scene for scene, run in enumerate(runs) for id in run} if len(runs) > 1 else {}


def _inspected(pair: Pair, split: str, scale: float, layout: str) -> tuple[DepthImage, float]:
    """The image and its median depth in metres."""
    photo, values = read_photo(pair.photo), read_depth(pair.mask)
    check_same_size(photo.shape, values.shape, pair.mask, "depth map")
    height, width = values.shape
    if layout == NYU and (height, width) != NYU_SIZE:
        raise EvaluationError(f"expected 640 x 480 pixels, as NYUv2 has, got {width} x {height}")
    known = values[values > 0]
    if not known.size:
        raise EvaluationError("no pixel of the depth map has a depth")
    image = DepthImage(
        **described(split, pair.id, pair.photo, photo),
        depth=pair.mask,
        scale=scale,
        depth_digest=photo_digest(values.astype("<i4")),
        least=float(known.min()) / scale,
    )
    return image, float(np.median(known)) / scale


def _require_plausible(path: Path, split: str, medians: Sequence[float], scale: float) -> None:
    median, (low, high) = float(np.median(medians)), _PLAUSIBLE
    if not low <= median <= high:
        raise EvaluationError(
            f"{path}: at {scale:g} units per metre, half of the depths of {split} are below {median:.3g} m, which is "
            f"implausible (expected {low:g} to {high:g}); give the right --depth-scale, such as 1000 for millimetres"
        )


def block_splits(data: DepthData) -> list[tuple[EvaluationSet[DepthImage], EvaluationSet[DepthImage]]]:
    """(train, val) for each block in turn; (train, val) once for data with two splits.

    Photos next to a block are left out of its training set, because they are nearly identical to its first and
    last photos.
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
