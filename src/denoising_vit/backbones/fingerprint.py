"""Identification of weights: by a fingerprint of their features, and by a digest of their bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

#: Cosine above which two fingerprints mean the same weights; bfloat16 and float32 of one model agree to 0.9998.
SAME = 0.999

_LENGTH, _WIDTH = 128, 1 << 14


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
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def synthetic_image(size: int) -> Tensor:
    """Fixed image of waves, (1, 3, size, size) in about [-2, 2]; no random generator is used."""
    place = torch.linspace(0, 1, size, dtype=torch.float64)
    y, x = torch.meshgrid(place, place, indexing="ij")
    waves = [
        torch.sin(2 * torch.pi * (a * x + b * y)) + torch.cos(2 * torch.pi * (c * x * y + d * (x - y) ** 2))
        for a, b, c, d in ((3, 1, 5, 2), (1, 4, 3, 7), (2, 5, 9, 4))
    ]
    return torch.stack(waves)[None].float()
