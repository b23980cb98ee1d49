"""Files: written whole or not at all, never over what is not ours; safetensors records; optional packages."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import re
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from denoising_vit.errors import DenoisingVitError, FormatError, OutputError

_UMASK_LOCK = threading.Lock()

#: What file systems without hard links answer.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}

#: Bytes of a file name that file systems allow, and those that the name of a temporary file adds.
_LONGEST, _ADDED = 255, 15

#: Bytes at either end of a file in which a mark is looked for; of safetensors, the most of a header that is read.
_END, _HEADER = 4096, 1 << 24

_MARK = re.compile(rb"denoising-vit (?P<kind>[a-z-]+) of (?P<source>[0-9a-f]{64})")


@contextlib.contextmanager
def atomic_path(target: Path, *, new: bool = False, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside ``target`` to write to; it becomes the target only if the block succeeds.

    Args:
        target: the file.
        new: never replace a file that is there by then, whoever wrote it.
        durable: have content and name reach the disk, in this order, so that a power cut leaves no empty file.

    Raises:
        FileExistsError: if ``new`` and there is something.
        OSError: if the folder cannot be written to.
    """
    name = clipped(target.name, _LONGEST - _ADDED)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~current_umask())  # temporary files are private; results follow the user's umask
        if durable:
            flush_file(temporary)
        if new:
            place_new(temporary, target)
        else:
            temporary.replace(target)
        if durable:
            flush_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def place_new(temporary: Path, target: Path) -> None:
    """Gives a whole file its name, which of several processes one can do: a name is taken by having a file.

    Raises:
        FileExistsError: if there is something of that name.
    """
    try:
        os.link(temporary, target)  # fails where there is something, unlike a rename
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    target.open("xb").close()  # FAT and some network drives; for a moment the file is there without its content
    temporary.replace(target)


@dataclass(frozen=True)
class Mark:
    """What a file says of itself so that it is known again as ours.

    Attributes:
        kind: of file, in lower-case letters and hyphens.
        source: SHA-256 of the input that it was made of; see :func:`digest_of`.
    """

    kind: str
    source: str

    def __str__(self) -> str:
        return f"denoising-vit {self.kind} of {self.source}"

    @classmethod
    def read(cls, path: Path) -> Mark | None:
        """The mark of a file; None where it has none, or cannot be read."""
        try:
            with path.open("rb") as file:
                start = file.read(_END)
                size = file.seek(0, os.SEEK_END)
                length = int.from_bytes(start[:8], "little")
                if start[8:9] == b"{" and length <= min(size, _HEADER):  # the header of safetensors
                    file.seek(8)
                    start = file.read(length)
                file.seek(max(0, size - _END))
                found = _MARK.search(start) or _MARK.search(file.read())
        except OSError:
            return None
        return None if found is None else cls(found["kind"].decode(), found["source"].decode())

    def add(self, path: Path, suffix: str) -> None:
        """Writes it into a picture or a page; files of other kinds hold it in their own record.

        Args:
            path: the file, whatever its name ends in.
            suffix: what kind of file it is: .png, .pdf, .svg, .html or .md.
        """
        text = str(self).encode()
        if suffix == ".png":
            content, chunk = path.read_bytes(), b"tEXtSource\0" + text
            chunk = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
            path.write_bytes(content[:-12] + chunk + content[-12:])  # before the end chunk
        elif suffix == ".pdf" or suffix in (".svg", ".html", ".htm", ".md"):
            with path.open("ab") as file:
                file.write(b"%% %b\n" % text if suffix == ".pdf" else b"\n<!-- %b -->\n" % text)


def digest_of(*inputs: object) -> str:
    """SHA-256 of what a file is made of: paths are taken as absolute, addresses and other values as they are."""
    told = [os.path.abspath(value) if isinstance(value, Path) else str(value) for value in inputs]  # noqa: PTH100
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def require_ours(
    target: Path, mark: Mark, inputs: Iterable[Path] = (), read: Callable[[Path], Mark | None] = Mark.read
) -> bool:
    """Whether writing replaces an earlier file of the same kind and input; False where there is nothing yet.

    Args:
        target: the file to be written.
        mark: it will have.
        inputs: files that are read.
        read: how the mark of a file is read.

    Raises:
        OutputError: if it is an input, or there is something that is not ours or was made from another input.
    """
    if not os.path.lexists(target):
        return False
    if any(path.exists() and target.exists() and path.samefile(target) for path in inputs):
        raise OutputError(f"{target} is an input and is never written to; name another file for the output")
    found = read(target)
    if found is None or found.kind != mark.kind:  # a file of an earlier release may be ours, and is not known
        told = "carries no mark of this command" if found is None else f"is a {found.kind}, not a {mark.kind}"
        raise OutputError(f"{target} exists and {told}; name another file, or move this one away")
    if found != mark:
        raise OutputError(
            f"{target} exists and was made from another input; name another file, or remove it to have it made anew"
        )
    return True


