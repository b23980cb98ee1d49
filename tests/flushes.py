"""What a power cut could lose: checks a recorded sequence of file-system calls.

A file that is renamed to its final name must be flushed before, and its folder after. Else a journal may hold the new
name without the content, and a later run takes an empty file for a result. New folders must be flushed into theirs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

#: A call as the shim logs it: its number, its name, a path, and the new path of a rename or link.
Call = Sequence[str]

#: Not durable: leases end with their holder; logs, their panels and the record of a run's start are for information.
_PASSING = re.compile(r"/(leases|\.held|panels)(/|$)|/(log\.jsonl|events\.out[^/]*)$|/\.(dvit-writable|probe)-")

#: Written by zarr, which flushes nothing; the store flushes it under its final name, before the manifest counts it.
_FLUSHED_LATER = re.compile(r"/zarr\.json$")

_TEMPORARY = re.compile(r"\.(part|partial|tmp[^/]*)(/|$)|/\.tmp[^/]*$")


def losses(calls: Sequence[Call]) -> list[str]:
    """What a power cut may lose or leave empty, as text; empty if every guarantee holds."""
    return [problem for at, call in enumerate(calls) for problem in _losses_of(calls, at, *call[1:4])]


def _losses_of(calls: Sequence[Call], at: int, name: str, path: str, other: str) -> list[str]:
    before, after = calls[:at], calls[at + 1 :]
    if name in ("rename", "link") and _promised(other):
        problems = []
        if not (_FLUSHED_LATER.search(other) or _content_flushed(before, path)):
            problems.append(f"{other} got its name before its content was flushed")
        if not _flushed(after, _parent(other)):
            problems.append(f"the folder of {other} was not flushed after it")
        return problems
    if name == "mkdir" and _promised(path) and not _flushed(after, _parent(path)):
        return [f"the folder of {path} was not flushed after it was made"]
    if name == "write" and _promised(path) and not _flushed(after, path):
        return [f"{path} was written and not flushed"]
    return []


def _promised(path: str) -> bool:
    return not (_PASSING.search(path) or _TEMPORARY.search(path))


def _content_flushed(calls: Sequence[Call], path: str) -> bool:
    """True if a file, or a folder with all that was written in it, was flushed after its last write.

    Libraries may write a file under a third name and rename it unseen, so a file must have been flushed by this name.
    """
    dirty = {path}
    for _, name, file, *more in calls:
        if file != path and not file.startswith(f"{path}/"):
            continue
        if name in ("rename", "link"):
            dirty = dirty - {file} | {more[0]}
        elif name == "write" and not _TEMPORARY.search(file.removeprefix(path)):
            dirty |= {path, file}
        elif name in ("fsync", "unlink"):
            dirty.discard(file)
    return not dirty


def _flushed(calls: Sequence[Call], path: str) -> bool:
    return any(call[1] == "fsync" and call[2].rstrip("/") == path for call in calls)


def _parent(path: str) -> str:
    return str(PurePosixPath(path).parent)
