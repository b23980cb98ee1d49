"""Data sets with boxes: objects in each layout, skipped photos with reasons, and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.discovery import BoxedData, open_boxed
from denoising_vit.evaluation.discovery.annotations import within
from tiny_discovery import (
    Scene,
    coco_json,
    mask_of,
    save,
    scene,
    scenes,
    voc_object,
    voc_xml,
    write_coco,
    write_davis,
    write_folders,
    write_voc,
)

SIDE = 96


def boxes_of(data: BoxedData) -> dict[str, tuple[tuple[float, ...], ...]]:
    return {image.id: image.boxes for image in data.val.images}


def reasons(data: BoxedData) -> dict[str, str]:
    return {skipped.item: skipped.reason for skipped in data.val.skipped}


def refused(path: Path, *words: str, **asked: Any) -> None:
    with pytest.raises(EvaluationError) as caught:
        open_boxed(path, **asked)
    for word in words:
        assert word in str(caught.value)


# --- VOC ---


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return write_voc(tmp_path / "VOC2007", scenes(3))


def rewrite(voc: Path, name: str, *objects: str, size: tuple[int, int] = (SIDE, SIDE)) -> None:
    (voc / "Annotations" / f"{name}.xml").write_text(voc_xml(size, *objects))


def test_voc_boxes_count_from_one_and_include_the_last_pixel(voc: Path) -> None:
    """xmin 1, xmax 96 is the whole width of 96 pixels; xmin = xmax is one pixel."""
    inside = "<xmin>1</xmin><ymin>11</ymin><xmax>96</xmax><ymax>11</ymax>"
    rewrite(voc, "000000", f"<object><name>cat</name><bndbox>{inside}</bndbox></object>")
    data = open_boxed(voc)
    assert boxes_of(data)["000000.jpg"] == ((0.0, 10.0, 96.0, 11.0),)
    assert boxes_of(data)["000001.jpg"] == scenes(3)[1].boxes
    assert (data.name, data.layout, data.note) == ("VOC 2007 trainval", "voc", None)


def test_parts_of_objects_are_ignored(voc: Path) -> None:
    assert "<part>" in (voc / "Annotations" / "000000.xml").read_text()
    assert all(len(boxes) == 1 for boxes in boxes_of(open_boxed(voc)).values())


def test_difficult_and_truncated_objects_can_be_excluded(voc: Path) -> None:
    plain, hard, cut = (10, 10, 30, 30), (40, 40, 60, 60), (70, 70, 90, 90)
    rewrite(voc, "000000", voc_object(hard, difficult=1), voc_object(plain), voc_object(cut, truncated=1))
    rewrite(voc, "000001", voc_object(hard, difficult=1), voc_object(cut, truncated=1))
    every = open_boxed(voc)
    assert boxes_of(every)["000000.jpg"] == (plain, hard, cut)
    assert not every.val.skipped
    easy = open_boxed(voc, difficult=False)
    assert boxes_of(easy)["000000.jpg"] == (plain,)
    assert "found 2 that are all difficult or truncated" in reasons(easy)["000001.jpg"]
    assert len(easy.val.images) == 2 and easy.note
    assert easy.val.digest != every.val.digest


def test_voc_list_selects_and_orders_photos(voc: Path) -> None:
    lists = voc / "ImageSets" / "Main"
    (lists / "test.txt").write_text("000002\r\n\n000000\n000002\n")
    data = open_boxed(voc, split="test")
    assert [image.id for image in data.val.images] == ["000002.jpg", "000000.jpg"]
    assert "listed twice" in reasons(data)["000002"] and data.name == "VOC 2007 test"
    refused(voc, "val.txt", "no such file", "trainval.txt", split="val")
    (lists / "val.txt").write_text("\n \n")
    refused(voc, "val.txt: expected names, one per line, found none", split="val")


@pytest.mark.parametrize("below", ["VOC2012", "VOCdevkit/VOC2012", "VOCdevkit/VOC2007"])
def test_voc_is_found_below_the_folder(tmp_path: Path, below: str) -> None:
    write_voc(tmp_path / below, scenes(1))
    data = open_boxed(tmp_path)
    assert data.name == f"VOC {below[-4:]} trainval" and len(data.val.images) == 1


def test_two_voc_years_are_refused_as_ambiguous(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        write_voc(tmp_path / "VOCdevkit" / year, scenes(1))
    both = [str(tmp_path / "VOCdevkit" / year) for year in ("VOC2007", "VOC2012")]
    refused(tmp_path, *both, "give one of them")
    assert open_boxed(tmp_path / "VOCdevkit" / "VOC2012").name == "VOC 2012 trainval"


def swapped(tag: str, value: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        before, after = text.split(f"<{tag}>", 1)
        return f"{before}<{tag}>{value}</{tag}>{after.split(f'</{tag}>', 1)[1]}"

    return change


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;">]>'

DAMAGED: list[tuple[Callable[[str], str], str]] = [
    (lambda _: voc_xml((SIDE, SIDE)), "expected objects, found none"),
    (lambda text: text[:90], "damaged XML"),
    (lambda _: "", "damaged XML"),
    (lambda _: "no XML at all", "damaged XML"),
    (lambda _: "<html></html>", "expected <annotation> as in VOC, found <html>"),
    (lambda text: BOMB + text, "expected XML without a document type"),
    (lambda text: '<!DOCTYPE a SYSTEM "file:///etc/hostname">' + text, "expected XML without a document type"),
    (swapped("xmin", "left"), "expected a number as xmin of an object's bndbox, found 'left'"),
    (swapped("xmax", "nan"), "expected a number as xmax of an object's bndbox, found 'nan'"),
    (swapped("ymax", "1e999"), "expected a number as ymax of an object's bndbox, found '1e999'"),
    (lambda text: text.replace("bndbox", "box"), "expected a number as xmin of an object's bndbox, found None"),
    (swapped("width", "97"), "97 x 96, expected the photo's 96 x 96"),
    (swapped("xmax", "98"), "to 98, y"),
    (swapped("xmax", "98"), "is not within the image of 96 x 96 pixels"),
    (swapped("ymax", "5000"), "is not within the image of 96 x 96 pixels"),
    (swapped("xmin", "-1"), "is not within the image of 96 x 96 pixels"),
    (swapped("xmin", "5000"), "is not within the image of 96 x 96 pixels"),
    (swapped("xmax", "0"), "has no area"),
]


@pytest.mark.parametrize(("change", "reason"), DAMAGED)
def test_photo_with_invalid_xml_is_skipped(voc: Path, change: Callable[[str], str], reason: str) -> None:
    path = voc / "Annotations" / "000001.xml"
    path.write_text(change(path.read_text()))
    data = open_boxed(voc)
    assert [image.id for image in data.val.images] == ["000000.jpg", "000002.jpg"]
    assert list(reasons(data)) == ["000001.jpg"]
    assert reason in reasons(data)["000001.jpg"] and str(path) in reasons(data)["000001.jpg"]


def test_xml_in_another_encoding_is_skipped(voc: Path) -> None:
    """A document type would not be found in its bytes."""
    path = voc / "Annotations" / "000001.xml"
    path.write_bytes(('<?xml version="1.0" encoding="UTF-16"?>' + path.read_text()).encode("utf-16"))
    assert "expected UTF-8" in reasons(open_boxed(voc))["000001.jpg"]
    path.write_bytes(f"{BOMB}{voc_xml((SIDE, SIDE))}".encode("utf-16-le"))
    assert "000001.jpg" in reasons(open_boxed(voc))


def test_too_large_xml_is_not_parsed(voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("denoising_vit.evaluation.discovery.annotations._MAX_XML_BYTES", 100)
    refused(voc, "none of 3 is usable", "larger than 100 bytes")


def test_photos_with_missing_or_damaged_files_are_skipped(voc: Path) -> None:
    (voc / "Annotations" / "000000.xml").unlink()
    (voc / "JPEGImages" / "000001.jpg").write_bytes(b"\xff\xd8no photo")
    data = open_boxed(voc)
    assert [image.id for image in data.val.images] == ["000002.jpg"]
    assert "000000.xml: no such file" in reasons(data)["000000.jpg"]
    assert "image" in reasons(data)["000001.jpg"]
    (voc / "JPEGImages" / "000002.jpg").unlink()
    refused(voc, "none of 3 is usable", "first reason: 000000.jpg: ", "no such file")


# --- boxes at the image border ---


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.0, 0.0, 20.0, 10.0), (0.0, 0.0, 20.0, 10.0)),
        ((-1.0, -0.5, 21.0, 11.0), (0.0, 0.0, 20.0, 10.0)),
        ((3.25, 2.5, 20.4, 7.0), (3.25, 2.5, 20.0, 7.0)),
    ],
)
def test_boxes_up_to_a_pixel_outside_are_clipped(box: Any, expected: Any) -> None:
    assert within(box, 10, 20) == expected


@pytest.mark.parametrize(
    "box",
    [
        (-1.01, 0.0, 5.0, 5.0),
        (0.0, -1.01, 5.0, 5.0),
        (0.0, 0.0, 21.01, 5.0),
        (0.0, 0.0, 5.0, 11.01),
        (20.0, 0.0, 20.5, 5.0),
        (5.0, 5.0, 5.0, 8.0),
        (5.0, 8.0, 9.0, 5.0),
        (30.0, 0.0, 40.0, 5.0),
        (0.0, 0.0, float("nan"), 5.0),
    ],
)
def test_outside_empty_or_nan_boxes_are_refused(box: Any) -> None:
    with pytest.raises(EvaluationError, match="the box x "):
        within(box, 10, 20)


# --- COCO ---


def rewritten(root: Path, change: Callable[[dict[str, Any]], Any], split: str = "train2014") -> Path:
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return root


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_coco(tmp_path, scenes(4))


NAMES = [f"COCO_train2014_{number:012}.jpg" for number in range(4)]


def test_coco_boxes_are_corner_and_size(coco: Path) -> None:
    """Photos are sorted by name and have all of their objects except crowds."""

    def change(content: dict[str, Any]) -> None:
        content["images"].reverse()
        content["annotations"].append({"image_id": 101, "bbox": [2.5, 3, 10, 20.25], "iscrowd": 0})
        content["annotations"].append({"image_id": 102, "bbox": [0, 0, 96, 96], "iscrowd": 1})
        content["annotations"].append({"image_id": 102, "bbox": [7, 8, 9, 10]})

    data = open_boxed(rewritten(coco, change))
    every = [one.boxes for one in scenes(4)]
    assert boxes_of(data) == {
        NAMES[0]: every[0],
        NAMES[1]: tuple(sorted(((2.5, 3.0, 12.5, 23.25), *every[1]))),
        NAMES[2]: tuple(sorted(((7.0, 8.0, 16.0, 18.0), *every[2]))),
        NAMES[3]: every[3],
    }
    assert list(boxes_of(data)) == NAMES
    assert (data.name, data.layout) == ("COCO train2014", "coco")


def test_photos_with_only_crowds_or_no_objects_are_skipped(coco: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"].pop(1)

    data = open_boxed(rewritten(coco, change))
    assert [image.id for image in data.val.images] == NAMES[2:]
    assert list(reasons(data)) == NAMES[:2]
    assert "no object for this photo, apart from crowds (iscrowd)" in reasons(data)[NAMES[0]]


@pytest.mark.parametrize("folder", ["train2014", "images", "images/train2014", "photos"])
def test_coco_photos_are_found_in_various_folders(coco: Path, folder: str) -> None:
    shutil.move(coco / "train2014", coco / "moved")
    (coco / folder).parent.mkdir(exist_ok=True)
    shutil.move(coco / "moved", coco / folder)
    (coco / "val2014").mkdir()  # the first folder with one of the photos is used
    assert len(open_boxed(coco).val.images) == 4


def test_json_file_may_be_anywhere(coco: Path, tmp_path: Path) -> None:
    moved = tmp_path / "my_boxes.json"
    shutil.move(coco / "annotations" / "instances_train2014.json", moved)
    refused(coco, "VOC (JPEGImages", "found annotations/, my_boxes.json, train2014/")
    assert len(open_boxed(coco, annotations=moved).val.images) == 4
    (coco / "annotations").rmdir()
    assert len(open_boxed(coco, annotations=moved).val.images) == 4
    refused(coco, "none.json: no such file", annotations=coco / "none.json")


def test_several_json_files_need_a_choice(coco: Path) -> None:
    write_coco(coco / "other", scenes(2, seed=1), "val2014")
    shutil.move(coco / "other" / "annotations" / "instances_val2014.json", coco / "annotations")
    shutil.move(coco / "other" / "val2014", coco / "val2014")
    shutil.rmtree(coco / "other")
    (coco / "annotations" / "captions_val2014.json").write_text("{}")
    refused(coco, "has 2 JSON files (instances_train2014.json, instances_val2014.json)", "annotations or split")
    assert open_boxed(coco, split="val2014").name == "COCO val2014"
    assert len(open_boxed(coco, split="val2014").val.images) == 2
    refused(coco, "test2014.json: no such file", split="test2014")


def test_list_selects_photos_by_name_or_id(coco: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "twenty.txt"
    chosen.write_text(f"train2014/{NAMES[3]}\n101\n\n{NAMES[3]}\nCOCO_train2014_9.jpg\n")
    data = open_boxed(coco, names=chosen)
    assert [image.id for image in data.val.images] == [NAMES[1], NAMES[3]]
    assert "listed twice" in reasons(data)[NAMES[3]]
    assert "but not in" in reasons(data)["COCO_train2014_9.jpg"]
    assert data.note and "twenty.txt" in data.note
    chosen.write_text("nothing\n")
    refused(coco, "expected names or ids of photos", f"such as {NAMES[0]}", "found 'nothing'", names=chosen)
    chosen.write_text("")
    refused(coco, "found no line", names=chosen)
    refused(coco, "gone.txt: cannot be read", names=tmp_path / "gone.txt")


def test_json_file_of_other_photos_is_refused_with_examples(coco: Path) -> None:
    for number, path in enumerate(sorted((coco / "train2014").iterdir())):
        path.rename(path.with_name(f"photo{number}.jpg"))
    refused(
        coco,
        f"instances_train2014.json, such as {NAMES[0]}, was found",
        "none of the 4 photos listed in ",
        "has photo0.jpg (4 in total)",
    )
    shutil.rmtree(coco / "train2014")
    refused(coco, "instances_train2014.json, such as")


def test_missing_photos_are_reported_one_by_one_or_together(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES[:2]:
        (coco / "train2014" / name).unlink()
    data = open_boxed(coco)
    assert [image.id for image in data.val.images] == NAMES[2:]
    assert list(reasons(data)) == NAMES[:2] and "but not in" in reasons(data)[NAMES[0]]
    monkeypatch.setattr("denoising_vit.evaluation.discovery.annotations._LISTED", 1)
    (reason,) = open_boxed(coco).val.skipped
    assert reason.item == "instances_train2014.json"
    assert reason.reason.startswith("2 listed photos are not in") and NAMES[0] in reason.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["images"][1].update(height=50), "96 x 50, expected the photo's 96 x 96"),
        (lambda c: c["annotations"][1].update(bbox=[90, 0, 8, 5]), "x 90 to 98, y 0 to 5 is not within the image"),
        (lambda c: c["annotations"][1].update(bbox=[5, 5, 0, 5]), "has no area"),
        (lambda c: c["annotations"][1].update(bbox=[5, 5, 4]), "expected x, y, width and height as bbox"),
        (lambda c: c["annotations"][1].update(bbox=[5, 5, 4, "wide"]), "expected x, y, width and height as bbox"),
        (lambda c: c["annotations"][1].update(bbox=[5, 5, 4, 10**400]), "expected x, y, width and height as bbox"),
        (lambda c: c["annotations"][1].update(bbox=None), "expected x, y, width and height as bbox"),
        (lambda c: c["annotations"][1].pop("bbox"), "expected x, y, width and height as bbox"),
        (lambda c: c["annotations"][1].update(bbox=[5, 5, 4, float("nan")]), "is not finite"),
    ],
)
def test_photo_with_invalid_json_values_is_skipped(
    coco: Path, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    data = open_boxed(rewritten(coco, change))
    assert [image.id for image in data.val.images] == [NAMES[0], *NAMES[2:]]
    assert list(reasons(data)) == [NAMES[1]]
    assert reason in reasons(data)[NAMES[1]]


@pytest.mark.parametrize("name", ["../train2014/" + NAMES[1], "/etc/hostname", "..\\x.jpg", "C:/x.jpg", "", None, 7])
def test_paths_outside_the_folder_are_skipped(coco: Path, name: Any) -> None:
    data = open_boxed(rewritten(coco, lambda content: content["images"][1].update(file_name=name)))
    assert [image.id for image in data.val.images] == [NAMES[0], *NAMES[2:]]
    assert "expected a path below the folder of photos" in reasons(data)["images[1]"]


def test_duplicate_photos_are_used_once(coco: Path) -> None:
    data = open_boxed(rewritten(coco, lambda content: content["images"].append(content["images"][0])))
    assert len(data.val.images) == 4 and "duplicate name or id" in reasons(data)[NAMES[0]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "damaged JSON"),
        ("[" * 100_000, "damaged JSON"),
        ("[1, 2]", "no list of images, found a list"),
        ("{}", "no list of images, found nothing"),
        ('{"images": [], "categories": []}', "no list of annotations, found images, categories"),
        ('{"images": [1], "annotations": []}', "no list of images"),
        ('{"images": [], "annotations": []}', "0 images, none of which has a name and an id"),
        ('{"images": [{"file_name": "a.jpg"}], "annotations": []}', "1 images, none of which has a name and an id"),
    ],
)
def test_invalid_json_is_refused(coco: Path, text: str, reason: str) -> None:
    (coco / "annotations" / "instances_train2014.json").write_text(text)
    refused(coco, "instances_train2014.json", reason, "expected COCO's objects")


# --- masks ---


def test_davis_has_a_box_around_the_object_of_each_frame(tmp_path: Path) -> None:
    every = scenes(5)
    data = open_boxed(write_davis(tmp_path, {"dog": every[:3], "cat": every[3:]}))
    ids = ["cat/00000.jpg", "cat/00001.jpg", "dog/00000.jpg", "dog/00001.jpg", "dog/00002.jpg"]
    assert boxes_of(data) == dict(zip(ids, [one.boxes for one in (*every[3:], *every[:3])], strict=True))
    assert [image.sequence for image in data.val.images] == ["cat", "cat", "dog", "dog", "dog"]
    assert (data.name, data.layout) == ("DAVIS", "davis") and data.note
    write_davis(tmp_path / "below" / "DAVIS", {"dog": every[:1]})
    assert len(open_boxed(tmp_path / "below").val.images) == 1


def test_each_photo_in_folders_is_its_own_sequence(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "mine", scenes(3))
    shutil.copytree(root / "images", root / "more" / "images")
    for kind in ("images", "masks"):
        (root / kind / "deeper").mkdir()
        shutil.copy(root / kind / "000.png", root / kind / "deeper" / "000.png")
    data = open_boxed(root)
    assert (data.name, data.layout) == ("mine", "masks")
    assert [image.sequence for image in data.val.images] == [image.id for image in data.val.images]
    assert [image.id for image in data.val.images] == ["000.png", "001.png", "002.png", "deeper/000.png"]


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Two objects in the first photo, with 255 around one; one in the second, numbered 7; only 255 in the third."""
    pixels = scenes(1)[0].pixels
    two = Scene(pixels, ((0, 0, 40, 96), (8, 16, 24, 32), (48, 40, 96, 96)))
    for number, mask in enumerate(
        (
            mask_of(two, (255, 1, 2)),
            mask_of(Scene(pixels, ((5, 6, 7, 8),)), (7,)),
            mask_of(Scene(pixels, ((1, 2, 50, 60),)), (255,)),
        )
    ):
        save(tmp_path / "images" / f"{number}.png", pixels)
        save(tmp_path / "masks" / f"{number}.png", mask)
    return tmp_path


