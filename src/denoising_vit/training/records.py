"""Records of what decides a run or its pairs: JSON objects, and how two of them differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: What earlier versions did not record; where it is not told, it is not compared, so that what they made stays valid.
_ADDED = frozenset({"targets.photos", "backbone.digest", "backbone.mean", "backbone.std"})


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where it holds none."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def differences(there: dict[str, Any], here: dict[str, Any], path: str = "") -> list[str]:
    """Each value in which a record that is there differs from that of now, with both sides."""
    found = []
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{path}{name}.")
        elif old != new and (name in there or f"{path}{name}" not in _ADDED):
            found.append(f"{path}{name} was {_short(old)}, now {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
