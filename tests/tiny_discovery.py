"""Photos with planted objects, written in the layouts of data sets with boxes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tiny_labelled import PATCH

#: Patches on a side of a planted photo.
GRID = 12

#: Around grey, the object has a larger norm than the background and the opposite direction.
GROUND, OBJECT = (60, 60, 60), (200, 180, 190)

#: As in an annotation: x0, y0, x1, y1 in pixels, half-open.
Box = tuple[int, int, int, int]


class Scene(NamedTuple):
    """A photo (H, W, 3) uint8 and the boxes of its objects."""

    pixels: np.ndarray
    boxes: tuple[Box, ...]


def scene(box: Box, size: tuple[int, int] = (GRID * PATCH, GRID * PATCH), noise: float = 8.0, seed: int = 0) -> Scene:
    """One object on a plain background."""
    x0, y0, x1, y1 = box
    pixels = np.full((*size, 3), GROUND, float)
    pixels[y0:y1, x0:x1] = OBJECT
    pixels += np.random.default_rng(seed).normal(0, noise, pixels.shape)
    return Scene(pixels.clip(0, 255).astype(np.uint8), (box,))


def scenes(count: int, seed: int = 0) -> list[Scene]:
    """Objects of 3 to 6 patches on a side, whole patches, anywhere."""
    chance = np.random.default_rng(seed)
    made = []
    for number in range(count):
        width, height = chance.integers(3, 7, 2)
        left, top = chance.integers(0, GRID - width + 1), chance.integers(0, GRID - height + 1)
        x0, y0, x1, y1 = (int(side) * PATCH for side in (left, top, left + width, top + height))
        made.append(scene((x0, y0, x1, y1), seed=seed * 1000 + number))
    return made


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def mask_of(one: Scene, numbers: Sequence[int] = (255,)) -> np.ndarray:
    mask = np.zeros(one.pixels.shape[:2], np.uint8)
    for number, (x0, y0, x1, y1) in zip(numbers, one.boxes, strict=True):
        mask[y0:y1, x0:x1] = number
    return mask


def write_folders(root: Path, every: Sequence[Scene]) -> Path:
    for number, one in enumerate(every):
        save(root / "images" / f"{number:03}.png", one.pixels)
        save(root / "masks" / f"{number:03}.png", mask_of(one))
    return root


def write_davis(root: Path, sequences: Mapping[str, Sequence[Scene]]) -> Path:
    for name, frames in sequences.items():
        for number, one in enumerate(frames):
            save(root / "JPEGImages" / "480p" / name / f"{number:05}.jpg", one.pixels)
            save(root / "Annotations" / "480p" / name / f"{number:05}.png", mask_of(one))
    return root


def voc_object(box: tuple[float, ...], difficult: int = 0, truncated: int = 0) -> str:
    """Annotation of a half-open box; the file counts pixels from 1 and includes the last one."""
    sides = zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, box[2], box[3]), strict=True)
    inside = "".join(f"<{name}>{value:g}</{name}>" for name, value in sides)
    marks = f"<difficult>{difficult}</difficult><truncated>{truncated}</truncated>"
    part = "<part><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object><name>cat</name>{marks}<bndbox>{inside}</bndbox>{part}</object>"


def voc_xml(size: tuple[int, int], *objects: str) -> str:
    side = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    return f"<annotation><filename>other.jpg</filename>{side}{''.join(objects)}</annotation>"


def write_voc(root: Path, every: Sequence[Scene], split: str = "trainval") -> Path:
    names = [f"{number:06}" for number in range(len(every))]
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name, one in zip(names, every, strict=True):
        save(root / "JPEGImages" / f"{name}.jpg", one.pixels)
        xml = voc_xml((one.pixels.shape[0], one.pixels.shape[1]), *map(voc_object, one.boxes))
        (root / "Annotations" / f"{name}.xml").write_text(xml)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def coco_json(every: Sequence[Scene], name: str = "COCO_train2014_{:012}.jpg") -> dict[str, Any]:
    """Photos have ids 100, 101, and so on."""
    images, annotations = [], []
    for number, one in enumerate(every):
        height, width = one.pixels.shape[:2]
        images.append({"id": 100 + number, "file_name": name.format(number), "height": height, "width": width})
        for x0, y0, x1, y1 in one.boxes:
            annotations.append({"image_id": 100 + number, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0})
    return {"images": images, "annotations": annotations, "categories": []}


def write_coco(root: Path, every: Sequence[Scene], split: str = "train2014") -> Path:
    content = coco_json(every)
    for image, one in zip(content["images"], every, strict=True):
        save(root / split / image["file_name"], one.pixels)
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root
