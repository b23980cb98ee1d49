"""What a video is recorded to be made of and how, so that a run goes on only with what it began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from denoising_vit.backbones.recorded import same_weights
from denoising_vit.show.video.encoding import comment_of

#: Marks our records, with the version of their format.
_FORMAT = "denoising-vit/video 1"

#: What of a backbone does not decide its features, or is compared apart.
_INDIFFERENT = ("weights", "device", "fingerprint", "digest")


def make_record(source: str, settings: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """A record.

    Args:
        source: digest of the clip.
        settings: options that decide the frames.
        identity: of the features, with ``backbone`` as it is recorded.
    """
    record = {"format": _FORMAT, "source": source, "settings": settings, **identity}
    return json.loads(json.dumps(record))  # as it comes back from a file: tuples are lists there


def differences(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """What two records differ in, in words; none where frames made by either belong together."""
    found = ["another clip"] if theirs.get("source") != mine["source"] else []
    before = theirs.get("settings") or {}
    for name in sorted(before.keys() | mine["settings"].keys()):
        if before.get(name) != (now := mine["settings"].get(name)):
            found.append(f"{name} {before.get(name)}, now {now}")
    backbones = [dict(record.get("backbone") or {}) for record in (theirs, mine)]
    same = same_weights(*backbones)
    for backbone in backbones:
        for name in _INDIFFERENT:
            backbone.pop(name, None)
    if backbones[0] != backbones[1] or not same:
        found.append("another backbone or other weights")
    rest = (theirs.keys() | mine.keys()) - {"source", "settings", "backbone"}
    return found + [f"another {key}" for key in sorted(rest) if theirs.get(key) != mine.get(key)]


def parsed(text: str | None) -> dict[str, Any] | None:
    """The record in a text; None where that is something else."""
    try:
        record = json.loads(text or "")
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and record.get("format") == _FORMAT else None


def recorded_in(video: Path) -> dict[str, Any] | None:
    """The record in a finished video; None where that is not there, or none of ours."""
    return parsed(comment_of(video)) if video.is_file() else None
