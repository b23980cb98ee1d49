"""Labelled data sets: the values in masks, the supported layouts, and errors for everything else."""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from denoising_vit.data.photos import photo_digest
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.labelled import LabelledData, open_labelled
from denoising_vit.evaluation.masks import NO_LABEL, Coding, read_mask

HEIGHT, WIDTH = 2, 3
ABC = Coding(3, "the list", ignored=(3, 255))


def write_photo(path: Path, shade: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade // 2, 7)).save(path)


def write_mask(path: Path, rows: Sequence[Sequence[int]], dtype: type = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(rows, dtype=dtype)).save(path)


def write_palette_mask(path: Path, rows: Sequence[Sequence[int]]) -> None:
    """Write a palette mask as in VOC; the colours of the palette are not the labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(rows, dtype=np.uint8)).convert("L")
    image.putpalette([(index * 37 + channel * 11) % 256 for index in range(256) for channel in range(3)])
    assert image.mode == "P"
    image.save(path)


def add_pair(root: Path, name: str, rows: Sequence[Sequence[int]], shade: int) -> None:
    write_photo(root / "images" / f"{name}.png", shade)
    write_mask(root / "masks" / f"{name}.png", rows)


def write_classes(root: Path, text: str = "sky\nroad\ncar\n") -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text(text)


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """Three classes; four photos in train, one in val; 3 and 255 mean no label."""
    root = tmp_path / "street"
    write_classes(root)
    add_pair(root / "train", "a", [[0, 0, 1], [1, 1, 255]], 10)
    add_pair(root / "train", "b", [[0, 3, 3], [3, 3, 3]], 20)
    add_pair(root / "train", "c", [[1, 1, 1], [1, 1, 1]], 30)
    add_pair(root / "train", "d", [[255, 3, 3], [3, 3, 3]], 40)
    add_pair(root / "val", "v", [[2, 2, 0], [0, 1, 1]], 50)
    return root


def test_absent_class_is_noted_if_many_pixels_have_no_label(street: Path) -> None:
    assert "no label" not in (open_labelled(street).note or "")
    add_pair(street / "val", "v", [[0, 0, 0], [1, 255, 255]], 50)
    note = open_labelled(street).note
    assert note is not None and note.startswith("car: never in the masks of val, while 33 % of their pixels have")
    write_classes(street, "sky\nroad\n")
    assert "no label" not in (open_labelled(street).note or "")


def test_masks_with_a_single_class_are_rejected(tmp_path: Path) -> None:
    root = tmp_path / "objects"
    write_classes(root, "background\nobject\n")
    for split in ("train", "val"):
        add_pair(root / split, "a", [[0, 0, 255], [0, 255, 255]], 10)
    data = open_labelled(root)
    with pytest.raises(
        EvaluationError, match=r"expected at least two classes in val's masks, found background of 2.* 50 %"
    ):
        data.require_two_classes()
    add_pair(root / "val", "a", [[0, 0, 1], [0, 1, 1]], 10)
    open_labelled(root).require_two_classes()


def ids(data: LabelledData) -> tuple[list[str], list[str]]:
    return [image.id for image in data.train.images], [image.id for image in data.val.images]


def refuses_mask(path: Path, *reasons: str, coding: Coding = ABC) -> None:
    with pytest.raises(EvaluationError) as caught:
        read_mask(path, coding)
    assert str(path) in str(caught.value)
    for reason in reasons:
        assert reason in str(caught.value)


# --- values in a mask ---


def test_void_and_255_are_read_as_no_label(tmp_path: Path) -> None:
    write_mask(tmp_path / "m.png", [[0, 1, 2], [3, 255, 2]])
    labels = read_mask(tmp_path / "m.png", ABC)
    assert labels.tolist() == [[0, 1, 2], [-1, -1, 2]]
    assert labels.dtype == np.int64


def test_palette_gives_indices_not_colours(tmp_path: Path) -> None:
    write_palette_mask(tmp_path / "m.png", [[0, 1, 2], [2, 1, 255]])
    assert Image.open(tmp_path / "m.png").mode == "P"
    assert read_mask(tmp_path / "m.png", ABC).tolist() == [[0, 1, 2], [2, 1, -1]]


@pytest.mark.parametrize(("dtype", "ending"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif")])
def test_deep_masks_are_not_scaled(tmp_path: Path, dtype: type, ending: str) -> None:
    path = tmp_path / f"m.{ending}"
    write_mask(path, [[0, 299, 300], [256, 255, 1]], dtype)
    coding = Coding(300, "the list", ignored=(300,))
    assert read_mask(path, coding).tolist() == [[0, 299, -1], [256, 255, 1]]


def test_one_bit_mask_has_labels_0_and_1(tmp_path: Path) -> None:
    Image.fromarray(np.array([[False, True, True]])).save(tmp_path / "m.png")
    assert Image.open(tmp_path / "m.png").mode == "1"
    assert read_mask(tmp_path / "m.png", ABC).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(("bits", "row"), [(2, 0b00_01_10_11), (4, 0x12)])
def test_grayscale_of_few_bits_is_not_stretched(tmp_path: Path, bits: int, row: int) -> None:
    """Pillow reads two bits as 0, 85, 170, 255, and 255 would then mean no label."""
    path = tmp_path / "m.png"
    width = 8 // bits
    path.write_bytes(png_of(width, 1, bits, bytes([0, row])))
    assert read_mask(path, Coding(4, "the list", ignored=(255,))).tolist() == [[0, 1, 2, 3] if bits == 2 else [1, 2]]


def test_shift_of_ade20k(tmp_path: Path) -> None:
    write_mask(tmp_path / "m.png", [[0, 1, 150], [255, 2, 0]])
    coding = Coding(150, "ADE20K", shift=1, ignored=(0, 255))
    assert read_mask(tmp_path / "m.png", coding).tolist() == [[-1, 0, 149], [-1, 1, -1]]
    write_mask(tmp_path / "m.png", [[151, 1, 1]])  # with a shift, the value after the last class is an error
    refuses_mask(tmp_path / "m.png", "label 151 in 1 pixel", "expected 1 to 150", "ADE20K", "0 or 255", coding=coding)


def test_label_out_of_range_names_value_pixels_range_and_list(tmp_path: Path) -> None:
    write_mask(tmp_path / "m.png", [[4, 9, 9], [9, 0, 4]])
    refuses_mask(tmp_path / "m.png", "label 9 in 3 pixels, and 1 more", "expected 0 to 2", "the list", "3 or 255")


def test_negative_label_is_out_of_range(tmp_path: Path) -> None:
    write_mask(tmp_path / "m.tif", [[0, -1, 1]], np.int32)
    refuses_mask(tmp_path / "m.tif", "label -1 in 1 pixel;")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F"])
def test_colour_and_float_images_are_rejected_as_masks(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("m.tif" if mode == "F" else "m.png")
    Image.new(mode, (WIDTH, HEIGHT)).save(path)
    refuses_mask(path, "expected an index image", f"got mode {mode};")


def test_jpeg_masks_are_rejected(tmp_path: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "m.jpg")
    refuses_mask(tmp_path / "m.jpg", "got JPEG", "write the mask as PNG")


def test_missing_and_damaged_masks_are_rejected(tmp_path: Path) -> None:
    refuses_mask(tmp_path / "none.png", "no such file")
    refuses_mask(tmp_path, "is a directory")
    (tmp_path / "empty.png").touch()
    refuses_mask(tmp_path / "empty.png", "the file is empty")
    (tmp_path / "text.png").write_text("no image")
    refuses_mask(tmp_path / "text.png", "not an image file")
    write_mask(tmp_path / "m.png", (np.arange(10_000).reshape(100, 100) % 3).tolist())
    content = (tmp_path / "m.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    refuses_mask(tmp_path / "cut.png", "damaged or unreadable mask")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_001, 20_000])
def test_size_is_checked_before_decoding(tmp_path: Path, side: int) -> None:
    path = tmp_path / "m.png"
    path.write_bytes(png_of(side, side, 8, b"\0" * 64))
    refuses_mask(path, "the limit of 100,000,000")


def png_of(width: int, height: int, bits: int, content: bytes) -> bytes:
    """A grayscale PNG with these (filtered) bytes, even if its header needs more."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


# --- one split ---


def test_folders_with_splits(street: Path) -> None:
    data = open_labelled(street)
    assert (data.name, data.layout, data.note) == ("street", "folders", None)
    assert ids(data) == (["a.png", "b.png", "c.png", "d.png"], ["v.png"])
    assert data.train.class_names == ("sky", "road", "car")
    assert data.train.pixels == (3, 9, 0)
    assert data.val.pixels == (2, 2, 2)
    assert data.train.absent == ("car",)
    assert data.val.absent == ()
    assert data.train.skipped == data.val.skipped == ()
    assert data.train.common_size == (2, 3)


def test_image_gives_pixels_and_labels(street: Path) -> None:
    image = open_labelled(str(street)).train.images[0]
    assert (image.split, image.id, image.height, image.width) == ("train", "a.png", 2, 3)
    assert (image.classes, image.coding.shift, image.class_pixels) == (3, 0, (2, 3, 0))
    pixels = np.full((2, 3, 3), (10, 5, 7), np.uint8)
    assert np.array_equal(image.pixels(), pixels)
    assert image.digest == photo_digest(pixels)
    assert image.labels().dtype == torch.int64
    assert image.labels().tolist() == [[0, 0, 1], [1, 1, NO_LABEL]]


def test_mask_without_any_label_is_kept(street: Path) -> None:
    image = open_labelled(street).train.images[3]
    assert image.class_pixels == (0, 0, 0)
    assert image.labels().tolist() == [[-1, -1, -1], [-1, -1, -1]]


def test_photos_of_several_sizes_have_no_common_size(street: Path) -> None:
    write_photo(street / "train" / "images" / "a.png", 10, (5, 1))
    write_mask(street / "train" / "masks" / "a.png", [[0, 0, 1, 1, 2]])
    train = open_labelled(street).train
    assert (train.images[0].height, train.images[0].width) == (1, 5)
    assert train.common_size is None
    assert open_labelled(street, images=1).train.common_size == (2, 3)


def test_digest_covers_ids_photos_and_labels(street: Path) -> None:
    (image,) = open_labelled(street).val.images
    labels = np.array([[2, 2, 0], [0, 1, 1]], "<i4")
    assert image.mask_digest == photo_digest(labels)
    line = f"v.png\0{photo_digest(np.full((2, 3, 3), (50, 25, 7), np.uint8))}\0{photo_digest(labels)}\n"
    before = open_labelled(street).val.digest
    assert before == hashlib.sha256(line.encode()).hexdigest()
    write_palette_mask(street / "val" / "masks" / "v.png", [[2, 2, 0], [0, 1, 1]])
    assert open_labelled(street).val.digest == before  # the same labels in another file
    write_mask(street / "val" / "masks" / "v.png", [[2, 2, 0], [0, 1, 0]])
    assert open_labelled(street).val.digest != before


def test_subset_is_spread_evenly_and_recounted(street: Path) -> None:
    train = open_labelled(street).train
    half = open_labelled(street, images=2).train
    assert [image.id for image in half.images] == ["b.png", "d.png"]
    assert half.pixels == (1, 0, 0)
    assert half.absent == ("road", "car")
    assert half.digest != train.digest
    for count in (0, 4, 9):
        assert open_labelled(street, images=count).train == train
    with pytest.raises(EvaluationError, match="at least 1, or 0 for all, got -1"):
        open_labelled(street, images=-1)


def test_images_are_chosen_before_they_are_read(street: Path) -> None:
    (street / "train" / "images" / "a.png").write_text("damaged, and not among the two that are taken")
    calls: list[None] = []
    data = open_labelled(street, images=2, progress=lambda: calls.append(None))
    assert ids(data) == (["b.png", "d.png"], ["v.png"])
    assert data.train.skipped == ()
    assert len(calls) == 3
    write_photo(street / "train" / "images" / "a.png", 10)
    assert data.train.digest == open_labelled(street, images=2).train.digest
    with pytest.raises(EvaluationError, match="got -3"):
        open_labelled(street, images=-3)


def test_order_is_by_name_and_the_same_every_time(tmp_path: Path) -> None:
    write_classes(tmp_path)
    for number in (7, 3, 11, 0, 5, 2, 9, 4):  # more than there are threads
        add_pair(tmp_path / "train", f"{number:02}", [[0, 1, 2], [number % 3, 0, 0]], number)
    add_pair(tmp_path / "val", "deep/er/z", [[0, 0, 0], [0, 0, 0]], 99)
    first = open_labelled(tmp_path)
    assert ids(first) == ([f"{number:02}.png" for number in (0, 2, 3, 4, 5, 7, 9, 11)], ["deep/er/z.png"])
    assert [int(image.pixels()[0, 0, 0]) for image in first.train.images] == [0, 2, 3, 4, 5, 7, 9, 11]
    assert open_labelled(tmp_path) == first


# --- unusable files ---


def test_photos_without_masks_and_masks_without_photos_are_skipped(street: Path) -> None:
    write_photo(street / "train" / "images" / "alone.jpg", 60)
    write_mask(street / "train" / "masks" / "lost.tif", [[0]])
    (street / "train" / "images" / "notes.txt").touch()
    train = open_labelled(street).train
    assert [image.id for image in train.images] == ["a.png", "b.png", "c.png", "d.png"]
    assert [entry.item for entry in train.skipped] == ["alone.jpg", "lost.tif"]
    assert f"a photo without a mask; expected {street / 'train' / 'masks' / 'alone'}.png" in train.skipped[0].reason
    assert f"a mask without a photo; expected {street / 'train' / 'images' / 'lost'}.jpg" in train.skipped[1].reason


def test_photo_and_mask_may_have_different_extensions(street: Path) -> None:
    write_photo(street / "val" / "images" / "w.x.jpg", 60)
    write_mask(street / "val" / "masks" / "w.x.tif", [[0, 0, 0], [0, 0, 2]])
    image = open_labelled(street).val.images[1]
    assert (image.id, image.class_pixels) == ("w.x.jpg", (5, 0, 1))


def test_duplicate_names_are_skipped(street: Path) -> None:
    write_photo(street / "train" / "images" / "a.webp", 60)
    write_mask(street / "train" / "masks" / "b.tif", [[2, 2, 2], [2, 2, 2]])
    train = open_labelled(street).train
    assert [(entry.item, entry.reason) for entry in train.skipped] == [
        ("a.webp", "duplicate photo name a; a.png is used"),
        ("b.tif", "duplicate mask name b; b.png is used"),
    ]
    assert train.pixels == (3, 9, 0)


def test_unusable_pairs_are_skipped_with_a_reason(street: Path) -> None:
    masks = street / "train" / "masks"
    write_mask(masks / "a.png", [[0, 0], [0, 0], [0, 0], [0, 0]])
    Image.new("RGB", (WIDTH, HEIGHT)).save(masks / "b.png")
    write_mask(masks / "c.png", [[0, 4, 4], [0, 0, 0]])
    (street / "train" / "images" / "d.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    add_pair(street / "train", "e", [[2, 2, 2], [2, 2, 2]], 70)
    train = open_labelled(street).train
    assert [image.id for image in train.images] == ["e.png"]
    assert train.pixels == (0, 0, 6)
    reasons = {entry.item: entry.reason for entry in train.skipped}
    assert list(reasons) == ["a.png", "b.png", "c.png", "d.png"]
    assert f"a photo of 3 x 2 pixels and a mask of 2 x 4 ({masks / 'a.png'})" in reasons["a.png"]
    assert f"{masks / 'b.png'}: expected an index image" in reasons["b.png"]
    assert "label 4 in 2 pixels" in reasons["c.png"] and str(street / "classes.txt") in reasons["c.png"]
    assert reasons["d.png"].startswith("damaged or unreadable image")


def test_error_without_usable_pairs_gives_the_first_reason(street: Path) -> None:
    write_mask(street / "val" / "masks" / "v.png", [[77, 0, 0], [0, 0, 0]])
    with pytest.raises(EvaluationError, match=r"split val, but none of 1 .* v\.png: .*label 77 in 1 pixel"):
        open_labelled(street)
    (street / "val" / "masks" / "v.png").unlink()
    with pytest.raises(EvaluationError, match=r"split val, but none of 0 .* v\.png: a photo without a mask"):
        open_labelled(street)


def test_photos_in_both_splits_are_noted(street: Path) -> None:
    write_photo(street / "val" / "images" / "again.png", 10)  # the photo of train/a
    write_mask(street / "val" / "masks" / "again.png", [[0, 0, 0], [0, 0, 0]])
    assert open_labelled(street).note == "1 of 2 photos of val are also in train"


# --- lists of classes ---


def test_missing_and_empty_class_lists_say_what_to_write(street: Path) -> None:
    (street / "classes.txt").write_text(" \n\n")
    with pytest.raises(
        EvaluationError, match=r"classes\.txt: .* found an empty file\. Write the class names .* one per line"
    ):
        open_labelled(street)
    (street / "classes.txt").unlink()
    with pytest.raises(EvaluationError, match=r"classes\.txt: .* no such file\. Write the class names .* label 0"):
        open_labelled(street)


def test_class_list_from_another_path(street: Path) -> None:
    names = street.parent / "names.txt"
    names.write_bytes(b"\xef\xbb\xbfone\r\ntwo \r\nthree\r\n\r\n")
    assert open_labelled(street, classes=names).val.class_names == ("one", "two", "three")


def test_class_names_are_unique_and_without_gaps(street: Path) -> None:
    write_classes(street, "sky\nroad\nsky\n")
    with pytest.raises(EvaluationError, match="line 3 is 'sky', the same as line 1"):
        open_labelled(street)
    write_classes(street, "sky\n\ncar\n")
    with pytest.raises(EvaluationError, match="line 2 is empty; expected the name of label 1"):
        open_labelled(street)
    (street / "classes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="expected UTF-8 text"):
        open_labelled(street)


def test_255_is_a_class_in_a_list_of_256(street: Path) -> None:
    write_classes(street, "".join(f"c{number}\n" for number in range(256)))
    write_mask(street / "val" / "masks" / "v.png", [[0, 255, 256], [256, 256, 256]], np.uint16)
    val = open_labelled(street).val
    assert val.images[0].labels().tolist() == [[0, 255, -1], [-1, -1, -1]]


# --- layouts ---


def test_folders_without_splits_are_halved_by_name(tmp_path: Path) -> None:
    root = tmp_path / "film"
    write_classes(root)
    for shade, name in enumerate("edcba"):
        add_pair(root, name, [[0, 0, 0], [0, 0, 1]], shade)
    write_photo(root / "images" / "aa.jpg", 60)
    write_photo(root / "images" / "z.jpg", 60)
    data = open_labelled(root)
    assert ids(data) == (["a.png", "b.png", "c.png"], ["d.png", "e.png"])
    assert {image.split for image in data.train.images} == {"train"}
    assert {image.split for image in data.val.images} == {"val"}
    assert [entry.item for entry in data.train.skipped] == ["aa.jpg"]
    assert [entry.item for entry in data.val.skipped] == ["z.jpg"]
    assert data.note == "no splits in the folder: the first 3 of 5 pairs by name are train, the others val"


def test_one_pair_cannot_be_halved(tmp_path: Path) -> None:
    write_classes(tmp_path)
    add_pair(tmp_path, "a", [[0, 0, 0], [0, 0, 1]], 10)
    write_photo(tmp_path / "images" / "b.png", 10)
    with pytest.raises(EvaluationError, match=r"at least 2 photos with masks .* found 1 \(b\.png: a photo without"):
        open_labelled(tmp_path)
    add_pair(tmp_path, "b", [[0, 0, 0], [0, 0, 1]], 20)
    assert ids(open_labelled(tmp_path)) == (["a.png"], ["b.png"])


def test_splits_inside_images_and_masks_are_kept_apart(tmp_path: Path) -> None:
    write_classes(tmp_path)
    for name, shade in (("val/a", 1), ("train/b", 2), ("train/c", 3), ("train/d", 4)):
        add_pair(tmp_path, name, [[0, 0, 0], [0, 0, 1]], shade)
    data = open_labelled(tmp_path)
    assert ids(data) == (["b.png", "c.png", "d.png"], ["a.png"])
    assert data.note is None


def make_voc(root: Path) -> None:
    for shade, name in enumerate(("2007_000032", "2007_000027", "2007_000039")):
        write_photo(root / "JPEGImages" / f"{name}.jpg", 20 * shade)
    write_palette_mask(root / "SegmentationClass" / "2007_000032.png", [[0, 0, 255], [255, 1, 20]])
    write_palette_mask(root / "SegmentationClass" / "2007_000027.png", [[0, 0, 15], [0, 15, 15]])
    write_palette_mask(root / "SegmentationClass" / "2007_000039.png", [[21, 0, 0], [0, 0, 0]])
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n2007_000027\n2007_000032\n")
    (lists / "val.txt").write_text("2007_000027\n2007_000039\n\n2007_999999\n")


@pytest.mark.parametrize("below", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc(tmp_path: Path, below: str) -> None:
    make_voc(tmp_path / below)
    data = open_labelled(tmp_path)
    assert (data.name, data.layout) == ("VOC 2012", "voc2012")
    # In the order of the lists.
    assert ids(data) == (["2007_000032.jpg", "2007_000027.jpg"], ["2007_000027.jpg"])
    assert data.train.images[0].labels().tolist() == [[0, 0, -1], [-1, 1, 20]]
    names = dict(zip(data.train.class_names, data.train.pixels, strict=True))
    assert len(names) == 21
    assert {name: count for name, count in names.items() if count} == {
        "background": 5, "aeroplane": 1, "person": 3, "tvmonitor": 1,
    }  # fmt: skip
    assert [entry.item for entry in data.train.skipped] == ["2007_000032.jpg"]
    assert "listed twice" in data.train.skipped[0].reason
    first, second = data.val.skipped
    assert "label 21 in 1 pixel; expected 0 to 20" in first.reason  # not void here
    assert (second.item, second.reason) == ("2007_999999.jpg", "no such file")
    assert data.note == "1 of 1 photos of val are also in train"


def test_other_years_of_voc_keep_their_name(tmp_path: Path) -> None:
    make_voc(tmp_path / "VOC2007")
    assert open_labelled(tmp_path / "VOC2007").name == "VOC 2007"


def test_voc_without_its_lists_says_what_is_missing(tmp_path: Path) -> None:
    make_voc(tmp_path / "VOC2012")
    (tmp_path / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt").unlink()
    where = re.escape(str(tmp_path / "VOC2012"))
    with pytest.raises(
        EvaluationError, match=rf"{where} looks like VOC 2012, but lacks ImageSets/Segmentation/val.txt;"
    ):
        open_labelled(tmp_path)


def test_voc_with_an_empty_list(tmp_path: Path) -> None:
    make_voc(tmp_path)
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
    with pytest.raises(EvaluationError, match=r"val\.txt: expected names, one per line, found none"):
        open_labelled(tmp_path)


def make_ade(root: Path) -> None:
    for split, name, rows, shade in (
        ("training", "ADE_train_00000001", [[0, 1, 1], [150, 2, 255]], 10),
        ("validation", "ADE_val_00000001", [[3, 3, 3], [3, 3, 3]], 20),
    ):
        write_photo(root / "images" / split / f"{name}.jpg", shade)
        write_mask(root / "annotations" / split / f"{name}.png", rows)


@pytest.mark.parametrize("below", [".", "ADEChallengeData2016"])
def test_ade20k(tmp_path: Path, below: str) -> None:
    make_ade(tmp_path / below)
    data = open_labelled(tmp_path)
    assert (data.name, data.layout, data.note) == ("ADE20K", "ade20k", None)
    assert ids(data) == (["ADE_train_00000001.jpg"], ["ADE_val_00000001.jpg"])
    image = data.train.images[0]
    assert (image.classes, image.coding.shift) == (150, 1)
    assert image.labels().tolist() == [[-1, 0, 0], [149, 1, -1]]
    assert (data.train.class_names[0], data.train.class_names[-1]) == ("class 1", "class 150")
    assert (data.train.pixels[0], data.train.pixels[1], data.train.pixels[149]) == (2, 1, 1)
    assert len(data.train.absent) == 147


def test_names_of_ade20k_from_its_table(tmp_path: Path) -> None:
    make_ade(tmp_path)
    rows = [f"{number}\t0.1\t9\t9\tthing {number}, stuff {number}" for number in range(1, 151)]
    table = tmp_path / "objectInfo150.txt"
    table.write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    assert open_labelled(tmp_path).val.class_names[1:3] == ("thing 2, stuff 2", "thing 3, stuff 3")
    table.write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows[:-1]]))
    with pytest.raises(EvaluationError, match=r"objectInfo150\.txt: .* found 149 other rows"):
        open_labelled(tmp_path)


def test_missing_folder_of_ade20k_is_named(tmp_path: Path) -> None:
    make_ade(tmp_path)
    (tmp_path / "annotations" / "validation" / "ADE_val_00000001.png").unlink()
    (tmp_path / "annotations" / "validation").rmdir()
    with pytest.raises(EvaluationError, match="looks like ADE20K, but lacks annotations/validation;"):
        open_labelled(tmp_path)


@pytest.mark.parametrize("make", [make_voc, make_ade])
def test_class_list_is_rejected_for_data_sets_with_fixed_classes(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path)
    with pytest.raises(EvaluationError, match=r"has fixed classes, .*names\.txt\); omit it"):
        open_labelled(tmp_path, classes=tmp_path / "names.txt")


def test_missing_masks_folder_of_a_split_is_named(street: Path) -> None:
    (street / "val" / "masks" / "v.png").unlink()
    (street / "val" / "masks").rmdir()
    with pytest.raises(EvaluationError, match="looks like folders with splits, but lacks val/masks;"):
        open_labelled(street)


def test_unknown_layout_shows_what_is_expected_and_found(tmp_path: Path) -> None:
    for name in "abcdefghij":
        (tmp_path / name).mkdir()
    (tmp_path / ".hidden").touch()
    (tmp_path / "a.txt").touch()
    with pytest.raises(EvaluationError) as caught:
        open_labelled(tmp_path)
    message = str(caught.value)
    for expected in ("VOC 2012", "JPEGImages", "ADE20K", "annotations", "train/images", "val/masks", "classes.txt"):
        assert expected in message
    assert message.endswith("found a.txt, a/, b/, c/, d/, e/, f/, g/ and 3 more")


def test_paths_that_are_not_data_set_folders_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="found nothing"):
        open_labelled(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(EvaluationError, match="found a file"):
        open_labelled(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="found an empty folder"):
        open_labelled(tmp_path / "empty")
    with pytest.raises(EvaluationError, match=r"cannot be read|found nothing"):
        open_labelled(tmp_path / ("x" * 5000))
