"""Command, hardware and software of this process, for the records of results and runs."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


@functools.cache
def package_version() -> str:
    """Version of the installed package, else from ``pyproject.toml`` in a source checkout, else unknown."""
    try:
        return importlib.metadata.version("denoising-vit")
    except importlib.metadata.PackageNotFoundError:
        try:
            project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
            return project["version"] if project["name"] == "denoising-vit" else "unknown"
        except (OSError, ValueError, KeyError):
            return "unknown"


def run_info(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Command, hardware and software of this process; no host name, and no folders besides those in the command."""
    import torch

    return {
        "command": shlex.join(["dvit", *(sys.argv[1:] if command is None else command)]),
        "hardware": hardware(),
        "software": {
            "denoising-vit": package_version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def software_words(about: Mapping[str, Any]) -> str:
    """Description of the recorded software; empty if none was recorded."""
    return ", ".join(f"{name} {version}" for name, version in about.get("software", {}).items())


def hardware() -> str:
    """Description of processor and accelerator."""
    import torch

    kinds = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    fast = [name for name, ask in kinds.items() if getattr(torch.cpu, ask, lambda: False)()]
    words = f"{os.cpu_count()} CPU cores ({platform.machine()}{''.join(', ' + name for name in fast)})"
    if torch.cuda.is_available():
        words = f"{torch.cuda.get_device_name()}, {words}"
    return words
