"""Tables of training runs, from the records in their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoising_vit.environment import software_words
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.tables.markdown import code, flat, folded, plain, significant, table
from denoising_vit.files import parse_json

_TITLES = {"denoiser": "One-pass denoiser", "distillation": "Distilled ViT"}


@dataclass(frozen=True)
class RunRecord:
    """Record of a training run.

    Attributes:
        title: the kind of model.
        backbone: name of the backbone.
        settings: settings by dotted name, such as ``options.steps``.
        about: command, hardware and software; empty if not recorded.
        steps: log lines of training steps, in order.
        looks: log lines of evaluations on held-out images, in order.
    """

    title: str
    backbone: str
    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    looks: Sequence[Mapping[str, Any]]


def read_run(folder: Path) -> RunRecord:
    """Read ``run.json``, ``log.jsonl`` and, if it exists, ``about.json`` of a run's folder."""
    head = _object(folder / "run.json")
    if head.get("format") != "denoising-vit/run":
        raise EvaluationError(f"{folder}: expected a run folder, found none")
    lines = _lines(folder / "log.jsonl")
    backbone = head.get("backbone")
    return RunRecord(
        title=_TITLES.get(str(head.get("stage")), str(head.get("stage"))),
        backbone=str(backbone.get("name", "-")) if isinstance(backbone, dict) else "-",
        settings=flat({key: value for key, value in head.items() if key not in ("format", "version", "stage")}),
        about=_object(folder / "about.json") if (folder / "about.json").is_file() else {},
        steps=[line for line in lines if line.get("kind") == "train"],
        looks=[line for line in lines if line.get("kind") == "held_out"],
    )


def best_look(looks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The evaluation with the highest cosine to the targets of the held-out images."""
    return max(looks, key=lambda look: look.get("cosine") or float("-inf"))


def _object(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: expected a record of a run ({error})") from error
    if not isinstance(found, dict):
        raise EvaluationError(f"{path}: expected a record of a run, found {type(found).__name__}")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a log in order, without incomplete lines."""
    found = []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise EvaluationError(f"{path}: expected the log of a run ({error})") from error
    for line in lines:
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


#: Held-out metrics: heading, key, and key of the same metric for raw features.
_COLUMNS = (
    ("cosine", "cosine", "raw_cosine"),
    ("1 - cosine of raw's", "ratio", None),
    ("MSE", "mse", "raw_mse"),
    ("effective rank", "rank", "raw_rank"),
    ("position, R²", "place", "raw_place"),
    ("position by neighbours, R²", "place_neighbours", "raw_place_neighbours"),
    ("blank images, variance left", "blank_variance", None),
    ("blank images, high frequencies left", "blank_detail", None),
    ("photos, variance left", "photo_variance", None),
    ("class token, 1 - cosine", "class_drift", None),
)

_NOTE = (
    "Metrics on held-out images against the target, raw features in parentheses; the last row is the target itself. "
    "The best cosine is bold."
)


def run_section(folder: Path) -> list[list[str]]:
    """Markdown section of a run: what was trained, and its evaluations on held-out images.

    Raises:
        EvaluationError: if it is not a run folder, or the run has no held-out evaluation.
    """
    run = read_run(folder)
    if not run.looks:
        raise EvaluationError(f"{folder}: expected a training run with a held-out evaluation, found none")
    listed = [plain(f"{key} {value}") for key, value in run.settings.items()]
    return [
        [f"### {plain(f'{run.title}: {folder.name}, {run.backbone}')}"],
        _table(run.looks),
        [_NOTE],
        [_provenance(run.about)],
        folded("Settings", [", ".join(listed)]),
    ]


def _table(looks: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = [column for column in _COLUMNS if any(column[1] in look for look in looks)]
    best = best_look(looks)
    rows = []
    for look in looks:
        cells = [_cell(look, key, raw) for _, key, raw in columns]
        rows.append([f"**{look['step']}**" if look is best else str(look["step"]), *cells])
    if any(f"target_{key}" in looks[-1] for _, key, _ in columns):
        rows.append(["target", *(_figure(looks[-1].get(f"target_{key}"), key) for _, key, _ in columns)])
    return table(["step", *(heading for heading, _, _ in columns)], rows)


def _cell(look: Mapping[str, Any], key: str, raw: str | None) -> str:
    beside = "" if raw is None or raw not in look else f" ({_figure(look[raw], key)})"
    return _figure(look.get(key), key) + beside


def _figure(value: float | None, key: str) -> str:
    return f"{value:.4f}" if key == "cosine" and value is not None else significant(value)


def _provenance(about: Mapping[str, Any]) -> str:
    command = code(about["command"]) if about.get("command") else "not recorded"
    shown = {"Hardware": about.get("hardware"), "Software": software_words(about)}
    return f"Command: {command}. " + " ".join(
        f"{key}: {plain(words or 'not recorded')}." for key, words in shown.items()
    )
