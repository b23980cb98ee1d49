"""Videos in the layout of DAVIS: what is read, what is skipped and why, and what is rejected."""

from __future__ import annotations

import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.correspondence import ClipData, open_clips, open_correspondence
from denoising_vit.evaluation.masks import NO_LABEL, Objects
from tiny_correspondence import HEIGHT, WIDTH, crossing, moving, save_mask, write_davis, write_spair

MASKS = "Annotations/480p"
PHOTOS = "JPEGImages/480p"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One sequence with binary masks and one with numbered masks, of four frames each."""
    return write_davis(tmp_path / "data", {"white": moving(4), "numbers": crossing(4)})


def reasons(data: ClipData) -> dict[str, str]:
    return {entry.item: entry.reason for entry in data.val.skipped}


# --- what is read ---


def test_binary_and_numbered_masks_are_read(root: Path) -> None:
    data = open_clips(root)
    assert (data.name, data.layout, data.absent) == ("data", "davis", ())
    assert [image.id for image in data.val.images[:5]] == [
        *(f"numbers/{number:05}.png" for number in range(4)),
        "white/00000.png",
    ]
    assert [(len(frames), frames[0].sequence, frames[0].objects) for frames in data.clips] == [
        (4, "numbers", (1, 2)),
        (4, "white", (1,)),
    ]
    assert data.val.skipped == () and data.val.common_size == (HEIGHT, WIDTH)
    assert [images.split for images in data.splits] == ["val"]
    for frames, shots in zip(data.clips, (crossing(4), moving(4)), strict=True):
        for one, (pixels, mask) in zip(frames, shots, strict=True):
            assert mask is not None
            assert np.array_equal(one.pixels(), pixels)
            assert np.array_equal(one.labels().numpy(), np.where(mask == 255, 1, mask))


def test_255_means_no_label_in_numbered_masks(root: Path) -> None:
    for number in (0, 2):
        path = root / MASKS / "numbers" / f"{number:05}.png"
        mask = np.array(Image.open(path))
        mask[:10] = 255
        save_mask(path, mask)
    labels = open_clips(root).clips[0][2].labels().numpy()
    assert (labels[:10] == NO_LABEL).all() and set(np.unique(labels[10:]).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("mode", ["1", "L"])
def test_one_bit_and_grayscale_masks_are_binary(root: Path, mode: str) -> None:
    """Tools that shrink PNG files may convert only some masks of a sequence to one bit."""
    path = root / MASKS / "white" / "00000.png"
    Image.open(path).convert(mode).save(path)
    data = open_clips(root)
    assert data.clips[1][0].coding.binary and not data.val.skipped
    assert data.clips[1][0].labels().sum() == data.clips[1][1].labels().sum() == 40 * 40


def test_four_bit_grayscale_masks_keep_their_numbers(root: Path) -> None:
    """Decoding multiplies 4-bit grayscale by 17."""
    before = open_clips(root)
    for number in range(4):
        path = root / MASKS / "numbers" / f"{number:05}.png"
        _save_four_bits(path, np.array(Image.open(path)))
        assert set(np.unique(np.array(Image.open(path))).tolist()) == {0, 17, 34}
    after = open_clips(root)
    assert after.val.digest == before.val.digest and not after.val.skipped


def _save_four_bits(path: Path, mask: np.ndarray) -> None:
    """Writes a 4-bit grayscale PNG, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = mask.shape
    packed = (mask[:, ::2] << 4 | mask[:, 1::2]).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, 4, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_other_resolutions_are_found_and_480p_is_preferred(root: Path, tmp_path: Path) -> None:
    other = write_davis(tmp_path / "other", {"full": moving(2)}, "Full-Resolution")
    assert [frames[0].sequence for frames in open_clips(other).clips] == ["full"]
    write_davis(root, {"full": moving(2)}, "Full-Resolution")
    assert [frames[0].sequence for frames in open_clips(root).clips] == ["numbers", "white"]
    assert len(open_clips(write_davis(tmp_path / "own", {"a": moving(2)}, "240p")).clips) == 1


def test_parent_folder_of_the_data_is_accepted(root: Path, tmp_path: Path) -> None:
    (tmp_path / "above").mkdir()
    root.rename(tmp_path / "above" / "DAVIS")
    assert len(open_clips(tmp_path / "above").clips) == 2
    assert len(open_correspondence(tmp_path / "above").val.images) == 8


