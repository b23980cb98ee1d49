"""What a store was made with, and how two of them differ."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from denoising_vit.backbones.fingerprint import SAME, Fingerprint
from denoising_vit.backbones.recorded import same_weights
from denoising_vit.errors import StoreError
from denoising_vit.store.packing import checked, packed

FORMAT = "denoising-vit/store"
FORMAT_VERSION = 1

DType = Literal["float16", "float32"]

#: What of a backbone decides its features, besides its fingerprint; where its weights came from and its device do not.
_OF_BACKBONE = ("name", "layer", "norm", "dtype")


@dataclass(frozen=True)
class Manifest:
    """What a store holds and what decides it. A reader or a second run compares it before anything else.

    Attributes:
        backbone: as recorded with every decomposition: name, weights, fingerprint values, layer, norm, dtype.
        plan: digest of the views.
        options: what else decides the result, as JSON values.
        size: (H, W) in pixels at which images were shown to the backbone.
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels.
        grid: (h, w) of patches.
        field: (Ry, Rx) nodes stored of the semantic field.
        channels: C.
        dtype: how the field is stored; float16 holds magnitudes to 65,504 with a relative error of 2^-11.
        images_per_shard: images in one object once their shard is sealed.
        count: images in the store, N; :meth:`FeatureStore.create` sets it.
        ids_digest: of all ids in order; :meth:`FeatureStore.create` sets it. Empty in an expectation: any ids will do.
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
        """Brings values to what they are after a way through JSON, so that equal means equal."""
        for name in ("backbone", "options"):
            try:
                plain = json.loads(json.dumps(getattr(self, name), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise StoreError(f"{name} of a store must be JSON values ({error})") from error
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
        """How many shards the images fill; the last may be smaller."""
        return -(-self.count // self.images_per_shard)

    @property
    def image_bytes(self) -> int:
        """Bytes of one image's field."""
        return self.field[0] * self.field[1] * self.channels * (2 if self.dtype == "float16" else 4)

    def images_of(self, shard: int) -> range:
        """Indices of the images in a shard."""
        start = shard * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.count))

    def shard_of(self, index: int) -> int:
        """The shard that an image is in."""
        return index // self.images_per_shard

    def with_ids(self, ids: Sequence[str]) -> Manifest:
        """The same for these images."""
        return replace(self, count=len(ids), ids_digest=digest_ids(ids))

    def mismatch(self, other: Manifest) -> list[str]:
        """Each thing in which another run differs from this store, with both sides; empty if it may be continued.

        Backbones are compared by fingerprint, because the same weights come from different places.
        """
        return list(self._differences(other))

    def _differences(self, other: Manifest) -> Iterator[str]:
        yield from _compare("backbone ", *({key: m.backbone.get(key) for key in _OF_BACKBONE} for m in (self, other)))
        yield from _compare_weights(self.backbone, other.backbone)
        yield from _compare("", {"plan": self.plan[:8]}, {"plan": other.plan[:8]})
        for name in ("size", "patch_size", "stride", "grid", "field", "channels", "dtype", "images_per_shard"):
            yield from _compare("", {name: getattr(self, name)}, {name: getattr(other, name)})
        yield from _compare("option ", self.options, other.options)
        if other.ids_digest and self.ids_digest != other.ids_digest:
            yield (
                f"images: the store has {self.count} (ids {self.ids_digest[:8]}), "
                f"this run has {other.count} (ids {other.ids_digest[:8]})"
            )

    def to_json(self) -> str:
        """For ``manifest.json``; the same manifest gives the same text."""
        content = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(packed(content), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Reads what :meth:`to_json` gave; ``where`` is for messages.

        Raises:
            StoreError: if it is something else, damaged, or of a newer version.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise StoreError(f"{where}: damaged manifest ({error}); expected JSON") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StoreError(f"{where}: not a feature store; its manifest lacks the format {FORMAT!r}")
        version = content.get("version")
        if not isinstance(version, int) or version < 1:
            raise StoreError(f"{where}: damaged manifest, its version is {version!r}; expected a positive number")
        if version > FORMAT_VERSION:
            raise StoreError(
                f"{where}: a store of version {version}, this release reads up to {FORMAT_VERSION}; "
                "upgrade denoising-vit"
            )
        names = {item.name for item in fields(cls)}
        lacking = sorted(names - content.keys())
        if lacking:
            raise StoreError(f"{where}: damaged manifest, it lacks {', '.join(lacking)}")
        try:
            content = checked(content)
            return cls(**{name: content[name] for name in names})
        except (TypeError, ValueError) as error:
            raise StoreError(f"{where}: damaged manifest ({error})") from error


def digest_ids(ids: Sequence[str]) -> str:
    """SHA-256 of ids and their order."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()


def _compare(kind: str, mine: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    for name in sorted(mine.keys() | theirs.keys()):
        here, there = mine.get(name), theirs.get(name)
        if here != there:
            yield f"{kind}{name}: the store has {_show(here)}, this run has {_show(there)}"


def _compare_weights(mine: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    if same_weights(mine, theirs):
        return
    here, there = (Fingerprint(tuple(backbone.get("fingerprint") or ())) for backbone in (mine, theirs))
    same_length = len(here.values) == len(there.values)
    likeness = f"their cosine is {here.cosine(there):.3f}, expected above {SAME}" if same_length else "of unlike length"
    if here.matches(there):
        digests = [str(backbone.get("digest"))[:8] for backbone in (mine, theirs)]
        likeness = f"alike, but not the same: digests {digests[0]} and {digests[1]}"
    yield (
        f"weights: the store has {_show(mine.get('weights'))} (fingerprint {_short(here)}), "
        f"this run has {_show(theirs.get('weights'))} (fingerprint {_short(there)}); {likeness}"
    )


def _short(fingerprint: Fingerprint) -> str:
    return fingerprint.short if fingerprint.values else "none"


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return str(value)
