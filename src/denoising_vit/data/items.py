"""One image of a data set, and one thing that was to be an image and is none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skipped:
    """Something that was asked for and could not be used.

    Attributes:
        item: what was asked for.
        reason: why it was skipped, for people.
        unreachable: whether where it lies did not answer, so that it may be there another time.
    """

    item: str
    reason: str
    unreachable: bool = False


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a data set, not yet read.

    Attributes:
        id: unique within the data set and the same on every machine: the path below the source with ``/`` between its
            parts, ``<shard>/<member>`` in tar shards, the line as written in a text list.
        url: the file, or the tar shard: an absolute path or an fsspec address.
        start: in a shard, where the member's bytes begin.
        size: in a shard, how many bytes the member has.
    """

    id: str
    url: str
    start: int | None = None
    size: int | None = None