def test_numbered_objects_have_a_box_each_and_255_is_ignored(numbered: Path) -> None:
    data = open_boxed(numbered)
    assert boxes_of(data) == {"0.png": ((8, 16, 24, 32), (48, 40, 96, 96)), "1.png": ((5, 6, 7, 8),)}
    assert "which means no object because other masks have numbers" in reasons(data)["2.png"]


def test_255_is_the_object_if_no_mask_numbers_objects(numbered: Path) -> None:
    for number in (0, 1):
        (numbered / "masks" / f"{number}.png").unlink()
    data = open_boxed(numbered)
    assert boxes_of(data) == {"2.png": ((1, 2, 50, 60),)}
    assert "a photo without a mask" in reasons(data)["0.png"]


def test_palette_and_one_bit_masks_are_read(numbered: Path) -> None:
    path = numbered / "masks" / "1.png"
    palette = Image.open(path).convert("L")
    palette.putpalette([(index * 37) % 256 for index in range(768)])
    palette.save(path)
    Image.fromarray(mask_of(Scene(scenes(1)[0].pixels, ((1, 2, 50, 60),)), (255,)) > 0).save(
        numbered / "masks" / "2.png"
    )
    data = open_boxed(numbered)
    assert boxes_of(data)["1.png"] == ((5, 6, 7, 8),) and boxes_of(data)["2.png"] == ((1, 2, 50, 60),)


