"""The nearest of many features, block by block, so that memory stays bounded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Similarities that are held at a time, and queries that they are of at most.
_AT_ONCE, _QUERIES = 2**25, 4096


def nearest(queries: Tensor, bank: Tensor, k: int, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k features of a bank that are most similar to each query.

    Args:
        queries: (Q, C), of any length.
        bank: (N, C), normalised, N at least k.
        k: how many.
        without: (N,) bool, rows of the bank that are left out; k others have to remain.

    Returns:
        Cosines (Q, k), falling, and rows of the bank (Q, k).
    """
    parts = [_nearest(part, bank, k, without) for part in F.normalize(queries, dim=-1).split(_QUERIES)]
    similarity, rows = zip(*parts, strict=True)
    return torch.cat(similarity), torch.cat(rows)


def _nearest(queries: Tensor, bank: Tensor, k: int, without: Tensor | None) -> tuple[Tensor, Tensor]:
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty_like(best, dtype=torch.int64)
    step = max(_AT_ONCE // len(queries), 1)
    for start in range(0, len(bank), step):
        similarity = queries @ bank[start : start + step].T  # (Q, block)
        if without is not None:
            similarity[:, without[start : start + step]] = -torch.inf
        found, at = similarity.topk(min(k, similarity.shape[1]), dim=-1)
        candidates = torch.cat([best, found], dim=1)
        best, chosen = candidates.topk(min(k, candidates.shape[1]), dim=-1)
        rows = torch.cat([rows, at + start], dim=1).gather(1, chosen)
    return best, rows
