"""Packages that only some exports need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from denoising_vit.errors import ExportError


def needed(package: str, extra: str) -> Any:
    """Imports a package of an extra.

    Raises:
        ExportError: if it is not installed, naming the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f"this needs {package}: install the extra `{extra}` (pip install '.[{extra}]' in a clone of denoising-vit)"
        ) from error
