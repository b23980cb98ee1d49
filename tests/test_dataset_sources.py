"""Data sets: which images a source has, in which order, and that one bad file does not affect the others."""

from __future__ import annotations

import contextlib
import functools
import http.server
import importlib
import io
import os
import pickle
import shutil
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from denoising_vit.data import Dataset, Item, Skipped, find_photos, open_dataset
from denoising_vit.data.listing import expand_braces
from denoising_vit.data.photos import PANEL_SOFTWARE
from denoising_vit.data.storage import Storage
from denoising_vit.errors import PhotoError


def picture(value: int, ending: str = "png", **options: Any) -> bytes:
    """File content of a 5 x 3 image with the same value in all pixels; the value identifies the image."""
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3), (value, value, value)).save(buffer, Image.registered_extensions()[f".{ending}"], **options)
    return buffer.getvalue()


def panel(value: int = 0) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Software", PANEL_SOFTWARE)
    return picture(value, pnginfo=info)


def put(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def tar(members: dict[str, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=options.pop("mode", "w"), **options) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def ids(dataset: Dataset) -> list[str]:
    return [item.id for item in dataset]


def values(dataset: Dataset) -> list[int]:
    return [int(dataset.read(index)[0, 0, 0]) for index in range(len(dataset))]


def seen(entry: np.ndarray | Skipped) -> int | str:
    return entry.reason if isinstance(entry, Skipped) else int(entry[0, 0, 0])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of classes, with files of every kind that is ignored."""
    root = tmp_path / "tree"
    for number, name in enumerate(["n02/b.png", "n02/a.png", "n01/deep/c.PNG", "top.png"]):
        put(root / name, picture(number))
    put(root / "notes.txt", b"no list")
    put(root / ".hidden.png", picture(9))
    put(root / ".cache/x.png", picture(9))
    put(root / "n01/panel.png", panel())
    return root


TREE_IDS = ["n01/deep/c.PNG", "n02/a.png", "n02/b.png", "top.png"]


@pytest.fixture
def memory() -> Iterator[str]:
    """An empty folder in the in-memory file system of fsspec."""
    address = "memory://dataset-test"
    yield address
    fsspec.filesystem("memory").rm("/dataset-test", recursive=True)


def upload(address: str, content: bytes) -> None:
    with fsspec.open(address, "wb") as file:
        file.write(content)  # pyright: ignore[reportAttributeAccessIssue]


# --- folders ---


def test_folder_lists_images_at_every_depth_sorted_by_id(tree: Path) -> None:
    dataset = open_dataset(tree)
    assert ids(dataset) == TREE_IDS
    assert values(dataset) == [2, 1, 0, 3]
    assert dataset.skipped == ()
    assert dataset.source == str(tree)


def test_copied_folder_has_the_same_ids_and_digest(tree: Path, tmp_path: Path) -> None:
    dataset = open_dataset(tree)
    for name in reversed(TREE_IDS):
        put(tmp_path / "copy" / name, (tree / name).read_bytes())
    copy = open_dataset(tmp_path / "copy")
    assert ids(copy) == ids(dataset)
    assert copy.digest == dataset.digest


def test_renaming_a_file_changes_the_digest(tree: Path) -> None:
    before = open_dataset(tree).digest
    (tree / "top.png").rename(tree / "tip.png")
    assert open_dataset(tree).digest != before


def test_digest_separates_ids() -> None:
    assert Dataset("", [Item("ab", ""), Item("c", "")]).digest != Dataset("", [Item("a", ""), Item("bc", "")]).digest


def test_relative_folder_is_still_read_after_a_change_of_directory(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree.parent)
    dataset = open_dataset("tree")
    monkeypatch.chdir("/")
    assert ids(dataset) == TREE_IDS
    assert values(dataset) == [2, 1, 0, 3]


def test_folder_in_memory_is_read_like_a_folder_on_disk(tree: Path, memory: str) -> None:
    fsspec.filesystem("memory").put(str(tree), "/dataset-test/copy", recursive=True)
    dataset = open_dataset(f"{memory}/copy")
    assert ids(dataset) == TREE_IDS  # without hidden files and panels
    assert dataset.digest == open_dataset(tree).digest
    assert values(dataset) == [2, 1, 0, 3]
    assert open_dataset(f"{memory}/copy/").digest == dataset.digest


def test_file_address_is_read_like_a_path(tree: Path) -> None:
    assert ids(open_dataset(f"file://{tree}")) == TREE_IDS


def test_symlinked_class_folder_is_read(tree: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere/z.png", picture(8))
    (tree / "n03").symlink_to(tmp_path / "elsewhere")
    assert ids(open_dataset(tree)) == [*TREE_IDS[:3], "n03/z.png", "top.png"]


def test_broken_and_circular_links_are_skipped_with_reasons(tree: Path) -> None:
    (tree / "n01/up").symlink_to(tree)
    (tree / "gone.png").symlink_to(tree / "nothing.png")
    (tree / "self.png").symlink_to(tree / "self.png")
    dataset = open_dataset(tree)
    assert ids(dataset) == TREE_IDS
    reasons = {entry.item: entry.reason for entry in dataset.skipped}
    assert set(reasons) == {"n01/up", "gone.png", "self.png"}
    assert "a link to its parent folder" in reasons["n01/up"]
    assert "broken link" in reasons["gone.png"]


def test_unreadable_folder_is_skipped_and_the_others_are_listed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: Path) -> Any:  # permissions have no effect if tests run as root
        if Path(path).name == "n01":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    dataset = open_dataset(tree)
    assert ids(dataset) == TREE_IDS[1:]
    assert dataset.skipped == (Skipped("n01", "unreadable folder (Permission denied)"),)


@pytest.mark.skipif(sys.platform != "linux", reason="file names that are no text")
def test_name_that_is_not_utf8_is_skipped(tree: Path) -> None:
    Path(os.fsdecode(os.fsencode(tree) + b"/caf\xe9.png")).write_bytes(picture(1))
    dataset = open_dataset(tree)
    assert ids(dataset) == TREE_IDS
    (entry,) = dataset.skipped
    assert "not UTF-8" in entry.reason
    entry.item.encode()


@pytest.mark.parametrize("content", [None, b"words"])
def test_folder_without_images_is_an_error_that_says_what_was_expected(tmp_path: Path, content: bytes | None) -> None:
    put(tmp_path / "empty" / ".keep")
    if content:
        put(tmp_path / "empty" / "readme.md", content)
    with pytest.raises(PhotoError, match=r"empty: expected a folder of images, .* found none"):
        open_dataset(tmp_path / "empty")


@pytest.mark.parametrize("source", ["nowhere", "memory://dataset-nowhere"])
def test_missing_source_is_an_error(source: str) -> None:
    with pytest.raises(PhotoError, match=r"no such file or folder, expected a folder of images"):
        open_dataset(source)


def test_empty_name_is_rejected() -> None:
    with pytest.raises(PhotoError, match="got an empty name"):
        open_dataset("")


def test_address_given_as_path_is_rejected_with_a_hint() -> None:
    with pytest.raises(PhotoError, match="give s3:// addresses as str"):
        open_dataset(Path("s3://bucket/photos"))


# --- one file ---


def test_single_image_is_a_data_set_with_any_extension(tmp_path: Path) -> None:
    dataset = open_dataset(put(tmp_path / "photo.upload", picture(7)))
    assert (ids(dataset), values(dataset)) == (["photo.upload"], [7])


def test_single_file_that_is_not_an_image_is_an_error(tmp_path: Path) -> None:
    table = put(tmp_path / "photos.csv", b"a,b\n")
    with pytest.raises(PhotoError, match=r"photos\.csv: expected .*, got a file of another type"):
        open_dataset(table)


def test_existing_file_with_pattern_characters_is_taken_literally(tmp_path: Path) -> None:
    put(tmp_path / "p1.png", picture(1))
    assert ids(open_dataset(put(tmp_path / "p[1].png", picture(2)))) == ["p[1].png"]
    assert ids(open_dataset(put(tmp_path / "p{1..2}.png", picture(2)))) == ["p{1..2}.png"]


# --- reading ---


def test_reading_applies_the_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path / "turned.jpg", picture(1, "jpg", exif=exif))
    assert open_dataset(tmp_path).read(0).shape == (5, 3, 3)  # stored 3 high and 5 wide


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"only words", "not an image file"),
        (picture(1, "jpg")[:-40], "damaged or unreadable"),
        (picture(1)[:-25], "damaged or unreadable"),
        (b"P6 65536 65536 255\n" + b"x" * 50, "65,536 x 65,536 pixels exceed the limit"),
    ],
    ids=["empty", "words", "cut-jpeg", "cut-png", "bomb"],
)
@pytest.mark.parametrize("shard", [False, True])
def test_unreadable_item_is_an_error_with_its_id(tmp_path: Path, content: bytes, reason: str, shard: bool) -> None:
    put(tmp_path / "data.tar", tar({"x/bad.jpg": content})) if shard else put(tmp_path / "x/bad.jpg", content)
    dataset = open_dataset(tmp_path)
    name = "data.tar/x/bad.jpg" if shard else "x/bad.jpg"
    with pytest.raises(PhotoError, match=rf"^{name}: .*({reason})"):
        dataset.read(0)


def test_stream_yields_skipped_for_unreadable_items(tmp_path: Path) -> None:
    for number in range(6):
        put(tmp_path / f"{number}.png", picture(number))
    put(tmp_path / "1.png", picture(1)[:-25])
    put(tmp_path / "4.png", b"")
    dataset = open_dataset(tmp_path)
    (tmp_path / "2.png").unlink()
    entries = dict(dataset.stream(range(6)))
    assert [seen(entries[index]) for index in (0, 3, 5)] == [0, 3, 5]
    assert entries[2] == Skipped("2.png", "no such file")
    assert entries[4] == Skipped("4.png", "the file is empty (0 bytes)")
    broken = entries[1]
    assert isinstance(broken, Skipped) and broken.item == "1.png" and broken.reason.startswith("damaged")
    assert not broken.unreachable  # a retry would give the same error


def test_any_read_error_is_yielded_as_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.png", picture(1))
    dataset = open_dataset(tmp_path)

    def fail(*_: Any) -> bytes:
        raise TimeoutError

    monkeypatch.setattr(dataset._storage, "read", fail)
    assert list(dataset.stream([0])) == [(0, Skipped("a.png", "TimeoutError", unreachable=True))]


@pytest.mark.parametrize(("status", "may_pass"), [(403, False), (410, False), (408, True), (429, True), (503, True)])
def test_permanent_server_errors_are_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, may_pass: bool
) -> None:
    put(tmp_path / "a.png", picture(1))
    dataset = open_dataset(tmp_path)
    asked: list[float] = []

    class Refused(Exception):
        def __init__(self) -> None:
            super().__init__("refused")
            self.status = status

    def refuse(*_: Any) -> bytes:
        raise Refused

    monkeypatch.setattr(dataset._storage, "read", refuse)
    monkeypatch.setattr("denoising_vit.data.dataset.time.sleep", asked.append)
    ((_, found),) = dataset.stream([0], patience=(1.0, 5.0))
    assert isinstance(found, Skipped) and found.unreachable == may_pass
    assert asked == ([1.0, 5.0] if may_pass else [])


# --- streaming ---


class Slow(Dataset):
    """Records which items are read; reading item 0 blocks until ``go`` is set."""

    def __init__(self, count: int) -> None:
        super().__init__("slow", [Item(str(number), "") for number in range(count)])
        self.go = threading.Event()
        self.begun: list[int] = []
        self.done = threading.Semaphore(0)

    def read(self, index: int) -> np.ndarray:
        self.begun.append(index)
        if index == 0:
            assert self.go.wait(20)
        self.done.release()
        return np.full((1, 1, 3), index, np.uint8)


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dvit-read")]


def test_stream_keeps_the_requested_order_when_the_first_item_is_slow() -> None:
    dataset = Slow(40)
    order = [0, *range(39, 0, -1), 5, 5]

    def release() -> None:
        for _ in range(8):  # item 0 is only released after all 8 items that may be read ahead are ready
            dataset.done.acquire(timeout=20)
        dataset.go.set()

    threading.Thread(target=release).start()
    entries = list(dataset.stream(order, workers=8, ahead=8))
    assert [index for index, _ in entries] == order
    assert [seen(entry) for _, entry in entries] == order
    assert not readers()


def test_at_most_ahead_images_are_read_in_advance() -> None:
    dataset = Slow(100)
    dataset.go.set()
    stream = dataset.stream(range(100), workers=4, ahead=5)
    for taken in range(1, 20):
        next(stream)
        assert len(dataset.begun) <= taken + 5
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("leave", ["close", "break"])
def test_stopping_early_stops_the_threads(leave: str) -> None:
    dataset = Slow(1000)
    dataset.go.set()
    if leave == "close":
        stream = dataset.stream(range(1000), workers=6)
        next(stream)
        assert readers()
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    else:
        for _ in dataset.stream(range(1000), workers=6):
            break
    assert not readers()
    assert len(dataset.begun) < 20


def test_endless_indices_are_consumed_lazily() -> None:
    dataset = Slow(3)
    dataset.go.set()
    taken: list[int] = []

    def forever() -> Iterator[int]:
        while True:
            taken.append(len(taken) % 3)
            yield taken[-1]

    stream = dataset.stream(forever(), workers=2, ahead=4)
    assert [next(stream)[0] for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert len(taken) == 7 + 4


def test_index_out_of_range_raises_index_error(tree: Path) -> None:
    with pytest.raises(IndexError):
        list(open_dataset(tree).stream([0, 4]))
    assert not readers()


@pytest.mark.parametrize("options", [{"workers": 0}, {"ahead": 0}])
def test_stream_rejects_zero_workers_and_zero_ahead_immediately(tree: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        open_dataset(tree).stream([0], **options)


def test_stream_of_no_indices_is_empty(tree: Path) -> None:
    assert list(open_dataset(tree).stream([])) == []


def test_data_set_is_a_picklable_sequence(tree: Path, memory: str) -> None:
    fsspec.filesystem("memory").put(str(tree), "/dataset-test/copy", recursive=True)
    dataset = open_dataset(f"{memory}/copy")
    dataset.read(0)
    sent: Dataset = pickle.loads(pickle.dumps(dataset))
    assert list(sent) == list(dataset) and sent.digest == dataset.digest and values(sent) == [2, 1, 0, 3]
    assert dataset[1].id == TREE_IDS[1]
    assert [item.id for item in dataset[2:]] == TREE_IDS[2:]


# --- ignored files ---


def left_out(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("denoising_vit")]


def test_ignored_files_are_counted_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jpg", "b.jfif", "c.JPE", "deep/d.heic", "e.heic", "f.json", "README", ".hidden"):
        put(tmp_path / "photos" / name, b"")
    caplog.set_level("INFO", "denoising_vit")
    folder = str(tmp_path / "photos")
    message = f"{folder}: 4 files ignored, without an image extension (2 .heic, 1 no extension, 1 .json)"
    assert ids(open_dataset(folder)) == ["a.jpg", "b.jfif", "c.JPE"]
    assert left_out(caplog) == [message]
    caplog.clear()
    found, skipped = find_photos([folder])
    assert [file.name for file in found] == ["a.jpg", "b.jfif", "c.JPE"] and not skipped
    assert left_out(caplog) == [message]


def test_ignored_shard_members_are_counted_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "a.tar", tar({"1.jfif": picture(1), "1.json": b"{}", "1.cls": b"3"}))
    put(tmp_path / "b.tar", tar({"2.png": picture(2), "2.json": b"{}"}))
    caplog.set_level("INFO", "denoising_vit")
    assert ids(open_dataset(tmp_path)) == ["a.tar/1.jfif", "b.tar/2.png"]
    assert left_out(caplog) == ["tar shards: 3 files ignored, without an image extension (2 .json, 1 .cls)"]


def test_both_finders_follow_folder_links_and_report_bad_links(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "a.jpg", picture(1))
    folder = tmp_path / "photos"
    put(folder / "b.jpg", picture(2))
    (folder / "class").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    dataset, (found, skipped) = open_dataset(folder), find_photos([folder])
    assert ids(dataset) == ["b.jpg", "class/a.jpg"]
    assert [file.relative_to(folder).as_posix() for file in found] == ids(dataset)
    assert [entry.item for entry in dataset.skipped] == ["circle", "gone.jpg"]
    assert skipped == [Skipped(str(folder / entry.item), entry.reason) for entry in dataset.skipped]


# --- text lists ---


def test_list_keeps_its_order_and_reports_skipped_lines(tree: Path) -> None:
    absolute = str(tree / "n01/deep/c.PNG")
    lines = ["\ufeff# photos", "top.png", "", "n02/b.png\r", "  top.png  ", "n02/../top.png", "gone.png", absolute]
    listing = put(tree / "list.txt", "\n".join([*lines, "n02", "shards.tar"]).encode())
    dataset = open_dataset(listing)
    assert ids(dataset) == ["top.png", "n02/b.png", absolute]
    assert values(dataset) == [3, 0, 2]
    assert dataset.skipped[:4] == (
        Skipped("top.png", "line 5: a duplicate of line 2"),
        Skipped("n02/../top.png", "line 6: a duplicate of line 2"),
        Skipped("gone.png", "line 7: no such file"),
        Skipped("n02", "line 9: a folder; expected an image file"),
    )
    assert dataset.skipped[4].reason.startswith("line 10: a tar shard;")


def test_folder_with_the_extension_of_a_list_is_read_as_a_folder(tree: Path) -> None:
    tree.rename(tree.parent / "tree.txt")
    assert ids(open_dataset(tree.parent / "tree.txt")) == TREE_IDS


def test_paths_in_a_list_at_an_address_are_relative_to_its_folder(memory: str) -> None:
    upload(f"{memory}/photos/a.png", picture(1))
    upload(f"{memory}/b.png", picture(2))
    upload(f"{memory}/lists/list.txt", f"../photos/a.png\n{memory}/b.png\nmissing.png\n/etc/hosts\n".encode())
    dataset = open_dataset(f"{memory}/lists/list.txt")
    assert ids(dataset) == ["../photos/a.png", f"{memory}/b.png", "missing.png"]
    assert [seen(entry) for _, entry in dataset.stream(range(3))] == [1, 2, "no such file"]
    (entry,) = dataset.skipped
    assert entry.item == "/etc/hosts" and "on this machine" in entry.reason


@pytest.mark.parametrize("line", ["file:///etc/hosts.png", "../../../other-bucket/a.png"])
def test_remote_list_cannot_name_local_files_or_leave_its_bucket(memory: str, line: str) -> None:
    upload(f"{memory}/lists/list.txt", line.encode())
    with pytest.raises(PhotoError, match=r"on this machine|outside the list's bucket"):
        open_dataset(f"{memory}/lists/list.txt")


OUTSIDE = [
    "https://photos.example/a.png",  # another scheme
    "http://photos.example:8080/a.png",
    "http://photos.example@10.0.0.1/a.png",
    "http://169.254.169.254/latest/a.png",
    "s3://bucket/a.png",
    "memory://photos.example/a.png",
    "gs://photos.example/a.png",
]


@pytest.mark.parametrize("line", OUTSIDE)
def test_list_from_a_web_server_cannot_name_other_servers(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    content = f"a.png\n{line}\nhttp://PHOTOS.example/b.png\n".encode()
    monkeypatch.setattr(Storage, "read", lambda *_: content)
    monkeypatch.setattr(Storage, "filesystem", lambda *_: None)
    dataset = open_dataset("http://photos.example/list.txt")
    assert ids(dataset) == ["a.png", "http://PHOTOS.example/b.png"]
    (entry,) = dataset.skipped
    assert entry.item == line
    assert entry.reason.startswith("line 2: an address outside http://photos.example, the server of the list; ")


@pytest.mark.parametrize("line", OUTSIDE)
def test_local_list_may_name_any_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(Storage, "filesystem", lambda *_: None)
    assert ids(open_dataset(put(tmp_path / "list.txt", line.encode()))) == [line]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n# nothing\n\n", "found none"), (b"\xff\xfe\x00", "UTF-8"), (b"gone.png", "no such file")],
)
def test_list_without_images_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(PhotoError, match=rf"list\.txt.*{message}"):
        open_dataset(put(tmp_path / "list.txt", content))


# --- tar shards ---


def sample_members(first: int) -> dict[str, bytes]:
    """Two images with their sidecar files; one image is in a folder."""
    return {
        "b.png": picture(first),
        "b.cls": b"3",
        "b.json": b"{}",
        "./sub/a.jpg": picture(first + 1, "jpg"),
        "sub/._a.jpg": b"shadow",
    }


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    for number in range(3):
        put(folder / f"s-{number:02d}.tar", tar(sample_members(10 * number + 10)))
    put(folder / "s-00_stats.json", b"{}")
    return folder


SHARD_IDS = [f"s-{number:02d}.tar/{name}" for number in range(3) for name in ("b.png", "sub/a.jpg")]


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/s-{00..02}.tar", "/{s-00,s-01,s-02}.tar", "/s-{00,0[12]}.tar"])
def test_shards_give_the_same_data_set_with_any_pattern(shards: Path, pattern: str) -> None:
    dataset = open_dataset(f"{shards}{pattern}")
    assert ids(dataset) == SHARD_IDS
    assert values(dataset) == [10, 11, 20, 21, 30, 31]
    assert dataset.skipped == ()
    assert dataset.digest == open_dataset(shards).digest


def test_single_shard_has_the_same_ids_as_among_others(shards: Path) -> None:
    assert ids(open_dataset(shards / "s-01.tar")) == SHARD_IDS[2:4]


def test_shards_in_memory_are_read_like_those_on_disk(shards: Path, memory: str) -> None:
    fsspec.filesystem("memory").put(str(shards), "/dataset-test/copy", recursive=True)
    for pattern in ("", "/*.tar", "/s-{00..02}.tar"):
        dataset = open_dataset(f"{memory}/copy{pattern}")
        assert ids(dataset) == SHARD_IDS
        assert values(dataset) == [10, 11, 20, 21, 30, 31]


def test_members_are_read_without_the_rest_of_their_shard(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(shards)
    monkeypatch.setattr(tarfile, "open", None)  # the index is not built again
    content = (shards / "s-01.tar").read_bytes()
    item = dataset[2]
    assert item.url == str(shards / "s-01.tar") and item.start is not None and item.size is not None
    assert content[item.start : item.start + item.size] == picture(20)
    assert [seen(entry) for _, entry in dataset.stream([3, 0, 2])] == [21, 10, 20]


def test_shard_missing_from_a_range_is_reported(shards: Path) -> None:
    dataset = open_dataset(str(shards / "s-{00..03}.tar"))
    assert ids(dataset) == SHARD_IDS
    assert dataset.skipped == (Skipped("s-03.tar", "no such file"),)


def test_shards_in_subfolders_have_their_folder_in_the_id(shards: Path, tmp_path: Path) -> None:
    shutil.move(shards, tmp_path / "all/train")
    put(tmp_path / "all/val/s-00.tar", tar({"b.png": picture(99)}))
    expected = [*(f"train/{name}" for name in SHARD_IDS), "val/s-00.tar/b.png"]
    assert ids(open_dataset(tmp_path / "all")) == expected
    assert ids(open_dataset(f"{tmp_path}/all/{{train,val}}/*.tar")) == expected
    assert ids(open_dataset(f"{tmp_path}/all/**/*.tar")) == expected


def test_archive_next_to_images_is_skipped(tree: Path) -> None:
    put(tree / "all.tar", tar({"top.png": picture(3)}))
    dataset = open_dataset(tree)
    assert ids(dataset) == TREE_IDS
    (entry,) = dataset.skipped
    assert entry.item == "all.tar" and "next to images" in entry.reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"empty \(0 bytes\)"),
        (tar({}), "an empty tar archive"),
        (tar({"a.cls": b"1", "b.json": b""}), "no image files among its 2 members"),
        (b"these are only words " * 100, "not a tar archive"),
        (tar({"a.png": picture(1)}, mode="w:gz"), r"a compressed archive \(gzip\)"),
        (tar({"a.png": picture(1)}, mode="w:xz"), r"a compressed archive \(xz\)"),
    ],
    ids=["0-bytes", "no-members", "no-images", "words", "gzip", "xz"],
)
def test_shard_without_images_is_skipped_or_an_error_if_alone(
    shards: Path, tmp_path: Path, content: bytes, reason: str
) -> None:
    with pytest.raises(PhotoError, match=reason):
        open_dataset(put(tmp_path / "alone.tar", content))
    put(shards / "bad.tar", content)
    dataset = open_dataset(shards)
    assert ids(dataset) == SHARD_IDS
    (entry,) = dataset.skipped
    assert entry.item == "bad.tar"
    with pytest.raises(PhotoError, match=reason):
        raise PhotoError(entry.reason)


def test_compressed_shard_is_rejected_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match=r"a compressed archive .* decompress it to a plain \.tar first"):
        open_dataset(put(tmp_path / "a.tar.gz", tar({"a.png": picture(1)}, mode="w:gz")))


def test_truncated_shard_gives_its_complete_members_and_a_reason(tmp_path: Path) -> None:
    members = {f"{number}.png": picture(number) for number in range(3)}
    whole = tar(members)
    place = tmp_path / "cut.tar"
    ends = [item.start + item.size for item in open_dataset(put(place, whole)) if item.start and item.size]
    for length in range(600, ends[-1] + 512, 127):
        place.write_bytes(whole[:length])
        complete = sum(end <= length for end in ends)
        if not complete:
            with pytest.raises(PhotoError, match=r"cut off|damaged"):
                open_dataset(place)
            continue
        dataset = open_dataset(place)
        assert values(dataset) == list(range(complete))
        (entry,) = dataset.skipped
        assert entry.item == "cut.tar"
        assert f"{complete} images before it are used" in entry.reason


def test_damaged_member_header_is_reported_with_its_position(tmp_path: Path) -> None:
    content = bytearray(tar({f"{number}.png": picture(number) for number in range(3)}))
    content[1024:1034] = b"0123456789"  # in the header of 1.png
    dataset = open_dataset(put(tmp_path / "bad.tar", bytes(content)))
    assert ids(dataset) == ["bad.tar/0.png"]
    assert dataset.skipped == (Skipped("bad.tar", "damaged at byte 1,024; 1 images before it are used"),)


def test_links_and_paths_out_of_the_archive_are_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "secret.png", picture(66))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind, target in [
            ("soft.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")),
            ("hard.png", tarfile.LNKTYPE, "good.png"),
            ("pipe.png", tarfile.FIFOTYPE, ""),
        ]:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            archive.addfile(entry)
        for name in (str(tmp_path / "secret.png"), "../secret.png", "good.png"):
            entry = tarfile.TarInfo(name)
            entry.size = len(picture(5))
            archive.addfile(entry, io.BytesIO(picture(5)))
    place = put(tmp_path / "data/links.tar", buffer.getvalue())
    dataset = open_dataset(place)
    assert (ids(dataset), values(dataset)) == (["links.tar/good.png"], [5])
    reasons = [entry.reason.split(" ")[:2] for entry in dataset.skipped]
    assert reasons == [["a", "link"], ["a", "link"], ["not", "a"], ["a", "path"], ["a", "path"]]


def test_duplicate_member_name_is_reported(tmp_path: Path) -> None:
    dataset = open_dataset(put(tmp_path / "a.tar", tar({"x.png": picture(1), "./x.png": picture(2)})))
    assert (ids(dataset), values(dataset)) == (["a.tar/x.png"], [1])
    assert dataset.skipped == (Skipped("a.tar/x.png", "duplicate name; the first item is used"),)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_in_every_tar_format(tmp_path: Path, form: int) -> None:
    name = "/".join(["täglich" * 8] * 4) + ".png"
    dataset = open_dataset(put(tmp_path / "a.tar", tar({name: picture(4)}, format=form)))
    assert (ids(dataset), values(dataset)) == ([f"a.tar/{name}"], [4])


def test_shard_changed_after_opening_is_reported(shards: Path) -> None:
    dataset = open_dataset(shards)
    (shards / "s-00.tar").write_bytes(b"short")
    (_, entry), (_, other) = dataset.stream([0, 2])
    assert isinstance(entry, Skipped) and "the file has changed" in entry.reason
    assert seen(other) == 20


# --- braces ---


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("a-{8..10}", ["a-8", "a-9", "a-10"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("{a,{b,c}}", ["a", "b", "c"]),
        ("{a,a}", ["a"]),
        ("plain", ["plain"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, names: list[str]) -> None:
    assert sorted(expand_braces(pattern)) == sorted(names)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("s-{0-9}.tar", "found {0-9}"), ("s-{0..9.tar", "matching braces"), ("s-{0..99999999999}", "more than 1,000,000")],
)
def test_invalid_braces_are_rejected(pattern: str, message: str) -> None:
    with pytest.raises(PhotoError, match=message):
        expand_braces(pattern)


def test_pattern_that_matches_nothing_is_an_error(tmp_path: Path, memory: str) -> None:
    upload(f"{memory}/a.png", picture(1))
    for place in (str(tmp_path), memory):
        with pytest.raises(PhotoError, match="the pattern matches no files"):
            open_dataset(f"{place}/*.tar")


def test_items_are_sorted_by_id_not_by_member_or_brace_order(tree: Path, tmp_path: Path) -> None:
    assert ids(open_dataset(f"{tree}/{{n02,n01}}")) == TREE_IDS[:3]
    put(tmp_path / "a.tar", tar({"z.png": picture(1), "m.png": picture(2)}))
    put(tmp_path / "b.tar", tar({"a.png": picture(3)}))
    dataset = open_dataset(f"{tmp_path}/{{b,a}}.tar")
    assert ids(dataset) == ["a.tar/m.png", "a.tar/z.png", "b.tar/a.png"]
    assert values(dataset) == [2, 1, 3]


def test_pattern_of_images_and_folders(tree: Path) -> None:
    assert ids(open_dataset(f"{tree}/n0*")) == TREE_IDS[:3]
    assert ids(open_dataset(f"{tree}/*/*.png")) == TREE_IDS[1:3]


# --- addresses ---


@pytest.mark.parametrize("source", ["gs://bucket/photos", "gs://bucket/s-{0..3}.tar"])
def test_missing_library_is_an_error_that_names_the_extra(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "gs", "gcsfs")
    with pytest.raises(PhotoError, match=r"gs:// needs a library that is not installed: install the extra `gcs`"):
        open_dataset(source)


def test_missing_library_for_an_address_in_a_list_is_an_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "s3", "s3fs")
    with pytest.raises(PhotoError, match="install the extra `s3`"):
        open_dataset(put(tree / "list.txt", b"top.png\ns3://bucket/a.png\n"))


def without(monkeypatch: pytest.MonkeyPatch, scheme: str, library: str) -> None:
    """Simulates that the library of a scheme is not installed."""
    registry = importlib.import_module("fsspec.registry")  # the attribute fsspec.registry is the table in this module
    monkeypatch.delitem(registry._registry, scheme, raising=False)
    monkeypatch.setitem(sys.modules, library, None)


def test_unknown_scheme_is_an_error() -> None:
    with pytest.raises(PhotoError, match=r"an fsspec address .*, got nosuch://"):
        open_dataset("nosuch://bucket/photos")


@pytest.mark.parametrize("source", ["https://example.org/photos", "http://example.org/photos/", "https://a.org/*.tar"])
def test_folder_or_pattern_on_a_web_server_is_rejected(source: str) -> None:
    with pytest.raises(PhotoError, match=r"https?:// servers cannot list files; expected a text list"):
        open_dataset(source)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and byte ranges of them if ``ranges`` is set; prints nothing."""

    ranges = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        path = Path(self.translate_path(self.path))
        if not (self.ranges and wanted and path.is_file()):
            return super().do_GET()
        content = path.read_bytes()
        first, last = wanted.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


class Whole(Handler):
    """Always serves whole files, and ignores closed connections."""

    ranges = False

    def copyfile(self, source: Any, outputfile: Any) -> None:
        with contextlib.suppress(ConnectionError):
            super().copyfile(source, outputfile)


@pytest.fixture
def serve() -> Iterator[Callable[[Path, type[Handler]], str]]:
    servers = []

    def start(folder: Path, handler: type[Handler]) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_list_and_shards_on_a_web_server(shards: Path, serve: Callable[[Path, type[Handler]], str]) -> None:
    pytest.importorskip("aiohttp")
    put(shards / "photos/a.png", picture(1))
    put(shards / "list.txt", b"photos/a.png\nphotos/gone.png\n")
    address = serve(shards, Handler)
    listed = open_dataset(f"{address}/list.txt")
    assert [seen(entry) for _, entry in listed.stream(range(2))] == [1, "no such file"]
    dataset = open_dataset(f"{address}/s-{{00..03}}.tar")
    assert ids(dataset) == SHARD_IDS
    assert dataset.skipped == (Skipped("s-03.tar", "no such file"),)
    assert [seen(entry) for _, entry in dataset.stream(range(6))] == [10, 11, 20, 21, 30, 31]


@pytest.mark.parametrize("count", [1, 200])  # smaller and larger than one read
def test_shard_on_a_server_without_byte_ranges_is_rejected(
    tmp_path: Path, serve: Callable[[Path, type[Handler]], str], count: int
) -> None:
    pytest.importorskip("aiohttp")
    put(tmp_path / "a.tar", tar({f"{number}.png": picture(1) + bytes(50_000) for number in range(count)}))
    with pytest.raises(PhotoError, match=r"a\.tar: its server does not support byte ranges"):
        open_dataset(f"{serve(tmp_path, Whole)}/a.tar")


def test_whole_file_returned_for_a_byte_range_is_rejected(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(shards)
    whole = (shards / "s-00.tar").read_bytes()
    monkeypatch.setattr("denoising_vit.data.storage._read_local", lambda *_: whole)
    with pytest.raises(PhotoError, match=r"expected [0-9]+ bytes .* got 10,240; .* its server ignores byte ranges"):
        dataset.read(0)


def test_s3_bucket(tree: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        bucket = s3fs.S3FileSystem()
        bucket.mkdir("photos")
        bucket.put(str(tree), "photos/tree", recursive=True)
        bucket.put(str(shards), "photos/shards", recursive=True)
        folder = open_dataset("s3://photos/tree")
        assert folder.digest == open_dataset(tree).digest
        assert [seen(entry) for _, entry in folder.stream(range(4))] == [2, 1, 0, 3]
        for pattern in ("", "/*.tar", "/s-{00..02}.tar"):
            dataset = open_dataset(f"s3://photos/shards{pattern}")
            assert ids(dataset) == SHARD_IDS
        bucket.rm("photos/shards/s-01.tar")
        entries = [seen(entry) for _, entry in dataset.stream(range(6))]
        assert entries == [10, 11, "no such file", "no such file", 30, 31]
        with pytest.raises(PhotoError, match="no such file or folder"):
            open_dataset("s3://photos/nothing")
        with pytest.raises(PhotoError, match="no such file or folder"):
            open_dataset("s3://no-such-bucket/photos")
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()  # the next test has another server
