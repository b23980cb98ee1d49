"""Options whose numbers are out of range are refused by name."""

from __future__ import annotations

import math
from typing import Any

from denoising_vit.errors import PlanError


def at_least(options: Any, **least: int) -> None:
    """Raises PlanError unless each named option is this number or more."""
    for name, number in least.items():
        if getattr(options, name) < number:
            raise PlanError(f"{name} must be at least {number}, got {getattr(options, name)}")


def positive(options: Any, *names: str) -> None:
    """Raises PlanError unless each named option is a positive number."""
    for name in names:
        if not 0 < getattr(options, name) < math.inf:
            raise PlanError(f"{name} must be a positive number, got {getattr(options, name)}")
