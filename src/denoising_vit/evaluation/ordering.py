"""The order in which probes see images: a function of the step and the seed."""

from __future__ import annotations

import functools

import numpy as np

#: What the stream of draws is for.
_ORDER = 1


def chosen(images: int, batch: int, step: int, seed: int) -> list[int]:
    """The images of a step: every image comes once in an epoch, and a batch may begin in one and end in the next."""
    wanted = range(step * batch, (step + 1) * batch)
    return [int(_order(images, position // images, seed)[position % images]) for position in wanted]


@functools.lru_cache(maxsize=4)
def _order(images: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(images)
