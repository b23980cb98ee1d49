"""File helpers: atomic and durable writes, ownership marks, digests, safetensors files, optional packages."""

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
from typing import TYPE_CHECKING, Any, TypeVar

from denoising_vit.errors import DenoisingVitError, FormatError, OutputError

if TYPE_CHECKING:  # importing torch takes seconds, and most of these helpers do not need it
    from torch import Tensor

T = TypeVar("T")

#: Metadata key of this package's JSON record in a safetensors file.
KEY = "denoising_vit"

#: ``format`` in the record of a distilled model's weights.
DISTILLED = "denoising-vit/distilled"

#: Errors of file systems without hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}

#: Maximum length of a file name in bytes on common file systems, and bytes added by a temporary name.
_LONGEST, _ADDED = 255, 15

#: Number of bytes at each end of a file to search for a mark, and maximum size of a safetensors header to read.
_END, _HEADER = 4096, 1 << 24

_MARK = re.compile(rb"denoising-vit (?P<kind>[a-z-]+) of (?P<source>[0-9a-f]{64})")

_UMASK_LOCK = threading.Lock()


@contextlib.contextmanager
def atomic_path(target: Path, *, new: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to ``target``, which replaces it if the block succeeds.

    Args:
        target: the file.
        new: never replace an existing file.
        durable: flush the content before the rename and the folder after it, so that a power cut leaves no empty file
            under a final name, which later runs would treat as a result. False only for files that can be recomputed.

    Raises:
        FileExistsError: if ``new`` and the target exists.
        OSError: if the folder cannot be written to.
    """
    short = clipped(target.name, _LONGEST - _ADDED)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{short}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~current_umask())  # mkstemp creates private files, but results follow the umask
        if durable:
            flush_file(temporary)
        if new:
            place_new(temporary, target)
        else:
            temporary.replace(target)
        if durable:
            flush_folder(target.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, name, temporary):
            error.filename = str(target)  # the error has no file name, or only a temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)


def place_new(temporary: Path, target: Path) -> None:
    """Rename a complete file to its final name; of several processes, only one succeeds.

    Raises:
        FileExistsError: if the name is taken.
    """
    try:
        os.link(temporary, target)  # unlike a rename, fails if the target exists
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        target.open("xb").close()  # FAT and some network drives: the target is briefly empty
        temporary.replace(target)


def flush_file(path: Path) -> None:
    """Flush a file's content to disk (``fsync``)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Flush a folder's entries to disk if the platform supports it; otherwise a power cut may lose new files."""
    with contextlib.suppress(OSError):  # not supported by Windows and some network drives
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def flush_tree(folder: Path) -> None:
    """Flush all files and folders below a folder, and the folder itself, before it is renamed to its final name."""
    for path in folder.rglob("*"):
        (flush_folder if path.is_dir() else flush_file)(path)
    flush_folder(folder)


def make_folder(path: Path) -> None:
    """Create a folder with its parents, and flush them to disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush_folder(folder.parent)


def current_umask() -> int:
    """The process's umask. It can only be read by setting it, so it is briefly the strictest one."""
    with _UMASK_LOCK:  # two concurrent threads would leave the strictest umask
        current = os.umask(0o077)
        os.umask(current)
    return current


def unwritable(error: Exception) -> str:
    """Reason why a folder is not writable; a file in its place is reported as "not a directory"."""
    if isinstance(error, FileExistsError):  # the system's "File exists" would not explain the problem
        return os.strerror(errno.ENOTDIR)
    return getattr(error, "strerror", None) or str(error)


def first_line(error: BaseException) -> str:
    """First line of an error's message, for the message of another error."""
    return next(iter(str(error).strip().splitlines()), "no reason given")


def plain_stem(name: str) -> str:
    """A file stem for the results of a photo or clip: valid UTF-8, with room for a number and a suffix.

    Bytes that are not UTF-8 become ``_``, because other programs and file formats reject them.
    """
    valid = os.fsencode(name).decode("utf-8", "replace").replace("\ufffd", "_")
    return clipped(valid, _LONGEST - 35)


def readable(name: str) -> str:
    """A file name as text, with bytes that are not UTF-8 escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def clipped(name: str, most: int) -> str:
    """A name truncated to at most ``most`` bytes, never within a character."""
    content = os.fsencode(name)
    return name if len(content) <= most else content[:most].decode("utf-8", "ignore")


def digest(values: object, length: int = 64) -> str:
    """First hex digits of the SHA-256 of JSON values; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:length]


def digest_of(*inputs: object) -> str:
    """SHA-256 of the inputs of a file: paths made absolute, all other values as text."""
    return digest([os.path.abspath(value) if isinstance(value, Path) else str(value) for value in inputs])  # noqa: PTH100


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Mark:
    """Identification that this package writes into its files, to recognise them before replacing them."""

    kind: str  #: kind of file, in lower-case letters and hyphens
    source: str  #: SHA-256 of the inputs; see :func:`digest_of`

    def __str__(self) -> str:
        return f"denoising-vit {self.kind} of {self.source}"

    @classmethod
    def read(cls, path: Path) -> Mark | None:
        """The mark of a file; None without a mark, or if the file cannot be read."""
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
        """Append the mark to a .png, .pdf, .svg, .html or .md file of any name; others keep it in their own record."""
        text = str(self).encode()
        if suffix == ".png":
            content, chunk = path.read_bytes(), b"tEXtSource\0" + text
            chunk = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
            path.write_bytes(content[:-12] + chunk + content[-12:])  # before the end chunk
        elif suffix in (".pdf", ".svg", ".html", ".htm", ".md"):
            with path.open("ab") as file:
                file.write(b"%% %b\n" % text if suffix == ".pdf" else b"\n<!-- %b -->\n" % text)


