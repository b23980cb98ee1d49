"""Stage 1: bare forward passes, the exact solver, and the neural field, on the same features in one run.

    python benchmarks/stage1.py PHOTO... --out FOLDER [--weights FILE] [--views 65 257] [--recipes released paper]

For each photo and each number of views: seconds of the forward passes (rendering included); seconds of the exact solver
on these features, from scratch (plan, factors, sums, solution) and with precomputed factors; seconds of the
neural field by each recipe; and how well each predicts 8 held-out views. The views are drawn as in the released
code (`--coverage`), view 0 the whole photo. The recipes:

- released: the released code's, 25,000 steps, with the patch positions that it uses (edge to edge of a view);
- released-centres: the same with patches at their centres;
- paper: the paper's, 20,000 steps, at the centres.

The exact solver uses the centres. `--no-full` times 500 steps of a recipe and scales them, instead of running all.
Writes `FOLDER/stage1.json` and `FOLDER/stage1.md` after every part; existing results are skipped.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from measuring import hardware, synchronise
from published_recipe import timed_field

import denoising_vit as dv
from denoising_vit.backbones import Backbone
from denoising_vit.decomposition.exact import ExactSolver
from denoising_vit.decomposition.inputs import extract_views, load_image, prepare
from denoising_vit.decomposition.methods import gather
from denoising_vit.decomposition.neural_field.fit import SeenViews, fit_neural_field
from denoising_vit.decomposition.options import DenoiseOptions, NeuralFieldOptions
from denoising_vit.decomposition.statistics import HeldOut, Statistics
from denoising_vit.views.options import Coverage

Record = dict[str, Any]
Recipe = Literal["released", "released-centres", "paper"]
T = TypeVar("T")

#: Number of timed steps, scaled to all steps, where a recipe is not run to its end.
TIMED_STEPS = 500


def main(
    photos: tyro.conf.Positional[tuple[Path, ...]],
    /,
    out: Path,
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    weights: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "float32",
    size: int | None = None,
    views: tuple[int, ...] = (65, 257),
    coverage: Coverage = "released",
    recipes: tuple[Recipe, ...] = ("released",),
    full: bool = True,
    steps: int | None = None,
) -> None:
    """Compares the solvers of stage 1.

    Args:
        photos: image files.
        out: output folder.
        backbone: name of a timm model.
        weights: as in `load_backbone`.
        dtype: dtype of the backbone; the released code uses float32.
        size: size of a view in pixels; the backbone's default if None.
        views: numbers of fitted views, the whole photo included; features are computed once, for the largest.
        coverage: how crops are drawn.
        recipes: recipes of the neural field.
        full: run each recipe to its end.
        steps: number of steps, instead of a recipe's own.
    """
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "stage1.json"
    found: Record = json.loads(path.read_text()) if path.exists() else {"rows": []}
    model = dv.load_backbone(backbone, weights=weights, dtype=dtype)
    made_with = {"backbone": model.extra_repr(), "size": size, "coverage": coverage, "steps": steps}
    if found["rows"] and {key: found.get(key) for key in made_with} != made_with:
        raise SystemExit(f"{path} was made with other settings than {made_with}; name another folder (--out)")
    found |= made_with
    rows = {(row["photo"], row["views"]): row for row in found["rows"]}
    for photo, count in ((photo, count) for photo in photos for count in views):
        rows.setdefault((photo.name, count), {"photo": photo.name, "views": count, "fields": {}})

    def write() -> None:
        found["rows"] = list(rows.values())
        path.write_text(json.dumps(found, indent=1) + "\n")
        (out / "stage1.md").write_text(markdown(found))

    for photo in photos:
        todo = [rows[photo.name, count] for count in views]
        todo = [row for row in todo if "exact_untapered" not in row or missing(row, recipes, full)]
        if not todo:
            continue
        most = max(row["views"] for row in todo)
        seen, held_out, forward = features_of(model, photo, DenoiseOptions(views=most, coverage=coverage, size=size))
        for row in todo:
            part = SeenViews(seen.plan.subset(slice(row["views"])), seen.features[: row["views"]])
            if "exact_untapered" not in row:
                row |= {"hardware": hardware(), "forward_s": forward * row["views"]}
                row["exact"] = exact(part, held_out, DenoiseOptions().taper)
                row["exact_untapered"] = exact(part, held_out, 0.0)
                write()
            for recipe in missing(row, recipes, full):
                row["fields"][recipe] = field(part, held_out, recipe, steps, full)
                write()
    print(markdown(found))


def missing(row: Record, recipes: tuple[Recipe, ...], full: bool) -> list[Recipe]:
    """The recipes that a row lacks, or has only the time of."""
    done = row["fields"]
    return [recipe for recipe in recipes if recipe not in done or (full and "last" not in done[recipe])]


def features_of(model: Backbone, photo: Path, options: DenoiseOptions) -> tuple[SeenViews, SeenViews, float]:
    """Features of the fitted and the held-out views, and the seconds per view."""
    image, _ = load_image(photo, model)
    fitted, held_out = prepare(model, replace(options, method="neural-field"))
    assert held_out is not None
    gather(extract_views(model, image, held_out), held_out)  # warms up
    started = time.perf_counter()
    seen = gather(extract_views(model, image, fitted), fitted)
    synchronise()
    seconds = (time.perf_counter() - started) / len(fitted)
    return seen, gather(extract_views(model, image, held_out), held_out), seconds


def at_centres(views: SeenViews) -> SeenViews:
    """The same features with patches at their centres."""
    return replace(views, plan=replace(views.plan, released=False))


def exact(seen: SeenViews, held_out: SeenViews, taper: float) -> Record:
    """The exact solver on given features; without a taper it weights all patches equally, as the field does."""
    options, seen, held_out = DenoiseOptions(), at_centres(seen), at_centres(held_out)
    device = seen.features.device
    resolution = (2 * seen.plan.grid[0], 2 * seen.plan.grid[1])
    plan = replace(seen.plan, resolution=resolution, taper=taper)

    def solve(solver: ExactSolver) -> tuple[torch.Tensor, torch.Tensor]:
        sums = Statistics(plan, seen.features.shape[-1], device=device)
        for part in seen.features.split(2 if device.type == "cpu" else 32):
            sums.add(part.float())
        return solver.solve(sums.b, sums.g)

    def cold() -> ExactSolver:
        fresh = replace(plan)  # without cached results of the last run
        solver = ExactSolver(fresh, smoothness=options.smoothness, shrinkage=options.shrinkage, device=device)
        solve(solver)
        return solver

    cold_s, solver = timed(cold)
    prepared_s, (field, artifact) = timed(lambda: solve(solver))
    judge = HeldOut(field, artifact, replace(held_out.plan, resolution=resolution))
    judge.add_views(held_out.features)
    return {"cold_s": cold_s, "prepared_s": prepared_s, "r2": judge.r2, "cosine": judge.cosine}


def field(seen: SeenViews, held_out: SeenViews, recipe: Recipe, steps: int | None, full: bool) -> Record:
    """The neural field by a recipe: its time and, if run to its end, the last and best step and the history."""
    options = NeuralFieldOptions(recipe="paper" if recipe == "paper" else "released", steps=steps)
    if recipe != "released":
        seen, held_out = at_centres(seen), at_centres(held_out)
    if not full:
        return timed_field(seen, options, TIMED_STEPS)
    started = time.perf_counter()
    fit = fit_neural_field(seen, options, held_out=held_out, watch=lambda look: print(look, flush=True))
    synchronise()
    return {
        "seconds": time.perf_counter() - started,
        "steps": options.total_steps,
        "last": asdict(fit.history[-1]),
        "best": asdict(fit.best),
        "history": [asdict(look) for look in fit.history],
    }


def timed(job: Callable[[], T], repeats: int = 3) -> tuple[float, T]:
    """Median seconds over a few repeats, and the result of the last."""
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
    """Makes glibc keep freed memory: the neural field is then 1.5 times as fast on a CPU (fewer page faults)."""
    try:
        libc = ctypes.CDLL(None)
        for parameter, value in ((-3, 1 << 30), (-1, 1 << 30)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(parameter, value)
    except (OSError, AttributeError):
        print("note: not glibc, memory settings left alone")


def markdown(found: Record) -> str:
    """The record as tables."""
    rows = [row for row in found["rows"] if "exact_untapered" in row]
    fits = [(row, recipe, fit) for row in rows for recipe, fit in row["fields"].items()]
    lines = [
        f"{found['backbone']}; views: {found['coverage']}; {', '.join(sorted({row['hardware'] for row in rows}))}.",
        "",
        "| photo | views | forward | exact | exact, nothing prepared | recipe | its steps | times as fast |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, recipe, fit in fits:
        ours, scaled = row["exact"], "" if "last" in fit else " (scaled)"
        lines.append(
            f"| {row['photo']} | {row['views']} | {row['forward_s']:.1f} s | {ours['prepared_s']:.3f} s | "
            f"{ours['cold_s']:.3f} s | {recipe} | {fit['seconds']:.0f} s{scaled} | "
            f"{fit['seconds'] / ours['prepared_s']:,.0f} "
            f"({fit['seconds'] / ours['cold_s']:,.0f} with nothing prepared) |"
        )
    lines += ["", "Held-out views, R² (cosine):", ""]
    lines += ["| photo | views | exact F + G | exact, taper 0 | recipe | best step | last step | with h, last |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row, recipe, fit in (each for each in fits if "last" in each[2]):
        best, last = fit["best"], fit["last"]
        with_h = last["r2_with_residual"]
        lines.append(
            f"| {row['photo']} | {row['views']} | {agreement(row['exact'])} | {agreement(row['exact_untapered'])} | "
            f"{recipe} | {agreement(best)}, step {best['step']} | {agreement(last)} | "
            f"{'-' if with_h is None else f'{with_h:.3f}'} |"
        )
    return "\n".join(lines) + "\n"


def agreement(figures: Record) -> str:
    """R² and cosine."""
    return f"{figures['r2']:.3f} ({figures['cosine']:.3f})"


if __name__ == "__main__":
    tyro.cli(main)
