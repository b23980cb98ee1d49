"""Records of backbones in result files: write, compare, describe in messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from denoising_vit.backbones.base import Backbone
from denoising_vit.backbones.fingerprint import Fingerprint
from denoising_vit.errors import FormatError
from denoising_vit.files import digest

#: Keys of a record to name in messages.
_SHOWN = ("layer", "norm", "stride", "weights")


def names_backbone(record: Any) -> bool:
    """True if a value from a file is a record: a dictionary with name, numeric fingerprint, and optionally digest."""
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        return False
    values = record.get("fingerprint")
    if not isinstance(values, list) or not values or not isinstance(record.get("digest"), str | None):
        return False
    return all(isinstance(value, int | float) and abs(value) < 1e6 for value in values)


def require_record(path: str | Path, record: Any) -> None:
    """Raise FormatError unless a value from this file is the record of a backbone."""
    if not names_backbone(record):
        raise FormatError(f"{path}: damaged: backbone or fingerprint missing in its metadata")


def is_recorded(recorded: dict[str, Any], backbone: Backbone) -> bool:
    """True if the backbone has the recorded weights, layer, norm and stride, by its fingerprint."""
    return backbone.fingerprint.matches(Fingerprint(tuple(recorded["fingerprint"])))


def recorded_words(recorded: dict[str, Any]) -> str:
    """Description of a recorded backbone for messages."""
    known = [(key, recorded.get(key)) for key in _SHOWN]
    known.append(("fingerprint", Fingerprint(tuple(recorded["fingerprint"])).short))
    known.append(("digest", (recorded.get("digest") or "")[:8] or None))
    return f"{recorded['name']} ({', '.join(f'{key} {value}' for key, value in known if value is not None)})"


def backbone_words(backbone: Backbone) -> str:
    """Description of a loaded backbone for messages, in the form of :func:`recorded_words`."""
    known = {key: getattr(backbone, key) for key in ("name", *_SHOWN)}
    return recorded_words(known | {"fingerprint": backbone.fingerprint.values, "digest": backbone.digest})


def mismatch(made: str, recorded: dict[str, Any], backbone: Backbone, remedy: str) -> str:
    """Message about a file that belongs to another backbone.

    Args:
        made: what belongs to the recorded backbone, as in "this artifact was calibrated for".
        recorded: the recorded backbone.
        backbone: the loaded backbone.
        remedy: what to do.
    """
    return f"{made} {recorded_words(recorded)}, got {backbone_words(backbone)}. {remedy}"


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """True if two records have the same weights, layer, norm and stride.

    Digests are compared if both records have one, for the same model in the same precision; otherwise fingerprints are.
    """
    digests = [record.get("digest") for record in (one, other)]
    if all(digests) and all(one.get(key) == other.get(key) for key in ("name", "dtype")) and digests[0] != digests[1]:
        return False
    prints = [tuple(record.get("fingerprint") or ()) for record in (one, other)]
    return prints[0] == prints[1] or Fingerprint(prints[0]).matches(Fingerprint(prints[1]))


def weights_key(backbone: Backbone) -> str:
    """Key for files of cached features: the digest of the weights, or of the fingerprint if there is no digest."""
    return backbone.digest or digest(backbone.fingerprint.values)


def describe(backbone: Backbone) -> dict[str, Any]:
    """Record of a backbone for result files; JSON values."""
    return {
        "name": backbone.name,
        "weights": backbone.weights,
        "fingerprint": backbone.fingerprint.values,
        "digest": backbone.digest,
        "layer": backbone.layer,
        "norm": backbone.norm,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": backbone.device.type,
    }