def test_image_set_lists_select_the_sequences(root: Path) -> None:
    """DAVIS 2017 lists sequences, DAVIS 2016 frames. Without a list, all are evaluated, with a note."""
    assert "all are evaluated" in (open_clips(root).note or "")
    frames = "".join(f"/{PHOTOS}/white/{n:05}.jpg /{MASKS}/white/{n:05}.png\n" for n in range(4))
    (root / "ImageSets" / "480p").mkdir(parents=True)
    (root / "ImageSets" / "480p" / "val.txt").write_text(frames)
    data = open_clips(root)
    assert [clip[0].sequence for clip in data.clips] == ["white"] and data.note is None and data.name == "DAVIS 2016"
    (root / "ImageSets" / "2017").mkdir()
    (root / "ImageSets" / "2017" / "val.txt").write_text("numbers\n\nmissing\r\n../white\n")
    data = open_clips(root)
    assert [clip[0].sequence for clip in data.clips] == ["numbers", "white"] and data.name == "DAVIS"
    assert list(reasons(data)) == ["missing"] and "no folder" in reasons(data)["missing"]
    (root / "ImageSets" / "2017" / "val.txt").write_text("numbers\n")
    assert open_clips(root).name == "DAVIS 2017"


def test_frames_are_sorted_by_number(root: Path) -> None:
    for folder in (root / PHOTOS / "white", root / MASKS / "white"):
        for number, name in ((0, "9"), (1, "10"), (2, "100"), (3, "101")):
            (folder / f"{number:05}.png").rename(folder / f"{name}.png")
    frames = open_clips(root).clips[1]
    assert [Path(one.id).stem for one in frames] == ["9", "10", "100", "101"]


def test_limited_sequences_are_spread_over_all(tmp_path: Path) -> None:
    root = write_davis(tmp_path, {f"clip{number}": moving(2, number) for number in range(5)})
    steps: list[int] = []
    data = open_clips(root, sequences=2, progress=lambda: steps.append(1))
    assert [frames[0].sequence for frames in data.clips] == ["clip1", "clip3"] and len(steps) == 4
    with pytest.raises(EvaluationError, match="number of sequences of at least 1, or 0 for all, got -1"):
        open_clips(root, sequences=-1)


def test_digest_changes_with_the_masks(root: Path, tmp_path: Path) -> None:
    digest = open_clips(root).val.digest
    other = shutil.copytree(root, tmp_path / "copy")
    assert open_clips(other).val.digest == digest
    path = other / MASKS / "white" / "00002.png"
    mask = np.array(Image.open(path))
    for changed in (np.roll(mask, 1), None):
        path.unlink()
        if changed is not None:
            save_mask(path, changed)
        found = open_clips(other).val.digest
        assert found != digest
        digest = found


# --- what is skipped ---


def test_frames_without_masks_are_kept_and_reported_once_per_sequence(root: Path) -> None:
    for number in (1, 2):
        (root / MASKS / "white" / f"{number:05}.png").unlink()
    data = open_clips(root)
    assert [one.mask is None for one in data.clips[1]] == [False, True, True, False]
    assert reasons(data) == {
        "white": "2 of 4 frames have no mask (00001.png first): propagated through, but not evaluated"
    }
    with pytest.raises(EvaluationError, match="expected a frame with a mask"):
        data.clips[1][1].labels()


def _shades(mask: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(mask).resize((37, 29), Image.Resampling.BILINEAR).resize(mask.shape[::-1]))


