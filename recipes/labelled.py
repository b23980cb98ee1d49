"""Writes the folder of labelled images that the probes read: photos as WebP, and labels of a 37 x 37 patch grid.

    python recipes/labelled.py --voc VOCdevkit/VOC2012 --camvid DIR --nyu DIR --split train -o OUT

A patch has its most frequent class (255 where most of it has none), or its mean depth in metres (0 where unknown).
Whole images are resized to a square, as for the backbone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

#: Patches along a side, and label pixels per patch along a side.
GRID, EACH = 37, 7

NO_LABEL = 255


def main(given: list[str] | None = None) -> None:
    """Writes OUT/voc, OUT/camvid, OUT/nyu and OUT/labels.npz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, required=True)
    parser.add_argument("--camvid", type=Path, required=True)
    parser.add_argument("--nyu", type=Path, required=True)
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("-o", "--out", type=Path, required=True)
    asked = parser.parse_args(given)
    labels = {}
    for name in ("voc", "camvid", "nyu"):
        pairs = pairs_of(name, getattr(asked, name), asked.split)
        (asked.out / name).mkdir(parents=True)
        for photo, _ in pairs:
            Image.open(photo).convert("RGB").save(asked.out / name / f"{photo.stem}.webp", quality=80, method=3)
        labels[name] = truths(name, pairs)
    np.savez_compressed(asked.out / "labels.npz", **labels)


def pairs_of(name: str, root: Path, split: str) -> list[tuple[Path, Path]]:
    """Photos and label files of a split of a set: voc, camvid or nyu."""
    return {"voc": voc, "camvid": camvid, "nyu": nyu}[name](root, split)


def truths(name: str, pairs: Sequence[tuple[Path, Path]]) -> np.ndarray:
    """Labels (N, GRID, GRID) of the patches, from label files."""
    read = depths if name == "nyu" else classes
    ignored = {"voc": 255, "camvid": 11}.get(name)
    return np.stack([read(truth, ignored) for _, truth in pairs])


def voc(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Photos and masks of a split of VOC 2012, sorted by name."""
    names = sorted((root / f"ImageSets/Segmentation/{split}.txt").read_text().split())
    return [(root / f"JPEGImages/{name}.jpg", root / f"SegmentationClass/{name}.png") for name in names]


def camvid(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Photos and masks of a split of CamVid."""
    photos = sorted((root / split / "images").iterdir())
    return [(photo, root / split / "masks" / f"{photo.stem}.png") for photo in photos]


def nyu(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Photos and depth maps of NYUv2's labelled set; its test list stands for val."""
    rows = (root / f"nyu_{'train' if split == 'train' else 'test'}.txt").read_text().splitlines()
    pairs = [(root / photo, root / depth) for photo, depth, _ in map(str.split, rows)]
    return sorted(pairs, key=lambda pair: pair[0].stem)


def classes(path: Path, ignored: int | None) -> np.ndarray:
    """(GRID, GRID) uint8: the most frequent class of each patch."""
    side = GRID * EACH
    mask = np.array(Image.open(path).resize((side, side), Image.Resampling.NEAREST))
    patches = mask.reshape(GRID, EACH, GRID, EACH).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
    found = np.full((GRID, GRID), NO_LABEL, np.uint8)
    most = np.zeros((GRID, GRID), int)
    for value in np.unique(patches):
        count = (patches == value).sum(-1)
        better = count > most
        found[better], most[better] = NO_LABEL if value == ignored else value, count[better]
    return found


def depths(path: Path, _ignored: int | None) -> np.ndarray:
    """(GRID, GRID) float16: the mean depth of each patch in metres, of depths up to 10 m."""
    side = GRID * 2 * EACH
    metres = np.array(Image.open(path)).astype(np.float32) / 1000
    metres = np.array(Image.fromarray(metres).resize((side, side), Image.Resampling.NEAREST))
    patches = metres.reshape(GRID, 2 * EACH, GRID, 2 * EACH)
    known = (patches > 0) & (patches <= 10)
    count = known.sum((1, 3))
    return np.where(count > 20, (patches * known).sum((1, 3)) / np.maximum(count, 1), 0).astype(np.float16)


if __name__ == "__main__":
    main()
