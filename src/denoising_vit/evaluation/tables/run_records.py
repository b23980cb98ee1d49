"""What the folder of a training run recorded: what it is, how it came about, and its log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.tables.markdown import flat

_TITLES = {"denoiser": "One-pass denoiser", "distillation": "Distilled ViT"}


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells of it.

    Attributes:
        title: what is trained.
        backbone: whose features.
        settings: what decides the run, by names such as ``options.steps``.
        about: command, hardware and software, where the run wrote them.
        steps: lines of the log of single steps, in their order.
        looks: lines of the log of looks at held-out images, in their order.
    """

    title: str
    backbone: str
    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    looks: Sequence[Mapping[str, Any]]


def read_run(folder: Path) -> RunRecord:
    """The record of a run, with ``run.json``, ``log.jsonl``, and ``about.json`` where the run wrote one.

    Raises:
        EvaluationError: if it is no folder of a run.
    """
    head = _object(folder / "run.json")
    if head.get("format") != "denoising-vit/run":
        raise EvaluationError(f"{folder}: expected the folder of a run, found none")
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
    """The look at which held-out images were nearest to their targets."""
    return max(looks, key=lambda look: look.get("cosine") or float("-inf"))


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: expected a record of a run ({error})") from error
    if not isinstance(found, dict):
        raise EvaluationError(f"{path}: expected a record of a run, found {type(found).__name__}")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a log, in their order; those that a crash cut off are passed over."""
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
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found
