"""atomic_path: a file exists completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from denoising_vit import files
from denoising_vit.files import atomic_path


@pytest.fixture
def umask() -> Iterator[None]:
    """Restore the process's umask after the test."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_target_appears_when_the_block_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "result.bin"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [target]


def test_temporary_file_is_hidden_beside_the_target(tmp_path: Path) -> None:
    """A file on another file system cannot replace the target atomically, and globs for results must not find it."""
    with atomic_path(tmp_path / "result.safetensors") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")
        assert not temporary.match("*.safetensors")


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_exception_leaves_neither_temporary_file_nor_target(tmp_path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind), atomic_path(tmp_path / "result.bin") as temporary:
        temporary.write_bytes(b"ha")
        raise kind
    assert list(tmp_path.iterdir()) == []


def test_existing_target_survives_an_exception(tmp_path: Path) -> None:
    target = tmp_path / "result.bin"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"), atomic_path(target) as temporary:
        temporary.write_bytes(b"ne")
        raise RuntimeError("half way")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_existing_target_is_replaced_on_success(tmp_path: Path) -> None:
    target = tmp_path / "result.bin"
    target.write_bytes(b"old and longer")
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"


def test_writer_may_replace_the_temporary_file(tmp_path: Path) -> None:
    """Some libraries write elsewhere and rename."""
    target = tmp_path / "result.bin"
    with atomic_path(target) as temporary:
        other = tmp_path / "other"
        other.write_bytes(b"renamed")
        other.replace(temporary)
    assert target.read_bytes() == b"renamed"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: None, mask: int, mode: int) -> None:
    os.umask(mask)
    target = tmp_path / "result.bin"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"x")
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert os.umask(mask) == mask  # reading the umask did not change it


def test_path_below_a_regular_file_raises_oserror(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with pytest.raises(OSError), atomic_path(blocker / "result.bin"):
        pytest.fail("the block must not be entered")
    assert blocker.read_text() == "not a folder"


def test_missing_folder_raises_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "nowhere" / "result.bin"):
        pytest.fail("the block must not be entered")


def test_target_that_is_a_folder_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError), atomic_path(target) as temporary:
        temporary.write_bytes(b"x")
    assert list(tmp_path.iterdir()) == [target]
    assert target.is_dir()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_file_is_flushed_before_the_rename_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut may leave an empty file that later runs mistake for a result."""
    target, synced = tmp_path / "result.bin", []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append((Path(f"/proc/self/fd/{file}").readlink(), target.exists()))
    )
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"whole")
    assert synced == [(temporary, False), (tmp_path, True)]


def test_parents_of_a_new_folder_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "flush_folder", synced.append)
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert set(synced) == {tmp_path, tmp_path / "a"} and len(synced) == 2


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, b"\xff", "{"])
def test_unreadable_json_raises_json_decode_error(text: str | bytes) -> None:
    with pytest.raises(json.JSONDecodeError):
        files.parse_json(text)


def test_write_errors_name_the_file(tmp_path: Path) -> None:
    """Also if the target of a writer is itself the temporary file of another writer."""
    target = tmp_path / "result.bin"
    full = pytest.raises(OSError, match=r"No space left on device: '.*/result\.bin'")
    with full, atomic_path(target) as temporary, atomic_path(temporary):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match=r": '.*/result\.bin'"), atomic_path(target) as temporary:
        temporary.unlink()
        temporary.open("rb")
