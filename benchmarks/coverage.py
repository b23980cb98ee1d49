"""How often a 95 % interval contains the true value, by number of groups: ours against bootstrap percentiles.

    python benchmarks/coverage.py [--repeats 4000] [--out coverage.md]

Each repeat draws new groups from a population whose difference is known: means of normal, heavy-tailed, skewed and
very skewed differences, and the difference in mIoU of two sources on made-up images of six classes, some of them rare.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from denoising_vit.evaluation.outcomes import METHOD, MIN_GROUPS, Measured, Outcome, paired_interval
from denoising_vit.evaluation.scores import Counts, scores

GROUPS = (5, 10, 30, 100)
DRAWS = 1000

#: Draws the outcomes of both sources for a number of groups.
Sample = Callable[[np.random.Generator, int], tuple[Outcome, Outcome]]
Ends = tuple[float, float]


class One(Measured):
    """One value per group."""

    METRICS = ("figure",)


def mean_of(draw: Callable[[np.random.Generator, int], np.ndarray]) -> Sample:
    """Differences of two sources as drawn, one item per group."""

    def sample(chance: np.random.Generator, count: int) -> tuple[Outcome, Outcome]:
        values = draw(chance, count)[:, None]
        return One(values, np.arange(count)), One(np.zeros_like(values), np.arange(count))

    return sample


def images(chance: np.random.Generator, count: int) -> tuple[Counts, Counts]:
    """Counts of two sources on made-up images: hard images are hard for both, rare classes are in one of five."""
    present = chance.random((count, 6)) < [1, 0.9, 0.8, 0.6, 0.35, 0.2]
    share = chance.gamma(np.array([2.1, 1.5, 1.2, 0.7, 0.3, 0.2]), size=(count, 6)) * present
    pixels = chance.lognormal(0, 0.4, (count, 1)) * 1000
    truth = np.floor(pixels * share / share.sum(1, keepdims=True))
    hard = chance.normal(0, 0.8, (count, 1))

    def source(better: float) -> Counts:
        right = 1 / (1 + np.exp(-(better + hard + chance.normal(0, 0.6, truth.shape))))
        hits = np.floor(truth * right)
        wrong = chance.dirichlet([3, 3, 2, 2, 1, 1], count) * (truth - hits).sum(1, keepdims=True)
        return Counts(hits, truth, hits + np.floor(wrong))

    return source(1.3), source(1.0)


def bootstrap(ours: Outcome, theirs: Outcome, count: int) -> Ends:
    """Percentiles of the difference over groups drawn with replacement."""
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(float)
    low, high = np.nanpercentile(ours.drawn(weights) - theirs.drawn(weights), [2.5, 97.5])
    return float(low), float(high)


def widened(difference: float, ends: Ends, count: int) -> Ends:
    """Percentiles widened to a t interval; the only correction possible where only the percentiles were kept."""
    from scipy.special import stdtrit

    factor = float(stdtrit(count - 1, 0.975)) / 1.959964 * np.sqrt(count / (count - 1))
    return difference - (difference - ends[0]) * factor, difference + (ends[1] - difference) * factor


def coverage(sample: Sample, truth: float, count: int, repeats: int) -> list[float]:
    """Fractions of intervals that contain the true value: ours, percentiles, widened percentiles."""
    chance = np.random.default_rng(count)
    held = np.zeros(3)
    for _ in range(repeats):
        ours, theirs = sample(chance, count)
        found = paired_interval([ours], [theirs])
        assert found.low is not None and found.high is not None
        plain = bootstrap(ours, theirs, count)
        ends = ((found.low, found.high), plain, widened(found.difference, plain, count))
        held += [low <= truth <= high for low, high in ends]
    return (held / repeats).tolist()


def main(repeats: int = 2000, out: Annotated[Path | None, tyro.conf.arg(name="out")] = None) -> None:
    """Prints the table.

    Args:
        repeats: number of intervals per cell.
        out: file to write the table to as well.
    """
    many = images(np.random.default_rng(0), 200_000)
    cases: dict[str, tuple[Sample, float]] = {
        "mean, normal": (mean_of(lambda chance, n: chance.normal(0, 1, n)), 0.0),
        "mean, heavy tails (Student's t, 3)": (mean_of(lambda chance, n: chance.standard_t(3, n)), 0.0),
        "mean, skewed (exponential)": (mean_of(lambda chance, n: chance.exponential(1, n)), 1.0),
        "mean, very skewed (log-normal)": (mean_of(lambda chance, n: chance.lognormal(0, 1, n)), float(np.exp(0.5))),
        "mIoU, six classes": (images, scores(many[0]).miou - scores(many[1]).miou),
    }
    lines = [
        f"Share of 95 % intervals that hold the truth, {repeats} of each: {METHOD} / percentiles of {DRAWS} bootstrap",
        f"draws / these widened to t. With fewer than {MIN_GROUPS} groups no interval is given.",
        "",
        f"| differences | {' | '.join(f'{count} groups' for count in GROUPS)} |",
        f"|---|{'---|' * len(GROUPS)}",
    ]
    for name, (sample, truth) in cases.items():
        cells = (" / ".join(f"{100 * x:.1f}" for x in coverage(sample, truth, n, repeats)) for n in GROUPS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if out is not None:
        out.write_text(text)


if __name__ == "__main__":
    tyro.cli(main)