def test_photos_with_unusable_masks_are_skipped(tmp_path: Path) -> None:
    every = scenes(6)
    root = write_folders(tmp_path, every)
    masks = [root / "masks" / f"{number:03}.png" for number in range(6)]
    blurred = np.clip(mask_of(every[0]).astype(int) + np.random.default_rng(0).integers(-9, 9, (SIDE, SIDE)), 0, 255)
    save(masks[0], blurred.astype(np.uint8))
    save(masks[1], np.zeros((SIDE, SIDE), np.uint8))
    save(masks[2], mask_of(every[2])[:50])
    save(masks[3], np.repeat(mask_of(every[3])[..., None], 3, -1))
    masks[4].write_bytes(masks[4].read_bytes()[:60])
    data = open_boxed(root)
    assert list(boxes_of(data)) == ["005.png"]
    found = reasons(data)
    values = np.unique(blurred)
    wrong = values[(values > 50) & (values != 255)]
    assert f"{len(values)} different values, {len(wrong)} of them neither 0, 255" in found["000.png"]
    assert f"({', '.join(map(str, wrong[:3]))}, ...)" in found["000.png"] and "1 to 50" in found["000.png"]
    assert "all 9,216 pixels are 0" in found["001.png"]
    assert "a photo of 96 x 96 pixels and a mask of 96 x 50" in found["002.png"]
    assert "got mode RGB" in found["003.png"]
    assert "damaged" in found["004.png"]


