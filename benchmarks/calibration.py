"""How many photos an artifact needs, and how many views a photo then needs.

    python benchmarks/calibration.py FOLDER --out OUT [--photos 128] [--judged 12]

Photos of FOLDER are chosen evenly; the second part uses none of the photos of the first.

1. Split-half correlation of G against the number of photos, and whether many photos with few views or few photos with
      many views estimate it better for as many forward passes. Writes OUT/artifact.safetensors, estimated from all.
2. R^2 on held-out views against the number of fitted views, with that G given and with one fitted in each photo, for
   two resolutions of the field; the same features throughout.

Writes OUT/calibration.json after every part (finished parts are skipped), OUT/calibration.md and
OUT/calibration.svg.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
import tyro
from measuring import hardware

import denoising_vit as dv
from denoising_vit.artifact import Artifact
from denoising_vit.backbones import Backbone
from denoising_vit.data import spread
from denoising_vit.data.photos import read_photo
from denoising_vit.decomposition.calibration import run_calibration
from denoising_vit.decomposition.inputs import extract_views, load_image, prepare, solver_for
from denoising_vit.decomposition.methods import gather
from denoising_vit.decomposition.neural_field.fit import SeenViews
from denoising_vit.decomposition.options import CalibrationOptions, DenoiseOptions
from denoising_vit.decomposition.statistics import HeldOut, Statistics

matplotlib.use("svg")
import matplotlib.pyplot as plt

Record = dict[str, Any]

#: (views per photo, photos) for the comparison of how to spend forward passes.
_SPENT = ((8, 64), (16, 32), (32, 16))

_VIEWS = (4, 6, 8, 12, 16, 24, 32, 48, 64)


def main(
    folder: tyro.conf.Positional[Path],
    /,
    out: Path,
    photos: int = 128,
    judged: int = 12,
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    size: int | None = None,
) -> None:
    """Measures both curves.

    Args:
        folder: photographs.
        out: output folder.
        photos: number of photos of the first part.
        judged: number of photos of the second part.
        backbone: name of a timm model.
        size: size of a view in pixels; the backbone's default if None.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "calibration.json"
    found: Record = json.loads(path.read_text()) if path.exists() else {}
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    chosen = [files[index] for index in spread(len(files), photos + judged)]
    second = chosen[:: -(-len(chosen) // judged)][:judged]
    first = [file for file in chosen if file not in second]
    model = dv.load_backbone(backbone)
    if found and (found["photos"], found["judged"]) != (len(first), len(second)):
        raise SystemExit(f"{path} is of other numbers of photos; name another folder (--out)")
    found |= {"backbone": model.extra_repr(), "hardware": hardware(), "photos": len(first), "judged": len(second)}

    def write() -> None:
        path.write_text(json.dumps(found, indent=1) + "\n")

    if "calibration" not in found:
        whole = run_calibration(model, named(first), options=CalibrationOptions(size=size))
        whole.artifact.save(out / "artifact.safetensors")
        found["calibration"] = whole.stability.record() | {
            "split_half_by_photos": {str(count): value for count, value in whole.split_half.items()}
        }
        write()
    for views, count in _SPENT:
        if f"{views} views" not in found:
            some = run_calibration(model, named(first[:count]), options=CalibrationOptions(views=views, size=size))
            found[f"{views} views"] = some.stability.record()
            write()
    artifact = Artifact.load(out / "artifact.safetensors")
    curves: Record = found.setdefault("curves", {})
    for file in second:
        if file.name not in curves:
            curves[file.name] = views_curve(model, file, artifact, size)
            write()
    (out / "calibration.md").write_text(markdown(found))
    draw(found, out / "calibration.svg")
    print(markdown(found))


def named(files: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Photos by file name only: the artifact may be published, and paths are private."""
    return ((file.name, read_photo(file)) for file in files)


def views_curve(model: Backbone, file: Path, artifact: Artifact, size: int | None) -> Record:
    """R^2 on held-out views of one photo by resolution, whether G is known, and views."""
    options = DenoiseOptions(
        views=max(_VIEWS), size=size, method="neural-field"
    )  # its plan has no taper, and no solver
    image, _ = load_image(file, model)
    fitted, held_out = prepare(model, options)
    assert held_out is not None
    seen = gather(extract_views(model, image, fitted), fitted)
    unseen = gather(extract_views(model, image, held_out), held_out)
    found: Record = {}
    for times in (1, 2):
        resolution = (times * fitted.grid[0], times * fitted.grid[1])
        for known in (True, False):
            for views in _VIEWS:
                plan = replace(fitted.subset(slice(views)), resolution=resolution, taper=DenoiseOptions().taper)
                sums = Statistics(plan, model.embed_dim)
                sums.add(seen.features[:views].float())
                values = artifact.at(fitted.grid) if known else None
                try:
                    found[f"{resolution[0]} nodes, G {'known' if known else 'fitted'}, {views} views"] = r2(
                        sums, values, unseen
                    )
                except dv.PlanError:
                    continue  # too few views to determine that many nodes
    return found


def r2(sums: Statistics, artifact: Any, unseen: SeenViews) -> float | None:
    """R^2 on held-out views, with a given artifact or, for None, a fitted one."""
    solver = solver_for(sums.plan, DenoiseOptions(), sums.b.device)
    if artifact is None:
        field, artifact = solver.solve(sums.b, sums.g)
    else:
        artifact = artifact.to(sums.b)
        field = solver.solve_field(sums.b, artifact)
    judge = HeldOut(field, artifact, replace(unseen.plan, resolution=sums.plan.resolution))
    judge.add_views(unseen.features)
    return judge.r2


def averaged(found: Record) -> dict[str, dict[int, float]]:
    """Mean R^2 over photos, by line of the plot and number of views."""
    lines: dict[str, dict[int, float]] = {}
    curves = list(found["curves"].values())
    for key in curves[0]:
        line, views = key.rsplit(", ", 1)
        lines.setdefault(line, {})[int(views.split()[0])] = mean(curve[key] for curve in curves)
    return lines


def markdown(found: Record) -> str:
    """The record as tables."""
    whole = found["calibration"]
    halves = whole["split_half_by_photos"]
    text = [
        f"{found['backbone']}; {found['hardware']}; {found['photos']} photos, 16 views each.",
        "",
        f"| photos | {' | '.join(halves)} |",
        "|---" * (len(halves) + 1) + "|",
        f"| split-half correlation | {' | '.join(f'{value:.3f}' for value in halves.values())} |",
        "",
        f"Reliability of G from all: {whole['reliability']:.3f}; photos for 0.95: {whole['suggested']}.",
        "",
        "| views a photo | photos | noise of one photo's G over its signal | passes for a reliability of 0.95 |",
        "|---|---|---|---|",
    ]
    for views, count in _SPENT:
        some = found[f"{views} views"]
        ratio = some["noise"] / some["signal"]
        text.append(f"| {views} | {count} | {ratio:.2f} | {views * (some['suggested'] or 0)} |")
    lines = averaged(found)
    text += ["", f"| R² on held-out views, {found['judged']} photos | {' | '.join(map(str, _VIEWS))} |"]
    text += ["|---" * (len(_VIEWS) + 1) + "|"]
    for line, values in lines.items():
        text.append(f"| {line} | {' | '.join(f'{values[v]:.3f}' if v in values else '-' for v in _VIEWS)} |")
    return "\n".join(text) + "\n"


def draw(found: Record, path: Path) -> None:
    """Plots both curves side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    halves = {int(count): value for count, value in found["calibration"]["split_half_by_photos"].items()}
    left.semilogx(list(halves), list(halves.values()), "o-", base=2)
    left.set(xlabel="photos", ylabel="split-half correlation of G", ylim=(0, 1))
    for line, values in averaged(found).items():
        right.semilogx(list(values), list(values.values()), "o-", base=2, ms=3, label=line)
    right.set(xlabel="views fitted", ylabel="R² on held-out views", ylim=(0, None))
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    tyro.cli(main)