def _spoil_by(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        mask = change(np.array(Image.open(path)))
        path.unlink()
        Image.fromarray(mask).save(path)

    return spoil


def _as_jpeg(path: Path) -> None:
    Image.open(path).convert("L").save(path, "JPEG")


#: Damage to a mask, and the reason that is reported.
SPOILT = {
    "size": (_spoil_by(lambda mask: mask[:50, :70]), "a photo of 128 x 96 pixels and a mask of 70 x 50"),
    "shades": (
        _spoil_by(_shades),
        r"\d+ values \(0, .*, \.\.\.\); expected 0 and 255, or object numbers from 1 to at most 50",
    ),
    "few shades": (_spoil_by(lambda mask: np.where(np.roll(mask, 3) != mask, 20, mask)), "3 values .*0, 20, 255"),
    "jpeg": (_as_jpeg, "got JPEG"),
    "colours": (_spoil_by(lambda mask: np.stack([mask] * 3, -1)), "got mode RGB"),
    "no image": (lambda path: path.write_text("nothing"), "not an image file"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:60]), "damaged or unreadable"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_unusable_mask_is_reported_and_its_frame_is_kept(root: Path, kind: str) -> None:
    spoil, words = SPOILT[kind]
    spoil(root / MASKS / "white" / "00002.png")
    data = open_clips(root)
    assert [one.mask is None for one in data.clips[1]] == [False, False, True, False]
    ((item, reason),) = reasons(data).items()
    assert item == "white/00002.png" and reason.startswith("propagated through, but not evaluated: ")
    assert re.search(words, reason)


@pytest.mark.parametrize("kind", SPOILT)
def test_sequence_with_an_unusable_first_mask_is_skipped(root: Path, kind: str) -> None:
    spoil, words = SPOILT[kind]
    spoil(root / MASKS / "white" / "00000.png")
    data = open_clips(root)
    assert [frames[0].sequence for frames in data.clips] == ["numbers"]
    ((item, reason),) = reasons(data).items()
    assert item == "white" and re.search(words, reason)


def only_white(root: Path, count: int) -> None:
    for folder in (root / PHOTOS / "white", root / MASKS / "white"):
        for path in sorted(folder.iterdir())[count:]:
            path.unlink()


def _no_first_mask(root: Path) -> None:
    (root / MASKS / "white" / "00000.png").unlink()


def _no_masks(root: Path) -> None:
    shutil.rmtree(root / MASKS / "white")


def _empty_first_mask(root: Path) -> None:
    save_mask(root / MASKS / "white" / "00000.png", np.zeros((HEIGHT, WIDTH), np.uint8))


def _only_the_first_mask(root: Path) -> None:
    for number in (1, 2, 3):
        (root / MASKS / "white" / f"{number:05}.png").unlink()


def _damaged_first_frame(root: Path) -> None:
    path = root / PHOTOS / "white" / "00000.png"
    path.write_bytes(path.read_bytes()[:200])


def _one_frame_that_can_be_read(root: Path) -> None:
    for number in (1, 2, 3):
        (root / PHOTOS / "white" / f"{number:05}.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: only_white(root, 1), r"^a sequence of one frame; expected at least two$"),
        (lambda root: only_white(root, 0), r"^a sequence without frames$"),
        (_no_first_mask, r"the first frame has no mask; expected .*white/00000\.png"),
        (_no_masks, r"the first frame has no mask; expected .*white/00000\.png"),
        (_empty_first_mask, r"00000\.png: the first mask is empty; expected at least one object"),
        (_only_the_first_mask, "no frame after the first has a mask: nothing to evaluate"),
        (_damaged_first_frame, r"00000\.png: damaged"),
        (_one_frame_that_can_be_read, r"a sequence of one frame; .* \(white/00001\.png: the file is empty"),
    ],
)
def test_unusable_sequence_is_skipped(root: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(root)
    data = open_clips(root)
    assert [frames[0].sequence for frames in data.clips] == ["numbers"]
    assert re.search(words, reasons(data)["white"])
    shutil.rmtree(root / PHOTOS / "numbers")
    with pytest.raises(EvaluationError, match="none of 1 is usable; first reason: white: ") as error:
        open_clips(root)
    assert re.search(words.removeprefix("^").removesuffix("$"), str(error.value))


def test_unusable_frame_is_skipped(root: Path) -> None:
    (root / PHOTOS / "white" / "00001.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(root / PHOTOS / "white" / "00002.png")
    data = open_clips(root)
    assert [one.id for one in data.clips[1]] == ["white/00000.png", "white/00003.png"]
    skipped = reasons(data)
    assert "not an image file" in skipped["white/00001.png"]
    assert skipped["white/00002.png"] == "expected 128 x 96 pixels as in the sequence's first frame, got 30 x 20"


def test_unmatched_and_duplicate_files_are_reported(root: Path) -> None:
    (root / PHOTOS / "white" / "00003.png").unlink()
    Image.fromarray(moving(1)[0][0]).save(root / PHOTOS / "white" / "00000.jpg")
    (root / PHOTOS / "white" / "notes.txt").write_text("no frame")
    (root / PHOTOS / "white" / ".hidden.png").write_text("no frame")
    data = open_clips(root)
    assert len(data.clips[1]) == 3
    skipped = reasons(data)
    assert set(skipped) == {"white/00003.png", "white/00000.png"}
    assert "a mask without a frame; expected" in skipped["white/00003.png"]
    assert skipped["white/00000.png"] == "duplicate file name 00000; 00000.jpg is used"


def test_object_missing_from_the_first_mask_is_ignored(root: Path) -> None:
    path = root / MASKS / "numbers" / "00000.png"
    mask = np.array(Image.open(path))
    save_mask(path, np.where(mask == 1, 1, 0).astype(np.uint8))
    data = open_clips(root)
    assert reasons(data) == {"numbers": "not in the first mask, so ignored: object 2"}
    assert data.clips[0][0].objects == (1,)
    for one in data.clips[0]:
        assert set(one.labels().unique().tolist()) == {0, 1}


def test_object_numbers_may_have_gaps() -> None:
    """For example if an object of the data set is not in the first frame."""
    objects = Objects.first(np.array([[0, 2], [5, 0]]), "mask")
    assert objects == Objects((2, 5), False)
    labels, others = objects.labels(np.array([[5, 3], [255, 2]]), "mask")
    assert labels.tolist() == [[5, 0], [NO_LABEL, 2]] and others == (3,)


def test_invalid_mask_values_are_rejected() -> None:
    for values in ([0, 51], [-1, 0], [0, 2, 255], [0, 65535]):
        with pytest.raises(EvaluationError, match=f"^mask: {len(values)} values"):
            Objects.first(np.array([values]), "mask")
    assert Objects.first(np.array([[255, 255]]), "mask") == Objects((1,), True)
    with pytest.raises(EvaluationError, match=r"^mask: 1 values"):
        Objects((1,), True).labels(np.array([[1]]), "mask")
    with pytest.raises(EvaluationError, match=r"^mask: 2 values"):
        Objects((1,), False).labels(np.array([[1, 51]]), "mask")


# --- what is rejected ---


@pytest.mark.parametrize("opened", [open_clips, open_correspondence])
def test_invalid_data_folder_is_rejected(tmp_path: Path, opened: Callable[[Path], object]) -> None:
    with pytest.raises(EvaluationError, match="expected a data set folder, found nothing"):
        opened(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="expected a data set folder, found a file"):
        opened(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"expected .*DAVIS \(JPEGImages, Annotations\).*; found an empty folder"):
        opened(tmp_path / "empty")
    (tmp_path / "other" / "images").mkdir(parents=True)
    (tmp_path / "other" / "JPEGImages").write_text("no folder")
    (tmp_path / "other" / "Annotations").mkdir()
    with pytest.raises(EvaluationError, match=r"looks like DAVIS, but lacks JPEGImages \(a file, expected a folder\)"):
        opened(tmp_path / "other")
    with pytest.raises(EvaluationError, match="cannot be read"):
        opened(tmp_path / ("x" * 300))


def test_pairs_are_rejected_as_videos(tmp_path: Path) -> None:
    write_spair(tmp_path, [(0, 1)])
    with pytest.raises(EvaluationError, match="looks like DAVIS, but lacks Annotations; expected DAVIS"):
        open_clips(tmp_path)


def test_layout_without_a_unique_resolution_folder_is_rejected(tmp_path: Path) -> None:
    for kind in ("JPEGImages", "Annotations"):
        (tmp_path / kind / "a").mkdir(parents=True)
        (tmp_path / kind / "b").mkdir()
    with pytest.raises(EvaluationError, match=r"one resolution folder, such as 480p, .*; found a/, b/ and a/, b/"):
        open_clips(tmp_path)
    shutil.rmtree(tmp_path / "Annotations" / "a")
    shutil.rmtree(tmp_path / "Annotations" / "b")
    with pytest.raises(EvaluationError, match="found a/, b/ and an empty folder"):
        open_clips(tmp_path)


def test_data_without_sequences_is_rejected(tmp_path: Path) -> None:
    for kind in ("JPEGImages", "Annotations"):
        (tmp_path / kind / "480p").mkdir(parents=True)
    with pytest.raises(EvaluationError, match=r"expected sequences of frames with masks, but none of 0 is usable$"):
        open_clips(tmp_path)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    listed = tmp_path / "ImageSets" / "2017" / "val.txt"
    listed.write_text(" \n\n")
    with pytest.raises(EvaluationError, match=r"val\.txt: expected names, one per line, found none"):
        open_clips(tmp_path)
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match=r"val\.txt: expected UTF-8 text"):
        open_clips(tmp_path)
    listed.write_text("bear\n")
    with pytest.raises(EvaluationError, match=r"first reason: bear: listed in .* no folder"):
        open_clips(tmp_path)


def test_mask_deleted_after_opening_is_a_clear_error(root: Path) -> None:
    frames = open_clips(root).clips[0]
    (root / MASKS / "numbers" / "00001.png").unlink()
    with pytest.raises(EvaluationError, match=r"00001\.png: no such file"):
        frames[1].labels()
