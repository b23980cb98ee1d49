"""Text lists: one path or address of an image a line."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path
from urllib.parse import urlsplit

from denoising_vit.data.items import Item, Skipped
from denoising_vit.data.shards import is_shard
from denoising_vit.data.storage import Storage, local_or_remote, path_of, reason_of, scheme_of
from denoising_vit.errors import PhotoError


def read_list(storage: Storage, address: str) -> tuple[list[Item], list[Skipped]]:
    """The images of a list, in its order; blank lines and lines that begin with ``#`` mean nothing.

    Whether a local image is there is looked up now; a remote one that is missing is found out when it is read, because
    asking takes a request a line.

    Raises:
        PhotoError: if the list cannot be read, or if the library for an address in it is not installed.
    """
    try:
        text = storage.read(address).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PhotoError(f"{address}: expected a list of images as UTF-8 text, found other bytes ({error})") from error
    except Exception as error:  # every service has its own kinds
        raise PhotoError(f"{address}: the list cannot be read ({reason_of(error)})") from error
    items = []
    skipped = []
    first: dict[str, int] = {}  # in which line a place was named first
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip(" \t\r")
        if not line or line.startswith("#"):
            continue
        try:
            place = _place_of(line, address)
            before = first.setdefault(os.path.normpath(place) if not scheme_of(place) else place, number)
            if before != number:
                raise ValueError(f"a duplicate of line {before}")
            _check(storage, place)
        except ValueError as error:
            skipped.append(Skipped(line, f"line {number}: {error}"))
        else:
            items.append(Item(line, place))
    return items, skipped


def _place_of(line: str, address: str) -> str:
    """Where a line of the list at ``address`` leads.

    Raises:
        ValueError: if a list that came from elsewhere leads to this machine's files, or to another server than its own.
    """
    place = local_or_remote(line)
    if not scheme_of(address):
        return place if scheme_of(place) else str(Path(address).parent / place)  # an absolute path stays as it is
    if scheme_of(place):
        theirs, own = (_server(name) for name in (place, address))
        if theirs != own:
            raise ValueError(
                f"an address outside {own[0]}://{own[1]}, where the list is; download the list and give that file if "
                "what it names is to be fetched"
            )
        return place
    if place != line or place.startswith("/"):
        raise ValueError(f"a path on this machine in a list at {scheme_of(address)}://; expected a full address")
    scheme, _, path = path_of(address).partition("://")
    joined = posixpath.join(posixpath.dirname(path), place)
    if any(part in (".", "..") for part in place.split("/")):
        joined = posixpath.normpath(joined)
    if joined.split("/")[0] != path.split("/")[0]:
        raise ValueError("a path that leads out of the bucket or server of the list")
    return f"{scheme}://{joined}"


def _server(address: str) -> tuple[str, str]:
    """Scheme and host, or bucket, of an address."""
    parts = urlsplit(address)
    return parts.scheme, parts.netloc.lower()


def _check(storage: Storage, place: str) -> None:
    """Raises ValueError for what is no image file, as far as can be told without a request."""
    if is_shard(place):
        raise ValueError("a tar shard; give shards as the data set: a file, a folder or a pattern, not a list")
    if scheme_of(place):
        storage.filesystem(place)  # a missing library is one error now, not one a photo later
        return
    try:
        kind = storage.kind(place)
    except PhotoError as error:
        raise ValueError(reason_of(error)) from error
    if kind != "file":
        raise ValueError("a folder; a list names image files" if kind else "no such file")
