"""Identity of backbones: fingerprints of features, digests of weights, and records in result files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from denoising_vit.errors import DenoisingVitError, FormatError
from denoising_vit.files import digest

if TYPE_CHECKING:
    from denoising_vit.backbones.base import Backbone

#: Cosine above which two fingerprints mean the same weights; bfloat16 and float32 of one model agree to 0.9998.
SAME = 0.999

_LENGTH, _WIDTH = 128, 1 << 14

#: Keys of a record to name in messages.
_SHOWN = ("layer", "norm", "stride", "weights")


@dataclass(frozen=True)
class Fingerprint:
    """Features of one fixed synthetic image, projected to 128 numbers.

    A random projection approximately preserves the cosine between the features of two models, so that weights can be
    compared with a record.
    """

    values: tuple[float, ...]

    @classmethod
    def of(cls, extractor: Callable[[Tensor], Tensor], size: int) -> Fingerprint:
        """Fingerprint of any extractor (1, 3, size, size) -> (1, h, w, C)."""
        with torch.no_grad():
            features = extractor(synthetic_image(size)).cpu().double().flatten().numpy()
        # RandomState's streams are the same in all NumPy versions; signs keep the projection exact.
        signs = 2.0 * np.random.RandomState(0).randint(0, 2, (_LENGTH, _WIDTH), dtype=np.int8) - 1
        parts = np.pad(features, (0, -features.size % _WIDTH)).reshape(-1, _WIDTH)
        weights = np.cos(np.arange(1, len(parts) + 1))  # a different weight for each part of a long feature map
        projected = signs @ (weights @ parts)
        norm = float(np.linalg.norm(projected))
        return cls(tuple(round(float(value) / norm, 5) if norm > 0 else 0.0 for value in projected))

    def cosine(self, other: Fingerprint) -> float:
        """Cosine between two fingerprints, in [-1, 1]."""
        mine, theirs = np.array(self.values), np.array(other.values)
        return float(mine @ theirs / max(float(np.linalg.norm(mine) * np.linalg.norm(theirs)), 1e-12))

    def matches(self, other: Fingerprint) -> bool:
        """True if both belong to the same weights."""
        return len(self.values) == len(other.values) and self.cosine(other) > SAME

    @property
    def short(self) -> str:
        """Eight hexadecimal digits for messages; use :meth:`matches` to compare."""
        bits = "".join("1" if value > 0 else "0" for value in self.values[:32])
        return f"{int(bits, 2):08x}"


def state_digest(module: nn.Module) -> str:
    """SHA-256 of the names, shapes and float32 values of all parameters and buffers."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)}".encode())
        found.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def synthetic_image(size: int) -> Tensor:
    """Fixed image of waves, (1, 3, size, size) in about [-2, 2]; no random generator is used."""
    place = torch.linspace(0, 1, size, dtype=torch.float64)
    y, x = torch.meshgrid(place, place, indexing="ij")
    waves = [
        torch.sin(2 * torch.pi * (a * x + b * y)) + torch.cos(2 * torch.pi * (c * x * y + d * (x - y) ** 2))
        for a, b, c, d in ((3, 1, 5, 2), (1, 4, 3, 7), (2, 5, 9, 4))
    ]
    return torch.stack(waves)[None].float()


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


def require_recorded(
    recorded: dict[str, Any], backbone: Backbone, made: str, error: type[DenoisingVitError], *, remedy: str
) -> None:
    """Raise the error, with the message of :func:`mismatch`, unless the backbone is the recorded one."""
    if not is_recorded(recorded, backbone):
        raise error(mismatch(made, recorded, backbone, remedy))


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
    """Message about a file of another backbone; ``made`` is as in "this artifact was calibrated for"."""
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
