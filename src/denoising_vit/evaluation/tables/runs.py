"""Tables of training runs, from what their folders recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.tables.markdown import code, flat, folded, plain, significant, table

_HEADINGS = {"denoiser": "One-pass denoiser", "distillation": "Distilled ViT"}

#: Figures of a look at held-out images: heading, key of what was trained, and of raw features beside it.
_COLUMNS = (
    ("cosine", "cosine", "raw_cosine"),
    ("1 - cosine of raw's", "ratio", None),
    ("MSE", "mse", "raw_mse"),
    ("effective rank", "rank", "raw_rank"),
    ("place, R²", "place", "raw_place"),
    ("place by neighbours, R²", "place_neighbours", "raw_place_neighbours"),
    ("class token, 1 - cosine", "class_drift", None),
)

_NOTE = (
    "Held-out images against the target; in parentheses raw features, in the last row the target's own figures. "
    "Best by cosine in bold."
)


def run_section(folder: Path) -> list[list[str]]:
    """A run: what was trained on what, and its looks at the held-out images, in Markdown.

    Args:
        folder: of the run, with ``run.json``, ``log.jsonl``, and ``about.json`` where the run wrote one.

    Raises:
        EvaluationError: if it is no folder of a run, or the run never looked at its held-out images.
    """
    head, looks = _object(folder / "run.json"), _looks(folder / "log.jsonl")
    if head.get("format") != "denoising-vit/run" or not looks:
        raise EvaluationError(f"{folder}: expected the folder of a run with a look at its held-out images, found none")
    title = _HEADINGS.get(str(head.get("stage")), str(head.get("stage")))
    backbone = head.get("backbone", {}).get("name", "-")
    settings = {key: value for key, value in head.items() if key not in ("format", "version", "stage")}
    listed = [plain(f"{key} {value}") for key, value in flat(settings).items()]
    return [
        [f"### {plain(f'{title}: {folder.name}, {backbone}')}"],
        _table(looks),
        [_NOTE],
        [_provenance(folder)],
        folded("Settings", [", ".join(listed)]),
    ]


def _table(looks: list[dict[str, Any]]) -> list[str]:
    columns = [column for column in _COLUMNS if any(column[1] in look for look in looks)]
    best = max(looks, key=lambda look: look.get("cosine") or float("-inf"))
    rows = []
    for look in looks:
        cells = [_cell(look, key, raw) for _, key, raw in columns]
        rows.append([f"**{look['step']}**" if look is best else str(look["step"]), *cells])
    target = [_figure(looks[-1].get(f"target_{key}"), key) for _, key, _ in columns]
    if any(f"target_{key}" in looks[-1] for _, key, _ in columns):
        rows.append(["target", *target])
    return table(["step", *(heading for heading, _, _ in columns)], rows)


def _cell(look: Mapping[str, Any], key: str, raw: str | None) -> str:
    beside = "" if raw is None or raw not in look else f" ({_figure(look[raw], key)})"
    return _figure(look.get(key), key) + beside


def _figure(value: float | None, key: str) -> str:
    return f"{value:.4f}" if key == "cosine" and value is not None else significant(value)


def _provenance(folder: Path) -> str:
    about = _object(folder / "about.json") if (folder / "about.json").is_file() else {}
    software = ", ".join(f"{name} {version}" for name, version in about.get("software", {}).items())
    command = code(about["command"]) if about.get("command") else "not recorded"
    told = {"Hardware": about.get("hardware"), "Software": software}
    return f"Command: {command}. " + " ".join(
        f"{key}: {plain(words or 'not recorded')}." for key, words in told.items()
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: expected a record of a run ({error})") from error
    if not isinstance(found, dict):
        raise EvaluationError(f"{path}: expected a record of a run, found {type(found).__name__}")
    return found


def _looks(path: Path) -> list[dict[str, Any]]:
    """Looks at held-out images, in their order; lines that a crash cut off are passed over."""
    found = []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise EvaluationError(f"{path}: expected the log of a run ({error})") from error
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("kind") == "held_out" and isinstance(entry.get("step"), int):
            found.append(entry)
    return found
