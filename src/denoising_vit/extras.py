"""Packages that only some uses need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from denoising_vit.errors import DenoisingVitError


def needed(package: str, extra: str, error: type[DenoisingVitError]) -> Any:
    """Imports a package of an extra.

    Raises:
        DenoisingVitError: of the type that is given, if it is not installed, naming the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as missing:
        raise error(
            f"this needs {package}: install the extra `{extra}` (pip install '.[{extra}]' in a clone of denoising-vit)"
        ) from missing