def test_list_selects_sequences(tmp_path: Path) -> None:
    every = scenes(3)
    root = write_davis(tmp_path, {"cat": every[:1], "dog": every[1:2], "emu": every[2:]})
    (root / "Annotations" / "480p" / "emu" / "00000.png").unlink()
    for name, text in {
        "2016/val": "/JPEGImages/480p/dog/00000.jpg /Annotations/480p/dog/00000.png\n",
        "2017/val": "cat\nemu\nfox\n",
        "2017/all": "cat\n",
    }.items():
        path = root / "ImageSets" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert list(boxes_of(open_boxed(root, split="2016/val"))) == ["dog/00000.jpg"]
    newer = open_boxed(root, split="2017/val")
    assert list(boxes_of(newer)) == ["cat/00000.jpg"] and newer.name == "DAVIS 2017/val"
    assert list(reasons(newer)) == ["emu", "emu/00000.jpg", "fox"]
    assert list(boxes_of(open_boxed(root, split="all"))) == ["cat/00000.jpg"]
    refused(root, "expected one list val.txt", "2016", "2017", split="val")
    refused(root, "expected one list test.txt", "found none", split="test")


# --- all layouts ---


def test_path_without_a_data_set_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere: expected a data set folder, found nothing")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "file: expected a data set folder, found a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "VOC (JPEGImages", "COCO", "DAVIS", "(images, masks)", "found an empty folder")
    for number in range(12):
        save(tmp_path / "photos" / f"{number:02}.png", np.zeros((2, 2, 3), np.uint8))
    refused(tmp_path / "photos", "found 00.png, 01.png", "and 4 more")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("JPEGImages/a", "Annotations/a"), "looks like VOC, but lacks ImageSets/Main"),
        (("JPEGImages/480p/a",), "looks like DAVIS, but lacks Annotations/480p"),
        (("images/a",), "looks like folders of photos and masks, but lacks masks"),
        (("masks/a",), "looks like folders of photos and masks, but lacks images"),
    ],
)
def test_incomplete_data_set_is_refused_with_the_missing_part(
    tmp_path: Path, names: tuple[str, ...], words: str
) -> None:
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    refused(tmp_path, str(tmp_path), words)


