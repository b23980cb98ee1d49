"""The page of a training run: charts, held-out metrics and panels, settings and command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from denoising_vit.environment import software_words
from denoising_vit.evaluation.tables.runs import RunRecord, best_look, read_run
from denoising_vit.show.pages.rendering import LineChart, Picture, data_uri, line_chart, render, write_page

#: Charts of held-out evaluations: title, key of the trained features; ``raw_`` and ``target_`` keys belong to it.
_LOOKS = (
    ("held-out cosine to the target", "cosine"),
    ("1 − cosine, relative to raw", "ratio"),
    ("effective rank", "rank"),
    ("position, linear probe (R²)", "place"),
    ("blank images, variance relative to raw", "blank_variance"),
    ("photos, variance relative to raw", "photo_variance"),
    ("class token, 1 − cosine to the frozen backbone", "class_drift"),
)
#: Charts of training steps.
_STEPS = (("loss of the batch", "loss"), ("learning rate", "rate"), ("norm of the gradient", "gradient"))

#: Metrics of the table: name, key, meaning.
_FIGURES = (
    ("cosine", "cosine", "Similarity of features and target; 1 means identical directions."),
    ("MSE", "mse", "Mean squared difference to the target."),
    (
        "effective rank",
        "rank",
        "Number of directions the features use; a value far below the target's means lost content.",
    ),
    ("position, R²", "place", "How well a linear fit predicts a patch's position; lower is cleaner."),
    ("position by neighbours, R²", "place_neighbours", "The same, predicted from the nearest patches of other images."),
    (
        "blank images, variance left",
        "blank_variance",
        "On images without content, the fraction of raw's variance over positions; 0 for a constant map.",
    ),
    ("blank images, high frequencies left", "blank_detail", "The same for the differences between adjacent patches."),
    ("blurred photos, high frequencies left", "blurred_detail", "The same on heavily blurred photos."),
    ("change under shifts, relative to raw", "shift_change", "Change of the features under sub-patch shifts."),
    (
        "photos, variance left",
        "photo_variance",
        "On photos, the fraction of raw's variance over positions: content, which should remain as those above fall.",
    ),
)


def render_run(folder: Path) -> str:
    """The page of a run, finished or not.

    Raises:
        EvaluationError: if the folder is not a run folder.
        OSError: if a panel cannot be read.
    """
    run = read_run(folder)
    best = best_look(run.looks) if run.looks else None
    return render(
        "run.html",
        run=run,
        name=folder.resolve().name,
        best=best,
        last=run.steps[-1]["step"] if run.steps else (run.looks[-1]["step"] if run.looks else 0),
        of=run.settings.get("options.steps", "-"),
        charts=_charts(run),
        figures=_figures(best),
        panels=_panels(folder / "panels", best),
        about={"hardware": run.about.get("hardware"), "software": software_words(run.about) or None},
        command=run.about.get("command"),
    )


def _charts(run: RunRecord) -> list[LineChart]:
    sources = {"trained": "", "raw": "raw_", "target": "target_"}
    looks = [
        line_chart(title, "steps", {name: _values(run.looks, before + key) for name, before in sources.items()})
        for title, key in _LOOKS
    ]
    steps = [line_chart(title, "steps", {key: _values(run.steps, key)}) for title, key in _STEPS]
    return [chart for chart in (*looks, *steps) if chart is not None]


def _values(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in lines if isinstance(line.get(key), int | float)]


def _figures(best: Mapping[str, Any] | None) -> list[tuple[str, float | None, float | None, float | None, str]]:
    """Rows of the best evaluation: name, raw, trained, target, meaning."""
    if best is None:
        return []
    return [
        (name, best.get(f"raw_{key}"), best.get(key), best.get(f"target_{key}"), says)
        for name, key, says in _FIGURES
        if key in best
    ]


def _panels(folder: Path, best: Mapping[str, Any] | None) -> list[Picture]:
    """Panels of the best evaluation and of the first."""
    paths = sorted(folder.glob("step-*.png"))
    wanted = [path for path in paths if best is not None and path.stem == f"step-{best['step']:07}"] or paths[-1:]
    found = []
    for path in dict.fromkeys([*wanted, *paths[:1]]):
        try:
            with Image.open(path, formats=["PNG"]) as image:
                ratio = image.width / image.height
        except UnidentifiedImageError:  # damaged: show the other panels
            continue
        step = int(path.stem.removeprefix("step-"))
        uri = data_uri(path.read_bytes(), "image/png")
        found.append(
            Picture(uri, ratio, f"held-out images after step {step}", f"features after step {step} as colours")
        )
    return found


def write_run_page(folder: Path) -> Path:
    """Write ``run.html`` into the folder of a run, and return its path.

    Raises:
        EvaluationError: if the folder is not a run folder.
        OSError: if a panel cannot be read, or the page cannot be written.
    """
    path = folder / "run.html"
    write_page(render_run(folder), path)
    return path
