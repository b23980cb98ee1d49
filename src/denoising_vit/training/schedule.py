"""The learning rate over a run: a linear rise, then half a cosine."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, peak: float, final: float, warmup: float) -> float:
    """The rate of a step: from near zero to the peak over the first part, then by a cosine to the final rate.

    Args:
        step: counted from 0.
        steps: of the whole run.
        peak: the highest.
        final: the last.
        warmup: share of the steps in [0, 1) over which it rises.
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(steps - 1 - rising, 1)
    return final + (peak - final) * (1 + math.cos(math.pi * min(done, 1))) / 2


def peak_rate(rate: float, pairs: int) -> float:
    """The highest rate for so many pairs in a step, of all processes: ``rate sqrt(pairs / 256)``, as published."""
    return rate * math.sqrt(pairs / 256)