def test_file_instead_of_a_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "masks").write_text("")
    (tmp_path / "images").mkdir()
    refused(tmp_path, "lacks masks (a file, expected a folder)")


def test_folders_without_usable_photos_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    refused(tmp_path, "expected photos with boxes", "none of 0 is usable")
    save(tmp_path / "images" / "a.png", np.zeros((4, 4, 3), np.uint8))
    save(tmp_path / "masks" / "a.png", np.zeros((4, 4), np.uint8))
    refused(tmp_path, "none of 1 is usable; first reason: a.png: ", "no object")


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"split": "val"}, "split does not apply to photos and masks in folders, got val"),
        ({"difficult": False}, "difficult does not apply"),
        ({"annotations": Path("a.json")}, "annotations does not apply"),
        ({"names": Path("a.txt")}, "names does not apply"),
        ({"images": -1}, "expected a number of images of at least 1, or 0 for all, got -1"),
    ],
)
def test_options_that_do_not_apply_are_refused(tmp_path: Path, asked: dict[str, Any], word: str) -> None:
    refused(write_folders(tmp_path, scenes(1)), word, **asked)


def test_voc_and_coco_refuse_options_of_the_other(tmp_path: Path) -> None:
    refused(write_voc(tmp_path / "voc", scenes(1)), "names does not apply to VOC", names=Path("a.txt"))
    refused(write_coco(tmp_path / "coco", scenes(1)), "difficult does not apply to COCO", difficult=False)


