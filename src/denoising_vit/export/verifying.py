"""verify_export: whether an export is what it was, and still computes what PyTorch did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from denoising_vit.errors import ExportError
from denoising_vit.export.comparison import INT8_SLACK, Comparison, compare, record
from denoising_vit.export.exporting import FORMAT, FORMAT_VERSION, META, REFERENCE
from denoising_vit.export.running import runner
from denoising_vit.files import file_digest


@dataclass(frozen=True)
class Verdict:
    """What checking an export found.

    Attributes:
        kind: its format.
        comparison: how far it is from PyTorch; None where it gave other shapes.
        problems: what is wrong, in words; empty for a sound export.
    """

    kind: str
    comparison: Comparison | None
    problems: tuple[str, ...]


def verify_export(path: str | Path) -> Verdict:
    """Compares an export with what was recorded when it was made: digests of files, and features of fixed images.

    Args:
        path: its folder, or a file in it.

    Raises:
        ExportError: if it is no export of ours, or cannot be run at all.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    meta = _read(path, folder)
    problems = [*_changed(folder, meta)]
    if problems:  # files that are not what they were are not loaded
        return Verdict(meta["format_of_files"], None, tuple(problems))
    options, check = meta["options"], meta["check"]
    reference = _reference(folder)
    run = runner(folder, meta["format_of_files"], int8=options["int8"])
    found = compare(reference, record(run, check["sizes"], pixels=options["pixels"]))
    return Verdict(meta["format_of_files"], found, tuple(_apart(found, meta)))


def _read(path: Path, folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / META).read_text())
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path}: no export, or damaged: expected a folder of `dvit export` with {META} in it ({error})"
        ) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ExportError(f"{folder / META}: not the record of an export (no {FORMAT!r} in it)")
    version = meta.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ExportError(
            f"{folder / META}: written in format version {version}, this release reads up to {FORMAT_VERSION}; "
            "upgrade denoising-vit"
        )
    parts = {"format_of_files": str, "options": dict, "check": dict, "files": dict}
    if lacking := [key for key, kind in parts.items() if not isinstance(meta.get(key), kind)]:
        raise ExportError(f"{folder / META}: damaged record, it lacks {', '.join(lacking)}")
    return meta


def _changed(folder: Path, meta: dict[str, Any]) -> list[str]:
    """Files that are missing, or have other digests than they had."""
    problems = []
    for name, digest in {**meta["files"], REFERENCE: meta["check"].get("digest")}.items():
        path = folder / Path(name).name  # never outside the folder
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif (found := file_digest(path)) != digest:
            problems.append(
                f"{path}: not the file that was exported (SHA-256 {found[:12]}..., was {str(digest)[:12]}...)"
            )
    return problems


def _reference(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / REFERENCE)
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{folder / REFERENCE}: damaged ({error})") from error


def _apart(found: Comparison | None, meta: dict[str, Any]) -> list[str]:
    check = meta["check"]
    if found is None:
        return ["features of other shapes than when it was made, or not finite"]
    if meta["options"]["int8"]:
        least = check["cosine"] - INT8_SLACK
        return [] if found.cosine >= least else [f"mean cosine {found.cosine:.4f}, expected at least {least:.4f}"]
    allowed = check["tolerance"]
    return [] if found.relative <= allowed else [f"features {found.difference:.2g} apart, at most {allowed:g} expected"]
