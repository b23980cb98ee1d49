"""Globs and braces: which names a pattern stands for."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from denoising_vit.data.storage import Storage, reason_of, scheme_of
from denoising_vit.errors import PhotoError

#: More names than this from one brace pattern are taken for a slip of the keyboard.
_MAX_NAMES = 1_000_000


def is_pattern(name: str) -> bool:
    """Whether a name has characters of a glob or of braces; a file may still be called so."""
    return glob.has_magic(name) or "{" in name


def folder_of_pattern(pattern: str) -> str:
    """What stands before the first part that varies."""
    fixed = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    return fixed[: fixed.rfind("/") + 1]


def matches(storage: Storage, pattern: str) -> list[tuple[str, bool]]:
    """What a glob (``**`` allowed) matches, sorted by address, and whether each is a folder.

    Raises:
        PhotoError: if the place cannot be searched.
    """
    if not scheme_of(pattern):
        found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207, may be absolute
        return [(match, Path(match).is_dir()) for match in found]
    try:
        filesystem = storage.filesystem(pattern)
        filesystem.invalidate_cache()
        found = filesystem.glob(pattern, detail=True)
    except PhotoError:
        raise
    except Exception as error:  # every service has its own kinds
        raise PhotoError(f"{pattern}: the place cannot be searched ({reason_of(error)})") from error
    scheme = scheme_of(pattern)
    return [(f"{scheme}://{name.lstrip('/')}", found[name]["type"] == "directory") for name in sorted(found)]


def expand_braces(pattern: str) -> list[str]:
    """``a-{08..10}`` as ``a-08``, ``a-09``, ``a-10``; ``{a,b}`` as ``a``, ``b``; several in one pattern as all pairs.

    Raises:
        PhotoError: if braces hold neither, or stand for more names than anyone means.
    """
    names = list(itertools.islice(_expanded(pattern, pattern), _MAX_NAMES + 1))
    if len(names) > _MAX_NAMES:
        raise PhotoError(f"{pattern}: the braces stand for more than {_MAX_NAMES:,} names")
    if any(brace in names[0] for brace in "{}"):
        raise PhotoError(f"{pattern}: expected every brace to have its partner, as in shards-{{0000..0009}}.tar")
    return list(dict.fromkeys(names))


def _expanded(name: str, pattern: str) -> Iterator[str]:
    """Replaces the first innermost braces, then those that are left."""
    opened = re.search(r"\{([^{}]*)\}", name)
    if not opened:
        yield name
        return
    for part in _alternatives(opened[1], pattern):
        yield from _expanded(name[: opened.start()] + part + name[opened.end() :], pattern)


def _alternatives(inside: str, pattern: str) -> Iterable[str]:
    if numbers := re.fullmatch(r"([0-9]+)\.\.([0-9]+)", inside):
        first, last = int(numbers[1]), int(numbers[2])
        padded = any(len(text) > 1 and text.startswith("0") for text in numbers.groups())
        if abs(last - first) >= _MAX_NAMES:
            raise PhotoError(f"{pattern}: {{{inside}}} stands for more than {_MAX_NAMES:,} names")
        width = max(map(len, numbers.groups())) if padded else 0
        return (f"{number:0{width}d}" for number in range(min(first, last), max(first, last) + 1))
    if "," in inside:
        return inside.split(",")
    raise PhotoError(f"{pattern}: expected braces like {{0000..0009}} or {{train,val}}, found {{{inside}}}")