def test_images_are_sampled_evenly_with_progress(tmp_path: Path) -> None:
    steps: list[int] = []
    root = write_folders(tmp_path, scenes(6))
    data = open_boxed(root, images=2, progress=lambda: steps.append(1))
    assert [image.id for image in data.val.images] == ["001.png", "004.png"] and len(steps) == 2
    assert len(open_boxed(root, images=99).val.images) == 6


def test_truth_digest_is_the_same_in_every_layout(tmp_path: Path) -> None:
    """The digest depends on the boxes only; photos have their own digests."""
    one = Scene(scenes(1)[0].pixels, ((8, 16, 24, 32), (0, 40, 96, 96)))
    (voc,) = open_boxed(write_voc(tmp_path / "voc", [one])).val.images
    turned = Scene(one.pixels, one.boxes[::-1])
    (coco,) = open_boxed(write_coco(tmp_path / "coco", [turned])).val.images
    other = write_coco(tmp_path / "other", [Scene(one.pixels, ((8, 16, 24, 33), (0, 40, 96, 96)))])
    (moved,) = open_boxed(other).val.images
    assert voc.truth_digest == coco.truth_digest != moved.truth_digest
    assert voc.boxes == coco.boxes == ((0, 40, 96, 96), (8, 16, 24, 32))