@contextlib.contextmanager
def owned_path(target: Path, mark: Mark, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """As :func:`atomic_path`, for a file that carries our mark, by the rule of :func:`require_ours`.

    Raises:
        OutputError: if the file is not ours to write.
        FileExistsError: if another process made one meanwhile.
        OSError: if it cannot be written.
    """
    replaces = require_ours(target, mark, inputs)
    with atomic_path(target, new=not replaces) as temporary:
        yield temporary
        mark.add(temporary, target.suffix.lower())


def plain_stem(name: str) -> str:
    """A file's name for the results of a photo or clip: valid UTF-8, with room for a number and an ending.

    Bytes that are not UTF-8 become ``_``: other programs and file formats take no such names.
    """
    valid = os.fsencode(name).decode("utf-8", "replace").replace("\ufffd", "_")
    return clipped(valid, _LONGEST - 35)


def readable(name: str) -> str:
    """A file name as text; bytes that are not UTF-8 are shown escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def clipped(name: str, most: int) -> str:
    """A name of at most so many bytes, its end cut off; no character is cut in two."""
    content = os.fsencode(name)
    return name if len(content) <= most else content[:most].decode("utf-8", "ignore")


def flush_file(path: Path) -> None:
    """Has a file's content reach the disk.

    Raises:
        OSError: if it does not.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Has the names in a folder reach the disk, where the platform knows how; a new file may be lost without."""
    with contextlib.suppress(OSError):  # Windows opens no folders, and some network drives flush none
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def current_umask() -> int:
    """The process's umask, which can only be read by changing it: for that moment to the strictest."""
    with _UMASK_LOCK:  # two threads at a time would leave the strictest behind
        current = os.umask(0o077)
        os.umask(current)
    return current


def unwritable(error: Exception) -> str:
    """Why a folder cannot be written, in words; a file where a folder is needed is said to be no directory."""
    if isinstance(error, FileExistsError):  # the system's words, "File exists", would not tell what is wrong
        return os.strerror(errno.ENOTDIR)
    return getattr(error, "strerror", None) or str(error)


T = TypeVar("T")

#: Under which the record stands in a file's metadata, as JSON.
KEY = "denoising_vit"

#: ``format`` in the record of a distilled model's weights.
DISTILLED = "denoising-vit/distilled"


def is_safetensors(path: Path) -> bool:
    """Whether a file is a safetensors file by its beginning, whatever its name: a length, then the head as JSON.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32


def read_record(path: Path) -> Any:
    """The record in a file's metadata; an empty one where the file has none.

    Raises:
        SafetensorError, OSError, JSONDecodeError: if the file is none, or damaged.
    """
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get(KEY, "{}"))


def require_version(path: Path, head: Mapping[str, Any], known: int) -> None:
    """Refuses a file whose record tells no version of its format, or that of a later release.

    Raises:
        FormatError: saying what is wrong, or what to do.
    """
    version = head.get("format_version")
    if version is None:
        raise FormatError(f"{path}: damaged, its metadata lacks format_version")
    if not isinstance(version, int):
        raise FormatError(f"{path}: damaged, expected a number as its format_version, got {version!r}")
    if version > known:
        raise FormatError(
            f"{path}: written in format version {version}, this release reads up to {known}; upgrade denoising-vit"
        )


def compact(values: Tensor) -> Tensor:
    """Values as they are stored: float16, unless they exceed its range, as features without a final norm can."""
    values = values.detach().cpu()
    fits = not values.numel() or float(values.abs().max()) < torch.finfo(torch.float16).max
    return (values.half() if fits else values.float()).contiguous()


def below(prefix: str, tensors: dict[str, T]) -> dict[str, T]:
    """Those whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def needed(package: str, extra: str, error: type[DenoisingVitError]) -> Any:
    """Imports a package of an extra.

    Raises:
        DenoisingVitError: of the type that is given, if it is not installed, naming the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as missing:
        raise error(
            f"this needs {package}: install the extra `{extra}` (pip install '.[{extra}]' in a clone of denoising-vit)"
        ) from missing
