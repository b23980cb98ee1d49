"""Tables and pictures of the curves, from `curves.jsonl` alone.

    python benchmarks/curves_report.py OUT/curves.jsonl --out docs

Writes `curves.md` and `curves.svg`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from neighbours import paired_interval

from denoising_vit.evaluation.outcomes import METHOD, Interval

matplotlib.use("svg")
import matplotlib.pyplot as plt

Record = dict[str, Any]

#: Panels: the curve, its variable, whether the axis is logarithmic.
_PANELS = [
    ("views", "views", True),
    ("smoothness", "smoothness", True),
    ("shrinkage", "shrinkage", True),
    ("taper", "taper", False),
    ("resolution", "resolution", False),
]


@dataclass(frozen=True)
class Point:
    """A variant with its metrics and its difference from the reference on the same frames."""

    variant: Record
    r2: float | None
    cosine: float | None
    miou: float
    difference: float
    interval: Interval
    run: Record


def main(records: tyro.conf.Positional[Path], /, out: Path) -> None:
    """Writes the tables and the picture.

    Args:
        records: paths of curves.jsonl files.
        out: folder for curves.md and curves.svg.
    """
    points = read(records)
    (out / "curves.md").write_text(table(points))
    draw(points, out / "curves.svg")
    print(table(points))


def read(path: Path) -> list[Point]:
    """All points, each compared with the default on the same frames."""
    records: list[Record] = [json.loads(line) for line in path.read_text().splitlines()]
    references = {record["variant"]["frames"]: record for record in records if is_default(record["variant"])}
    points = []
    for record in records:
        reference = references[record["variant"]["frames"]]
        ours, theirs = np.array(record["confusions"]), np.array(reference["confusions"])
        points.append(
            Point(
                record["variant"],
                record["r2"],
                record["cosine"],
                record["miou"],
                record["miou"] - reference["miou"],
                paired_interval(ours, theirs),
                record.get("run", {}),
            )
        )
    return points


def is_default(variant: Record) -> bool:
    """Whether nothing but the frames differs from the default."""
    return variant["curve"] == "default" and variant["features"] == "F"


def changes(variant: Record) -> str:
    """What a variant changes, as text."""
    plain = {
        "views": 32,
        "resolution": 74,
        "smoothness": 1e-2,
        "shrinkage": 1e-3,
        "taper": 0.3,
        "clip": None,
        "artifact": "fitted",
        "features": "F",
        "ablation": None,
    }
    found = [f"{key} {variant[key]}" for key, value in plain.items() if variant[key] != value]
    source = variant["source"]
    usual = {"size": 518, "coverage": "even", "area": [0.1, 0.5], "dtype": "bfloat16"}
    found += [f"{key} {source[key]}" for key, value in usual.items() if source[key] != value]
    return ", ".join(found) or "nothing"


def table(points: list[Point]) -> str:
    """Markdown, one table per set of frames."""
    run = points[0].run
    lines = [
        "# Curves of stage 1",
        "",
        "Made by `benchmarks/curves_report.py` from the records of `benchmarks/curves.py`. R² and cosine are means of",
        "frames; the last two columns are the mIoU against the default's on the same frames, with a 95 % interval",
        f"({METHOD}) over the frames that were asked for. [decisions.md](decisions.md) says what was made of them.",
        "",
    ]
    lines += [f"{run['hardware']}. Neural field of the ablation: {run['neural']}.", ""]
    for frames in ("all", "some"):
        chosen = [point for point in points if point.variant["frames"] == frames]
        gallery, queries = run["frames"][frames]
        lines += [
            f"Frames: {frames} ({gallery} of known labels, {queries} asked for)",
            "",
            "| curve | changed | R² | cosine | mIoU | against default | 95 % |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for point in sorted(chosen, key=lambda point: (order(point.variant["curve"]), value(point))):
            r2, cosine = ("-" if x is None else f"{x:.4f}" for x in (point.r2, point.cosine))
            low, high = point.interval.low, point.interval.high
            interval = "-" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"
            lines.append(
                f"| {point.variant['curve']} | {changes(point.variant)} | {r2} | {cosine} | {point.miou:.2f} | "
                f"{point.difference:+.2f} | {interval} |"
            )
        lines.append("")
    return "\n".join(lines)


def order(curve: str) -> str:
    """Sort key: raw and default first."""
    return {"raw": "0", "default": "1"}.get(curve, curve)


def value(point: Point) -> float:
    """Position of a point on its curve."""
    x = point.variant.get(point.variant["curve"].split(",")[0])
    return float(x) if isinstance(x, int | float) else 0.0


def draw(points: list[Point], path: Path) -> None:
    """Plots R² above and mIoU below, one column per curve."""
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, len(_PANELS), figsize=(11, 4.2), sharex="col", layout="constrained")
    for column, (curve, variable, logarithmic) in enumerate(_PANELS):
        for name, frames, style in series(curve):
            chosen = [p for p in points if belongs(p, name, frames, variable)]
            chosen.sort(key=lambda p: p.variant[variable])
            if len(chosen) < 2:
                continue
            label = f"{'G known' if 'known' in name else 'G fitted'}, {frames} frames"
            for row, figure_of in enumerate((lambda p: p.r2, lambda p: p.miou)):
                x, y = [p.variant[variable] for p in chosen], [figure_of(p) for p in chosen]
                axes[row, column].plot(x, y, style, label=label, markersize=3)
        if logarithmic:
            axes[1, column].set_xscale("log", base=2 if variable == "views" else 10)
        axes[1, column].set_xlabel(variable)
    axes[0, 0].set_ylabel("held-out R²")
    axes[1, 0].set_ylabel("20-NN mIoU")
    axes[0, 0].legend(frameon=False, fontsize=6)
    figure.savefig(path, metadata={"Date": None})


def series(curve: str) -> list[tuple[str, str, str]]:
    """Lines of a panel: name of the curve, its frames, its style."""
    if curve != "views":
        return [(curve, "all", "o-")]
    return [
        ("views", "all", "o-"),
        ("views", "some", "s-"),
        ("views, G known", "all", "o--"),
        ("views, G known", "some", "s--"),
    ]


def belongs(point: Point, curve: str, frames: str, variable: str) -> bool:
    """Whether a point lies on a line; the default lies on every line with G fitted."""
    variant = point.variant
    if variant["frames"] != frames or variant["features"] != "F":
        return False
    if is_default(variant):
        return "known" not in curve
    return variant["curve"] == curve and (variable == "views" or variant["views"] == 32)


if __name__ == "__main__":
    tyro.cli(main)