def test_reading_a_data_set_twice_gives_the_same(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "voc", scenes(5))
    first, again = open_boxed(root), open_boxed(root)
    assert first == again and first.val.digest == again.val.digest
    assert [split.split for split in first.splits] == ["val"] and first.absent == ()


def test_exif_rotated_photo_is_measured_upright(tmp_path: Path) -> None:
    """Boxes are in pixels of the image that was annotated; other sizes mean that it was not the upright photo."""
    one = scene((8, 8, 40, 40), size=(64, 96))
    root = write_coco(tmp_path, [one, one])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    path = root / "train2014" / NAMES[0]
    Image.open(path).save(path, exif=exif)
    data = open_boxed(root)
    assert list(boxes_of(data)) == [NAMES[1]]
    assert "96 x 64, expected the photo's 64 x 96" in reasons(data)[NAMES[0]]


def test_helpers_write_boxes_in_each_format() -> None:
    """Half-open boxes become corner and size in COCO, and pixels counted from 1 in VOC."""
    one = Scene(np.zeros((10, 10, 3), np.uint8), ((2, 3, 5, 9),))
    assert coco_json([one])["annotations"][0]["bbox"] == [2, 3, 3, 6]
    assert "<xmin>3</xmin><ymin>4</ymin><xmax>5</xmax><ymax>9</ymax>" in voc_object((2, 3, 5, 9))
    assert mask_of(one).sum() == 255 * 18
