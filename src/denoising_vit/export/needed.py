"""Packages that only some exports need, imported where they are used."""

from __future__ import annotations

from typing import Any

from denoising_vit import files as extras
from denoising_vit.errors import ExportError


def needed(package: str, extra: str) -> Any:
    """Imports a package of an extra.

    Raises:
        ExportError: if it is not installed, naming the extra.
    """
    return extras.needed(package, extra, ExportError)
