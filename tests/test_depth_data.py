"""Reading photos with depth: both layouts, skipped files and their reasons, and blocks of consecutive photos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.depth import DepthData, open_depth
from denoising_vit.evaluation.depth.data import block_splits, read_depth, scenes_of
from tiny_depth import (
    SIZE,
    blocky,
    flat,
    write_depth,
    write_nyu,
    write_pairs,
    write_photo,
    write_splits,
)

NYU_SIZE = (480, 640)


def reasons(data: DepthData, split: int = -1) -> dict[str, str]:
    return {item.item: item.reason for item in data.splits[split].skipped}


# --- Layouts


def test_folders_without_splits_are_evaluated_in_blocks(tmp_path: Path) -> None:
    data = open_depth(write_pairs(tmp_path / "rooms", blocky(10, 0)))
    assert (data.name, data.layout, data.blocks) == ("rooms", "folders", 5)
    assert [images.split for images in data.splits] == ["val"]
    assert data.note is not None and "5 blocks of consecutive photos" in data.note
    assert [image.id for image in data.val.images] == [f"{number:02}.png" for number in range(10)]


def test_folders_with_splits_have_no_blocks(tmp_path: Path) -> None:
    data = open_depth(write_splits(tmp_path / "rooms", blocky(3, 0), blocky(2, 1)))
    assert (data.layout, data.blocks, data.note, data.over) == ("folders", 0, None, "images")
    assert data.groups is None
    assert [(images.split, len(images.images)) for images in data.splits] == [("train", 3), ("val", 2)]


@pytest.mark.parametrize(("photos", "depths"), [("images", "depth"), ("rgb", "depths"), ("images", "depths")])
def test_folders_may_have_other_names(tmp_path: Path, photos: str, depths: str) -> None:
    root = write_pairs(tmp_path / "rooms", blocky(4, 0))
    (root / "rgb").rename(root / photos)
    (root / "depth").rename(root / depths)
    assert len(open_depth(root, blocks=2).val.images) == 4


def test_photos_in_both_splits_are_noted(tmp_path: Path) -> None:
    pictures = blocky(3, 0)
    data = open_depth(write_splits(tmp_path / "rooms", pictures, pictures[1:]))
    assert data.note == "2 of 2 photos of val are also in train"


def test_depth_is_read_in_metres_at_every_pixel(tmp_path: Path) -> None:
    ((photo, metres),) = blocky(1, 0)
    metres = metres.round(3)
    metres[:3] = 0
    for scale in (1000, 5000):
        image = open_depth(
            write_splits(tmp_path / str(scale), [(photo, metres)], [(photo, metres)], scale), scale=scale
        ).val.images[0]
        assert (image.height, image.width) == SIZE
        found = image.metres()
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), metres, atol=0.5 / scale + 1e-6)
        assert (found[:3] == 0).all()


def test_negative_depth_is_read_as_unknown(tmp_path: Path) -> None:
    numbers = np.full(SIZE, 2000, np.int32)
    numbers[:4] = -1
    Image.fromarray(numbers).save(tmp_path / "depth.tif")
    found = read_depth(tmp_path / "depth.tif")
    assert (found[:4] == 0).all() and (found[4:] == 2000).all()


def test_digest_depends_on_photos_depths_order_and_scale(tmp_path: Path) -> None:
    pictures = blocky(2, 0)

    def digest(name: str, changed: list[Any], scale: float = 1000) -> str:
        return open_depth(write_splits(tmp_path / name, changed, changed, scale), scale=scale).val.digest

    first = digest("a", pictures)
    assert digest("b", pictures) == first
    assert digest("c", pictures, 2000) != first
    (photo, metres), other = pictures
    assert digest("d", [(photo, metres + 0.002), other]) != first
    assert digest("e", [(255 - photo, metres), other]) != first
    assert digest("f", [other, (photo, metres)]) != first


def test_subset_is_spread_evenly_over_each_split(tmp_path: Path) -> None:
    root = write_splits(tmp_path / "rooms", blocky(9, 0), blocky(3, 1))
    seen: list[int] = []
    data = open_depth(root, images=3, progress=lambda: seen.append(1))
    assert [image.id for image in data.train.images] == ["01.png", "04.png", "07.png"]
    assert len(data.val.images) == 3 and len(seen) == 6
    with pytest.raises(EvaluationError, match="expected a number of images of at least 1, or 0 for all, got -1"):
        open_depth(root, images=-1)


# --- NYUv2


@pytest.fixture
def nyu(tmp_path: Path) -> Path:
    pictures = [flat(metres, NYU_SIZE) for metres in (2, 3)]
    return write_nyu(tmp_path / "nyu", pictures, pictures[:1])


def add_line(root: Path, line: str, name: str = "nyu_test.txt") -> None:
    with (root / name).open("a") as file:
        file.write(line + "\n")


def test_nyu_is_read_from_its_lists_sorted_by_photo(nyu: Path) -> None:
    lines = (nyu / "nyu_train.txt").read_text().splitlines()
    (nyu / "nyu_train.txt").write_text("\n".join([lines[1], "", lines[0]]))
    data = open_depth(nyu)
    assert (data.layout, data.blocks) == ("nyu", 0)
    assert [image.id for image in data.train.images] == ["train_0001/rgb_00000.png", "train_0001/rgb_00001.png"]
    assert float(data.train.images[1].metres().mean()) == pytest.approx(3)
    assert not data.val.skipped and not data.train.skipped


@pytest.mark.parametrize(
    ("line", "item", "reason"),
    [
        ("/a/rgb_1.png None 518.8579", "a/rgb_1.png", "no depth map in the list"),
        ("/a/rgb_1.png", "nyu_test.txt:2", "expected a photo, a depth map and a focal length: /a/rgb_1.png"),
        ("/a/rgb_1.png /a/depth_1.png 518.8579", "a/rgb_1.png", "no such file"),
        ("../secret.png /a/depth_1.png 5", "../secret.png", "a path below the folder, got one above it"),
        ("a/rgb_1.png a/../../depth_1.png 5", "a/rgb_1.png", "a path below the folder, got one above it"),
        ("/test_0001/rgb_00000.png /gone.png 5", "test_0001/rgb_00000.png", "no such file, expected a depth map"),
    ],
)
def test_unusable_lines_of_the_lists_are_skipped(nyu: Path, line: str, item: str, reason: str) -> None:
    if line.startswith("/test_0001"):  # in addition to a usable line
        (nyu / "nyu_test.txt").write_text("/train_0001/rgb_00000.png /train_0001/sync_depth_00000.png 5\n")
    add_line(nyu, line)
    data = open_depth(nyu)
    assert len(data.val.images) == 1
    assert list(reasons(data)) == [item]
    assert reason in reasons(data)[item]


def test_photo_listed_twice_is_used_once(nyu: Path) -> None:
    lines = (nyu / "nyu_train.txt").read_text().splitlines()
    add_line(nyu, lines[0], "nyu_train.txt")
    data = open_depth(nyu)
    assert len(data.train.images) == 2
    assert "second time" in reasons(data, 0)["train_0001/rgb_00000.png"]


def test_nyu_photos_of_another_size_are_skipped(nyu: Path) -> None:
    photo, metres = flat(2, (480, 600))
    write_photo(nyu / "small.png", photo)
    write_depth(nyu / "small_depth.png", metres)
    add_line(nyu, "small.png small_depth.png 5")
    assert reasons(open_depth(nyu)) == {"small.png": "expected 640 x 480 pixels, as NYUv2 has, got 600 x 480"}


@pytest.mark.parametrize("missing", ["nyu_train.txt", "nyu_test.txt"])
def test_missing_nyu_list_is_named(nyu: Path, missing: str) -> None:
    (nyu / missing).unlink()
    with pytest.raises(EvaluationError, match=f"nyu looks like NYUv2, but lacks {missing}"):
        open_depth(nyu)


@pytest.mark.parametrize("content", ["", "\n\n", "/a.png None 5\n"])
def test_a_list_without_any_pair_is_refused(nyu: Path, content: str) -> None:
    (nyu / "nyu_test.txt").write_text(content)
    with pytest.raises(
        EvaluationError, match=r"nyu_test\.txt: expected a photo, a depth map and a focal length per line"
    ):
        open_depth(nyu)


# --- Skipped files


@pytest.fixture
def rooms(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "rooms", blocky(5, 0))


def bits8(path: Path) -> None:
    Image.fromarray(np.full(SIZE, 100, np.uint8)).save(path)


def colours(path: Path) -> None:
    Image.fromarray(np.full((*SIZE, 3), 100, np.uint8)).save(path)


def palette(path: Path) -> None:
    Image.fromarray(np.full(SIZE, 100, np.uint8)).convert("P").save(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def broken_in_the_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(bytes(content))


def no_image(path: Path) -> None:
    path.write_text("no image")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def unknown(path: Path) -> None:
    write_depth(path, np.zeros(SIZE))


def smaller(path: Path) -> None:
    write_depth(path, np.full((30, 48), 2.0))


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (bits8, "expected 16-bit depth, got 8 bits, which is too coarse"),
        (palette, "expected 16-bit depth, got 8 bits"),
        (colours, "expected one 16-bit value per pixel, got an image of mode RGB"),
        (cut, "damaged depth map"),
        (broken_in_the_middle, "damaged depth map"),
        (no_image, "not an image file that can be read, expected depth as 16-bit PNG"),
        (nothing, "not an image file that can be read, expected depth as 16-bit PNG"),
        (unknown, "no pixel of the depth map has a depth"),
        (smaller, "a photo of 48 x 32 pixels and a depth map of 48 x 30"),
        (gone, "a photo without a depth map; expected"),
    ],
)
def test_unusable_depth_maps_are_skipped_with_a_reason(
    rooms: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(rooms / "depth" / "02.png")
    data = open_depth(rooms, blocks=2)
    assert [image.id for image in data.val.images] == ["00.png", "01.png", "03.png", "04.png"]
    assert list(reasons(data)) == ["02.png"]
    assert reason in reasons(data)["02.png"]


def test_unusable_photos_are_skipped_with_a_reason(rooms: Path) -> None:
    (rooms / "rgb" / "01.png").write_bytes(b"no image")
    data = open_depth(rooms, blocks=2)
    assert reasons(data) == {"01.png": "not an image file that can be read (JPEG, PNG, WebP, TIFF, ...)"}


def test_depth_maps_without_a_photo_are_reported(rooms: Path) -> None:
    (rooms / "rgb" / "03.png").unlink()
    write_depth(rooms / "depth" / "more" / "07.png", np.full(SIZE, 2.0))
    found = reasons(open_depth(rooms, blocks=2))
    assert list(found) == ["03.png", "more/07.png"]
    assert all("a depth map without a photo; expected" in reason for reason in found.values())


def test_reasons_give_the_actual_paths(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "masks of rooms", blocky(6, 0))
    (root / "depth" / "03.png").unlink()
    (root / "rgb" / "02.png").unlink()
    found = reasons(open_depth(root, blocks=2))
    assert (
        found["03.png"]
        == f"a photo without a depth map; expected {root / 'depth' / '03'}.png, or with another extension"
    )
    assert found["02.png"].startswith(f"a depth map without a photo; expected {root / 'rgb' / '02'}.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("ending", ["png", "tif", *(["avif"] if features.check("avif") else [])])
def test_damaged_files_raise_only_evaluation_errors(tmp_path: Path, ending: str) -> None:
    """Decoders raise errors of many types for damaged files."""
    chance = np.random.default_rng(0)
    path = tmp_path / f"depth.{ending}"
    numbers = chance.uniform(0, 255, SIZE)
    Image.fromarray(numbers.astype(np.uint8 if ending == "avif" else np.uint16)).save(path)
    whole = path.read_bytes()
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for place in chance.integers(0, min(len(content), 300) if chance.random() < 0.7 else len(content), 4):
            content[place] = chance.integers(256)
        path.write_bytes(content[: chance.integers(8, len(content))] if chance.random() < 0.3 else content)
        try:
            read_depth(path)
        except EvaluationError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 30


def test_too_large_depth_map_is_rejected_before_decoding(tmp_path: Path) -> None:
    write_depth(tmp_path / "large.png", np.full((20, 30), 2.0))
    with pytest.raises(EvaluationError, match=r"large\.png: 30 x 20 pixels exceed the limit of 599"):
        read_depth(tmp_path / "large.png", max_pixels=599)


# --- Invalid data


def empty(root: Path) -> None:
    for path in (root / "depth").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scale": 10_000_000},
            r"half of the depths of val are below 0\.000\d+ m, which is implausible .*--depth-scale",
        ),
        (
            {"scale": 1},
            r"at 1 units per metre, half of the depths .* below 3\.?\d*e\+03 m.*give the right --depth-scale",
        ),
        ({"scale": 0}, "depth scale must be a positive number of units per metre, got 0"),
        ({"scale": -5}, "depth scale must be a positive number"),
        ({"scale": float("nan")}, "depth scale must be a positive number"),
        ({"blocks": 1}, "5 photos without splits cannot be evaluated in 1 blocks; expected at least 2 blocks"),
        ({"blocks": 0}, "cannot be evaluated in 0 blocks"),
        ({"blocks": 3}, "5 photos without splits cannot be evaluated in 3 blocks; .* twice as many photos as blocks"),
        ({"images": 3, "blocks": 2}, "3 photos without splits cannot be evaluated in 2 blocks"),
    ],
)
def test_options_that_do_not_fit_the_data_are_refused(rooms: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        open_depth(rooms, **{"blocks": 2, **options})


def test_error_for_an_unusable_split_gives_the_first_reason(rooms: Path) -> None:
    for path in (rooms / "depth").iterdir():
        bits8(path)
    with pytest.raises(
        EvaluationError,
        match=r"photos with depth maps in the split val, but none of 5 is usable; first reason: 00\.png: .*8 bits",
    ):
        open_depth(rooms)
    empty(rooms)
    with pytest.raises(EvaluationError, match=r"none of 0 is .*first reason: 00\.png: a photo without a depth map"):
        open_depth(rooms)


def test_unknown_layout_is_rejected_with_the_files_found(tmp_path: Path) -> None:
    (tmp_path / "other" / "holiday").mkdir(parents=True)
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "half" / "train" / "rgb").mkdir(parents=True)
    (tmp_path / "half" / "train" / "depth").mkdir()
    (tmp_path / "empty").mkdir()
    for root, found in (
        (tmp_path / "other", "found holiday"),
        (tmp_path / "half", ""),
        (tmp_path / "empty", "found an empty folder"),
    ):
        with pytest.raises(
            EvaluationError, match=rf"expected NYUv2 \(nyu_train\.txt, .*rgb or images, depth or depths.*{found}"
        ):
            open_depth(root)
    for root, found in ((file, "a file"), (tmp_path / "gone", "nothing")):
        with pytest.raises(EvaluationError, match=f"expected a data set folder, found {found}"):
            open_depth(root)


# --- Scenes


def test_photos_between_two_training_photos_are_a_scene() -> None:
    train = [f"train/rgb_{number:05}.jpg" for number in (2, 4, 11)]
    val = [f"test/rgb_{number:05}.jpg" for number in (0, 5, 9, 10, 12)]
    scenes = scenes_of(train, val)
    assert list(scenes) == val and list(scenes.values()) == [0, 1, 1, 1, 2]


def test_folders_are_scenes_if_photos_are_numbered_per_folder() -> None:
    train = ["kitchen_0028b/rgb_00045.jpg", "office_0006/rgb_00045.jpg"]
    val = ["kitchen/rgb_00046.jpg", "bathroom/rgb_00050.jpg", "kitchen/rgb_00044.jpg"]
    groups = scenes_of(train, val)
    assert groups == {"bathroom/rgb_00050.jpg": 0, "kitchen/rgb_00046.jpg": 1, "kitchen/rgb_00044.jpg": 1}


@pytest.mark.parametrize("val", [["a.jpg", "b.jpg"], ["5.jpg", "6.jpg"]])  # without numbers; all in one scene
def test_scenes_are_unknown_without_numbers_or_folders(val: list[str]) -> None:
    assert scenes_of(["1.jpg", "2.jpg"], val) == {}


def test_scenes_of_a_subset_come_from_the_full_lists(tmp_path: Path) -> None:
    picture = flat(2, NYU_SIZE)
    root = write_nyu(tmp_path / "nyu", [picture] * 2, [picture] * 4)
    for name, numbers in (("nyu_train.txt", (2, 8)), ("nyu_test.txt", (1, 3, 5, 9))):
        lines = []
        for line, number in zip((root / name).read_text().splitlines(), numbers, strict=True):
            photo, depth, focal = line.split()
            moved = f"{name}_rgb_{number}.png"
            (root / photo.lstrip("/")).rename(root / moved)
            lines.append(f"{moved} {depth} {focal}")
        (root / name).write_text("\n".join(lines))
    data = open_depth(root)
    assert data.over == "scenes" and data.groups is not None and data.groups.tolist() == [0, 1, 1, 2]
    few = open_depth(root, images=1)
    assert few.scenes == data.scenes and few.groups is not None and few.groups.tolist() == [1]


# --- Blocks


@pytest.mark.parametrize(("photos", "blocks"), [(10, 5), (11, 5), (4, 2), (23, 3), (9, 4)])
def test_blocks_evaluate_each_photo_once_and_exclude_its_neighbours(tmp_path: Path, photos: int, blocks: int) -> None:
    data = open_depth(write_pairs(tmp_path / "rooms", blocky(photos, 0, (8, 8))), blocks=blocks)
    names = [image.id for image in data.val.images]
    judged: list[str] = []
    splits = block_splits(data)
    assert len(splits) == blocks
    for train, val in splits:
        here = [names.index(image.id) for image in val.images]
        assert here == list(range(here[0], here[-1] + 1))  # consecutive
        assert len(here) in (photos // blocks, photos // blocks + 1)
        left_out = {here[0] - 1, *here, here[-1] + 1}
        assert [names.index(image.id) for image in train.images] == [
            place for place in range(photos) if place not in left_out
        ]
        assert train.images and (train.split, val.split) == ("train", "val")
        judged += [image.id for image in val.images]
    assert judged == names


def test_two_splits_are_one_block(tmp_path: Path) -> None:
    data = open_depth(write_splits(tmp_path / "rooms", blocky(3, 0), blocky(2, 1)))
    assert block_splits(data) == [(data.train, data.val)]
