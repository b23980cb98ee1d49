"""Making a store, and making sure that something is one."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator

from denoising_vit.errors import StoreError
from denoising_vit.store import layout
from denoising_vit.store.fields import FieldArray
from denoising_vit.store.manifest import Manifest, digest_ids
from denoising_vit.store.objects import Objects

#: What a creation that was killed, or lost its power, may have left: the manifest comes last, and may be empty.
_LEFT_BY_CREATION = {layout.IDS, layout.FIELD, layout.MANIFEST}

_EMPTY_MANIFEST = (
    f"{{}}: {layout.MANIFEST} is empty, as a power cut leaves it. Without it nothing is known of what was fitted; the "
    "same `dvit fit` makes the store anew where nothing is finished, else fit to a new place"
)


def create_objects(objects: Objects, manifest: Manifest, ids: list[str]) -> None:
    """Writes ids, array and manifest of an empty store.

    Raises:
        StoreError: if the place is taken or read-only, or the ids cannot be used.
    """
    _require_usable(ids)
    with _reaching(objects):
        there = set(objects.names())
    if layout.MANIFEST in there and objects.read(layout.MANIFEST):
        raise StoreError(f"{objects.url}: there is a feature store already; open it, or choose another place")
    if not there <= _LEFT_BY_CREATION:
        if layout.MANIFEST in there:
            raise StoreError(_EMPTY_MANIFEST.format(objects.url))
        raise StoreError(
            f"{objects.url}: expected an empty or new folder for a feature store, found {', '.join(sorted(there)[:3])}"
        )
    _require_leftovers(objects, there, ids)
    objects.probe()
    objects.write(layout.IDS, json.dumps(ids).encode())
    FieldArray.create(objects, manifest)
    if layout.MANIFEST in there:
        objects.delete(layout.MANIFEST)
    if not objects.create(layout.MANIFEST, manifest.to_json().encode()):
        raise StoreError(f"{objects.url}: another process has just made a feature store here; open it")


def _require_leftovers(objects: Objects, there: set[str], ids: list[str]) -> None:
    """Refuses files that have the names of a store's and were not left by making one of the same images.

    Raises:
        StoreError: naming them.
    """
    foreign = sorted(set(objects.names(layout.FIELD)) - {"zarr.json"}) if layout.FIELD in there else []
    if foreign:
        raise StoreError(
            f"{objects.url}: expected an empty or new folder for a feature store; its folder {layout.FIELD} holds "
            f"{', '.join(foreign[:3])}. Choose another place"
        )
    if layout.IDS in there and objects.read(layout.IDS) not in (json.dumps(ids).encode(), b""):
        raise StoreError(
            f"{objects.url}: {layout.IDS} lists other images than those to be fitted; choose another place, or remove "
            "it if it was left by a run that was stopped"
        )


def is_store(objects: Objects) -> bool:
    """Whether there is a manifest with any content.

    Raises:
        StoreError: if the place cannot be reached.
    """
    with _reaching(objects):
        return layout.MANIFEST in objects.names() and bool(objects.read(layout.MANIFEST))


def read_manifest(objects: Objects) -> Manifest:
    """The manifest of a store.

    Raises:
        StoreError: if there is no store, or none that this release reads.
    """
    with _reaching(objects):
        try:
            content = objects.read(layout.MANIFEST)
        except FileNotFoundError as error:
            raise StoreError(f"{objects.url}: {_what_instead(objects)}; `dvit fit DATA -o STORE` makes one") from error
    if not content:
        raise StoreError(_EMPTY_MANIFEST.format(objects.url))
    return Manifest.from_json(content, objects.url)


def read_ids(objects: Objects, manifest: Manifest) -> list[str]:
    """Ids of all images in order.

    Raises:
        StoreError: if they are not those that the store was made with.
    """
    try:
        ids = json.loads(objects.read(layout.IDS))
    except (FileNotFoundError, ValueError) as error:
        raise StoreError(f"{objects.url}: {layout.IDS} is missing or damaged ({error})") from error
    if not isinstance(ids, list) or digest_ids(ids) != manifest.ids_digest:
        raise StoreError(
            f"{objects.url}: {layout.IDS} was changed: its digest is not {manifest.ids_digest[:8]}, as in the manifest"
        )
    return ids


@contextlib.contextmanager
def _reaching(objects: Objects) -> Iterator[None]:
    """The first request to a place: every library reports a lacking network or credentials in its own way."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"{objects.url}: cannot be reached ({type(error).__name__}: {error})") from error


def _what_instead(objects: Objects) -> str:
    there = objects.names()
    if not there:
        return "no feature store here, nothing at all"
    return f"not a feature store: it has no {layout.MANIFEST}, but {', '.join(there[:3])}"


def _require_usable(ids: list[str]) -> None:
    if not ids:
        raise StoreError("a feature store needs at least one image, got no ids")
    for name in ids:
        if not isinstance(name, str) or not name:
            raise StoreError(f"ids must be texts that are not empty, got {name!r}")
    name, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise StoreError(f"ids must differ from each other, {name!r} comes {count} times")