def require_ours(
    target: Path, mark: Mark, inputs: Iterable[Path] = (), read: Callable[[Path], Mark | None] = Mark.read
) -> bool:
    """Check that a file may be written: it is new (False), or replaces a file of the same kind and inputs (True).

    Args:
        target: the file to write.
        mark: mark of the new file.
        inputs: files that the command reads.
        read: reads the mark of a file.

    Raises:
        OutputError: if the target is an input, has no such mark, or was made from other inputs.
    """
    if not os.path.lexists(target):
        return False
    if any(path.exists() and target.exists() and path.samefile(target) for path in inputs):
        raise OutputError(f"{target} is an input file; choose another file for the output")
    found = read(target)
    if found is None or found.kind != mark.kind:  # files written by releases without marks cannot be recognised
        reason = "was not written by this command" if found is None else f"is a {found.kind}, not a {mark.kind}"
        raise OutputError(f"{target} exists and {reason}; choose another file, or move this one away")
    if found != mark:
        raise OutputError(
            f"{target} exists and was made from another input; choose another file, or delete it to regenerate it"
        )
    return True


@contextlib.contextmanager
def owned_path(target: Path, mark: Mark, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Like :func:`atomic_path`, for a marked file that :func:`require_ours` allows to write.

    Raises:
        OutputError: if the file must not be replaced.
        FileExistsError: if another process created it in the meantime.
        OSError: if it cannot be written.
    """
    replaces = require_ours(target, mark, inputs)
    with atomic_path(target, new=not replaces) as temporary:
        yield temporary
        mark.add(temporary, target.suffix.lower())


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: dict[str, str] | None = None,
    *,
    new: bool = False,
    durable: bool = True,
) -> None:
    """Write a safetensors file with :func:`atomic_path`, with permissions from the umask.

    Raises:
        OSError: if it cannot be written, for example on a full disk, which safetensors reports with its own error.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path, new=new, durable=durable) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from error


def is_safetensors(path: Path) -> bool:
    """True if a file starts like a safetensors file: a length, then a JSON header. The name does not matter."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32


def read_record(path: Path) -> Any:
    """The package's record in the metadata of a safetensors file; empty if there is none.

    Raises:
        SafetensorError, OSError, JSONDecodeError: if the file is damaged or of another type.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return _record_in(file)


def _record_in(file: Any) -> Any:
    return parse_json((file.metadata() or {}).get(KEY, "{}"))


@contextlib.contextmanager
def open_own(
    path: Path, kind: str, version: int, what: str, required: Iterable[str] = ()
) -> Iterator[tuple[dict[str, Any], Any]]:
    """The package's record in a safetensors file, and the file from `safe_open`.

    Args:
        path: the file.
        kind: ``format`` in the record.
        version: newest format version that this release can read.
        what: content of the file, for errors, such as "an artifact".
        required: keys of the record.

    Raises:
        FormatError: if the file is missing, damaged, of another type, or from a newer version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            head = _record_in(file)
            if not isinstance(head, dict) or head.get("format") != kind:
                raise FormatError(f"{path}: expected a safetensors file with {what} (no {kind!r} metadata)")
            require_version(path, head, version)
            if lacking := [key for key in required if key not in head]:
                raise FormatError(f"{path}: damaged: {', '.join(lacking)} missing in its metadata")
            yield head, file
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: not {what}, or damaged: expected a safetensors file ({error})") from error


def parse_json(text: str | bytes) -> Any:
    """Parse the JSON of a file that may be damaged.

    Raises:
        JSONDecodeError: also if the text is not UTF-8, is nested too deeply, or has a number with thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(str(error), "", 0) from error


def require_version(path: Path, head: Mapping[str, Any], known: int) -> None:
    """Check the format version in the record of a file.

    Raises:
        FormatError: if it is missing, not a number, or newer than ``known``.
    """
    version = head.get("format_version")
    if version is None:
        raise FormatError(f"{path}: damaged: format_version missing in its metadata")
    if not isinstance(version, int):
        raise FormatError(f"{path}: damaged: expected a number as format_version, got {version!r}")
    if version > known:
        raise FormatError(f"{path}: expected format version {known} or lower, got {version}; upgrade denoising-vit")


def compact(values: Tensor) -> Tensor:
    """Values in storage precision: float16, or float32 if they exceed its range, as they can without a final norm."""
    import torch

    values = values.detach().cpu()
    fits = not values.numel() or float(values.abs().max()) < torch.finfo(torch.float16).max
    return (values.half() if fits else values.float()).contiguous()


def below(prefix: str, tensors: dict[str, T]) -> dict[str, T]:
    """The entries with a prefix, keyed by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def extra_hint(extra: str) -> str:
    """How to install an optional extra, for messages: "install " and this."""
    return f"the extra `{extra}` (pip install '.[{extra}]' in a clone of denoising-vit)"


def needed(package: str, extra: str, error: type[DenoisingVitError]) -> Any:
    """Import a package of an optional extra.

    Raises:
        DenoisingVitError: of type ``error``, naming the extra, if the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as missing:
        raise error(f"this needs {package}: install {extra_hint(extra)}") from missing
