"""Stage 1: bare forward passes, the exact solver, and the neural field as published, on the same features in one run.

    python benchmarks/stage1.py PHOTO... --out FOLDER [--views 64 256] [--full]

For each photo and each number of views: seconds of the forward passes (rendering included); seconds of the exact solver
on these features, with nothing prepared (plan, factors, sums, solution) and with the factors at hand; seconds of
20,000 steps of the neural field, scaled from 500 (half of them with h); and how well each predicts held-out views. With
`--full`, the neural field takes all its steps, and its best step is reported beside its last. Writes
`FOLDER/stage1.json` and `FOLDER/stage1.md` after every part; what is there already is not done again.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from measuring import hardware, synchronise
from published_recipe import timed_field

import denoising_vit as dv
from denoising_vit.backbones import Backbone
from denoising_vit.decomposition import ExactSolver, Statistics
from denoising_vit.decomposition.heldout import HeldOut
from denoising_vit.decomposition.neural_field import NeuralFieldOptions, SeenViews, fit_neural_field
from denoising_vit.extraction import extract_views, load_image
from denoising_vit.options import DenoiseOptions
from denoising_vit.preparing import prepare
from denoising_vit.separating import gather

Record = dict[str, Any]
T = TypeVar("T")


def main(
    photos: tyro.conf.Positional[tuple[Path, ...]],
    /,
    out: Path,
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    weights: str = "auto",
    views: tuple[int, ...] = (64, 256),
    full: tyro.conf.FlagCreatePairsOff[bool] = False,
    timed_steps: int = 500,
    neural: NeuralFieldOptions = NeuralFieldOptions(),  # noqa: B008, frozen
) -> None:
    """Compares the solvers of stage 1.

    Args:
        photos: image files.
        out: folder of the results.
        backbone: a timm model.
        weights: as `load_backbone` takes them.
        views: numbers of views to fit; features are made once, for the most.
        full: also run the neural field to its end.
        timed_steps: steps that are timed and scaled.
        neural: the neural field's recipe.
    """
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "stage1.json"
    found: Record = json.loads(path.read_text()) if path.exists() else {"rows": []}
    model = dv.load_backbone(backbone, weights=weights)
    made_with = {"backbone": model.extra_repr(), "neural": asdict(neural)}
    if found["rows"] and {key: found[key] for key in made_with} != made_with:
        raise SystemExit(f"{path} was made with another backbone or recipe; name another folder (--out)")
    found |= made_with
    rows = {(row["photo"], row["views"]): row for row in found["rows"]}
    for photo, count in ((photo, count) for photo in photos for count in views):
        rows.setdefault((photo.name, count), {"photo": photo.name, "views": count})

    def write() -> None:
        found["rows"] = list(rows.values())
        path.write_text(json.dumps(found, indent=1) + "\n")
        (out / "stage1.md").write_text(markdown(found))

    for photo in photos:
        open_rows = [rows[photo.name, count] for count in views]
        open_rows = [
            row for row in open_rows if not {"exact", "exact_untapered"} <= row.keys() or (full and "full" not in row)
        ]
        if not open_rows:
            continue
        most = max(row["views"] for row in open_rows)
        seen, held_out, forward = features_of(model, photo, DenoiseOptions(views=most))
        for row in open_rows:
            part = SeenViews(seen.plan.subset(slice(row["views"])), seen.features[: row["views"]])
            if "exact" not in row:
                row |= {"hardware": hardware(), "forward_s": forward * row["views"]}
                row["exact"] = exact(part, held_out, DenoiseOptions().taper)
                row["neural"] = timed_field(part, replace(neural, steps=timed_steps), neural.steps)
                row["times_as_fast"] = row["neural"]["seconds"] / row["exact"]["prepared_s"]
                row["times_as_fast_with_nothing_prepared"] = row["neural"]["seconds"] / row["exact"]["cold_s"]
                write()
            if "exact_untapered" not in row:
                row["exact_untapered"] = exact(part, held_out, 0.0)
                write()
            if full and "full" not in row:
                row["full"] = whole_field(part, held_out, neural)
                write()
    print(markdown(found))


def features_of(model: Backbone, photo: Path, options: DenoiseOptions) -> tuple[SeenViews, SeenViews, float]:
    """Features of the views to fit and to judge by, and the seconds that one view took."""
    image, _ = load_image(photo, model)
    fitted, held_out = prepare(model, replace(options, method="neural-field"))
    assert held_out is not None
    gather(extract_views(model, image, held_out), held_out)  # warms up
    started = time.perf_counter()
    seen = gather(extract_views(model, image, fitted), fitted)
    synchronise()
    seconds = (time.perf_counter() - started) / len(fitted)
    return seen, gather(extract_views(model, image, held_out), held_out), seconds


def exact(seen: SeenViews, held_out: SeenViews, taper: float) -> Record:
    """The exact solver on features that are there; without a taper it weighs all patches alike, as the field does."""
    options = DenoiseOptions()
    device = seen.features.device
    resolution = (2 * seen.plan.grid[0], 2 * seen.plan.grid[1])
    plan = replace(seen.plan, resolution=resolution, taper=taper)

    def solve(solver: ExactSolver) -> tuple[torch.Tensor, torch.Tensor]:
        sums = Statistics(plan, seen.features.shape[-1], device=device)
        for part in seen.features.split(2):
            sums.add(part.float())
        return solver.solve(sums.b, sums.g)

    def cold() -> ExactSolver:
        fresh = replace(plan)  # nothing is kept from the last time
        solver = ExactSolver(fresh, smoothness=options.smoothness, shrinkage=options.shrinkage, device=device)
        solve(solver)
        return solver

    cold_s, solver = timed(cold)
    prepared_s, (field, artifact) = timed(lambda: solve(solver))
    judge = HeldOut(field, artifact, replace(held_out.plan, resolution=resolution))
    judge.add_views(held_out.features)
    return {"cold_s": cold_s, "prepared_s": prepared_s, "r2": judge.r2, "cosine": judge.cosine}


def whole_field(seen: SeenViews, held_out: SeenViews, options: NeuralFieldOptions) -> Record:
    """The neural field to its end: last and best step, and everything in between."""
    started = time.perf_counter()
    fit = fit_neural_field(seen, options, held_out=held_out, watch=lambda look: print(look, flush=True))
    return {
        "seconds": time.perf_counter() - started,
        "last": asdict(fit.history[-1]),
        "best": asdict(fit.best),
        "history": [asdict(look) for look in fit.history],
    }


def timed(job: Callable[[], T], repeats: int = 3) -> tuple[float, T]:
    """Median seconds of a few repeats, and what the last returned."""
    times = []
    for _ in range(repeats - 1):
        started = time.perf_counter()
        job()
        synchronise()
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    result = job()
    synchronise()
    return statistics.median([*times, time.perf_counter() - started]), result


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed: the neural field is then 1.5 times as fast on a CPU (fewer page faults)."""
    try:
        libc = ctypes.CDLL(None)
        for parameter, value in ((-3, 1 << 30), (-1, 1 << 30)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(parameter, value)
    except (OSError, AttributeError):
        print("note: not glibc, memory settings left alone")


def markdown(found: Record) -> str:
    """The record as tables."""
    lines = [
        f"{found['backbone']}; {', '.join(sorted({row['hardware'] for row in found['rows'] if 'hardware' in row}))}.",
        "",
        "| photo | views | forward | exact | exact, nothing prepared | neural field (scaled) | times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in found["rows"] if "exact" in row):
        lines.append(
            f"| {row['photo']} | {row['views']} | {row['forward_s']:.1f} s | {row['exact']['prepared_s']:.2f} s | "
            f"{row['exact']['cold_s']:.2f} s | {row['neural']['seconds']:.0f} s | {row['times_as_fast']:.0f} "
            f"({row['times_as_fast_with_nothing_prepared']:.0f} with nothing prepared) |"
        )
    full = [row for row in found["rows"] if "full" in row and "exact" in row]
    if full:
        lines += ["", "Held-out views, R² (cosine):", ""]
        lines += [
            "| photo | views | exact F + G | exact, taper 0 | field, best step | field, last step | with h, last |"
        ]
        lines += ["|---|---|---|---|---|---|---|"]
    for row in full:
        best, last, ours = row["full"]["best"], row["full"]["last"], row["exact"]
        plain = row.get("exact_untapered")
        untapered = f"{plain['r2']:.3f} ({plain['cosine']:.3f})" if plain else "-"
        lines.append(
            f"| {row['photo']} | {row['views']} | {ours['r2']:.3f} ({ours['cosine']:.3f}) | "
            f"{untapered} | {best['r2']:.3f} "
            f"({best['cosine']:.3f}), step {best['step']} | {last['r2']:.3f} ({last['cosine']:.3f}) | "
            f"{last['r2_with_residual'] or float('nan'):.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(main)
