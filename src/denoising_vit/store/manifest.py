"""Settings and ids of a store, and their differences from those of another run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from denoising_vit.backbones.recorded import SAME, Fingerprint, same_weights
from denoising_vit.errors import StoreError
from denoising_vit.files import digest, parse_json
from denoising_vit.store import layout
from denoising_vit.store.layout import checked, packed
from denoising_vit.store.objects import Objects

FORMAT = "denoising-vit/store"
FORMAT_VERSION = 2

DType = Literal["float16", "float32", "int8"]

#: Entries of a backbone's record that determine its features, besides its weights.
_OF_BACKBONE = ("name", "layer", "norm", "dtype")

EMPTY_MANIFEST = (
    f"{{}}: {layout.MANIFEST} is empty, possibly because of a power cut. If no shard is finished, the same `dvit "
    "fit` recreates the store; otherwise fit into a new folder"
)


@dataclass(frozen=True)
class Manifest:
    """Settings of a store. Readers and later runs first compare them with their own.

    Attributes:
        backbone: record of the backbone: name, weights, fingerprint values, layer, norm, dtype.
        plan: digest of the views.
        options: other settings that determine the result, as JSON values.
        size: (H, W) in pixels of the backbone's input.
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels.
        grid: (h, w) of patches.
        field: (Ry, Rx) nodes of the stored semantic field.
        channels: C.
        dtype: precision of the stored field. float16 holds magnitudes up to 65,504 with a relative error of 2^-11; int8
            has one scale per channel and image, and keeps the cosine of every patch above 0.999.
        images_per_shard: number of images per shard object, once sealed.
        count: number of images, N; set by :meth:`FeatureStore.create`.
        ids_digest: digest of all ids in order; set by :meth:`FeatureStore.create`. If empty, any ids match.
    """

    backbone: dict[str, Any]
    plan: str
    size: tuple[int, int]
    patch_size: int
    stride: int
    grid: tuple[int, int]
    field: tuple[int, int]
    channels: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: DType = "float16"
    images_per_shard: int = 16
    count: int = 0
    ids_digest: str = ""

    def __post_init__(self) -> None:
        """Validate, and normalize values to JSON types, so that manifests compare equal after loading."""
        for name in ("backbone", "options"):
            try:
                plain = json.loads(json.dumps(getattr(self, name), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise StoreError(f"{name} of a store must consist of JSON values ({error})") from error
            object.__setattr__(self, name, plain)
        for name in ("size", "grid", "field"):
            first, second = getattr(self, name)
            object.__setattr__(self, name, (int(first), int(second)))
        counts = {"channels": self.channels, "images_per_shard": self.images_per_shard, "patch_size": self.patch_size}
        counts |= {"stride": self.stride, "nodes of the field": min(self.field)}
        for name, value in counts.items():
            if value < 1:
                raise StoreError(f"{name} must be at least 1, got {value}")
        if self.dtype not in get_args(DType):
            raise StoreError(f"dtype must be {' or '.join(map(repr, get_args(DType)))}, got {self.dtype!r}")

    @property
    def shards(self) -> int:
        """Number of shards; the last may be smaller."""
        return -(-self.count // self.images_per_shard)

    @property
    def image_bytes(self) -> int:
        """Size of one image's field in bytes, including its scale."""
        size = self.field[0] * self.field[1] * self.channels
        return {"float16": 2 * size, "float32": 4 * size, "int8": size + 4 * self.channels}[self.dtype]

    def images_of(self, shard: int) -> range:
        """Indices of the images in a shard."""
        start = shard * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.count))

    def shard_of(self, index: int) -> int:
        """The shard of an image."""
        return index // self.images_per_shard

    def with_ids(self, ids: Sequence[str]) -> Manifest:
        """The same settings for these images."""
        return replace(self, count=len(ids), ids_digest=digest(list(ids)))

    def mismatch(self, other: Manifest) -> list[str]:
        """Differences between this store and another run, with both values; empty if the run may continue the store.

        Weights are compared by fingerprint, because the same weights may come from different sources.
        """
        found = _compare("backbone ", *({key: m.backbone.get(key) for key in _OF_BACKBONE} for m in (self, other)))
        found += _compare_weights(self.backbone, other.backbone)
        found += _compare("", {"plan": self.plan[:8]}, {"plan": other.plan[:8]})
        for name in ("size", "patch_size", "stride", "grid", "field", "channels", "dtype", "images_per_shard"):
            found += _compare("", {name: getattr(self, name)}, {name: getattr(other, name)})
        found += _compare("option ", self.options, other.options)
        if other.ids_digest and self.ids_digest != other.ids_digest:
            found.append(
                f"images: the store has {self.count} (ids {self.ids_digest[:8]}), "
                f"this run has {other.count} (ids {other.ids_digest[:8]})"
            )
        return found

    def to_json(self) -> str:
        """Content of ``manifest.json``; equal manifests have equal text."""
        version = FORMAT_VERSION if self.dtype == "int8" else 1  # earlier releases read everything except int8
        content = {"format": FORMAT, "version": version, **asdict(self)}
        return json.dumps(packed(content), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Parse the text of :meth:`to_json`; ``where`` is used in messages.

        Raises:
            StoreError: if it is of another type, damaged, or from a newer version.
        """
        try:
            content = parse_json(text)
        except ValueError as error:
            raise StoreError(f"{where}: damaged manifest ({error}); expected JSON") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StoreError(f"{where}: not a feature store; its manifest lacks the format {FORMAT!r}")
        version = content.get("version")
        if not isinstance(version, int) or version < 1:
            raise StoreError(f"{where}: damaged manifest: expected a positive version number, got {version!r}")
        if version > FORMAT_VERSION:
            raise StoreError(
                f"{where}: expected a store of version {FORMAT_VERSION} or lower, got {version}; upgrade denoising-vit"
            )
        names = {item.name for item in fields(cls)}
        if lacking := sorted(names - content.keys()):
            raise StoreError(f"{where}: damaged manifest: {', '.join(lacking)} missing")
        try:
            content = checked(content)
            _require_types(content)
            return cls(**{name: content[name] for name in names})
        except (TypeError, ValueError) as error:
            raise StoreError(f"{where}: damaged manifest ({error})") from error


def _require_types(content: dict[str, Any]) -> None:
    """Raise ValueError for a value of a wrong type; fields not named here are counts, or pairs of counts."""
    kinds = {"backbone": dict, "options": dict, "plan": str, "dtype": str, "ids_digest": str}
    for name in (item.name for item in fields(Manifest)):
        value = content[name]
        if name in kinds:
            right = isinstance(value, kinds[name])
        else:
            pair = name in ("size", "grid", "field") and isinstance(value, list) and len(value) == 2
            right = all(type(count) is int and 0 <= count < 1 << 53 for count in (value if pair else [value]))
        if not right:
            raise ValueError(f"unexpected value for {name}: {str(value)[:60]}")


def read_manifest(objects: Objects) -> Manifest:
    """The manifest of a store.

    Raises:
        StoreError: if there is no store, or this release cannot read it.
    """
    with reaching(objects):
        try:
            content = objects.read(layout.MANIFEST)
        except FileNotFoundError as error:
            names = ", ".join(objects.names()[:3])
            found = f"not a feature store: no {layout.MANIFEST}, found {names}" if names else ""
            raise StoreError(
                f"{objects.url}: {found or 'no feature store found'}; `dvit fit DATA -o STORE` creates one"
            ) from error
    if not content:
        raise StoreError(EMPTY_MANIFEST.format(objects.url))
    return Manifest.from_json(content, objects.url)


def read_ids(objects: Objects, manifest: Manifest) -> list[str]:
    """Ids of all images in order.

    Raises:
        StoreError: if they are missing, or were changed since the store was created.
    """
    try:
        ids = parse_json(objects.read(layout.IDS))
    except (FileNotFoundError, ValueError) as error:
        raise StoreError(f"{objects.url}: {layout.IDS} is missing or damaged ({error})") from error
    if not isinstance(ids, list) or len(ids) != manifest.count or digest(ids) != manifest.ids_digest:
        raise StoreError(
            f"{objects.url}: {layout.IDS} was changed: expected digest {manifest.ids_digest[:8]}, as in the manifest"
        )
    return ids


@contextlib.contextmanager
def reaching(objects: Objects) -> Iterator[None]:
    """Convert errors of the first request to a location to StoreError, because every library has its own exceptions."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"{objects.url}: cannot be reached ({type(error).__name__}: {error})") from error


def _compare(kind: str, mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [
        f"{kind}{name}: the store has {_show(mine.get(name))}, this run has {_show(theirs.get(name))}"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]


def _compare_weights(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    if same_weights(mine, theirs):
        return []
    here, there = (Fingerprint(tuple(backbone.get("fingerprint") or ())) for backbone in (mine, theirs))
    if here.matches(there):
        digests = [str(backbone.get("digest"))[:8] for backbone in (mine, theirs)]
        likeness = f"similar, but not equal: digests {digests[0]} and {digests[1]}"
    elif len(here.values) == len(there.values):
        likeness = f"their cosine is {here.cosine(there):.3f}, expected above {SAME}"
    else:
        likeness = "different lengths"
    return [
        f"weights: the store has {_show(mine.get('weights'))} (fingerprint {_short(here)}), "
        f"this run has {_show(theirs.get('weights'))} (fingerprint {_short(there)}); {likeness}"
    ]


def _short(fingerprint: Fingerprint) -> str:
    return fingerprint.short if fingerprint.values else "none"


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return "none" if value is None else str(value)
