"""How the figures of a section came about: on one line, whatever its entries have in common said once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from denoising_vit.evaluation.tables.entries import Entry
from denoising_vit.evaluation.tables.markdown import code, plain, readable
from denoising_vit.evaluation.tables.sections import Section, feature_settings

#: Skipped items that are named.
_SHOWN = 10


def settings_line(section: Section) -> str:
    """The settings that all rows share, and those of each row's features."""
    shared = ", ".join(f"{key} {value}" for key, value in section.settings.items())
    features = []
    for label, entry in section.rows:
        own = ", ".join(f"{key} {value}" for key, value in feature_settings(entry).items())
        features += [f"{label} ({own})"] if own else []
    parts = {"Settings": shared, "Features": "; ".join(features)}
    return " ".join(f"{name}: {plain(words)}." for name, words in parts.items() if words)


def provenance_line(section: Section) -> str:
    """Command, hardware, software, precision, images, seeds, and what was left out."""
    entries = [entry for _, entry in section.rows]
    commands = " and ".join(code(command) for command in dict.fromkeys(entry.command for entry in entries))
    parts = {
        "Hardware": _distinct(entry.hardware for entry in entries),
        "Software": _distinct(_pairs(entry.software.items()) for entry in entries),
        "Precision": _distinct(readable(entry.backbone.get("dtype", "not recorded")) for entry in entries),
        "Images": _distinct(", ".join(f"{n} {split}" for split, n in entry.images.items()) for entry in entries),
        "Seeds": _distinct(", ".join(str(seed) for seed, _ in entry.seeds) for entry in entries),
        "Skipped": _some([f"{item} ({reason})" for entry in entries for item, reason in entry.skipped]),
    }
    if section.task != "artifacts":  # which knows no classes
        parts["Never occurs in val, left out of the means"] = _absent(entries)
    return f"Command: {commands}. " + " ".join(f"{name}: {plain(words) or 'none'}." for name, words in parts.items())


def failed_lines(section: Section) -> list[str]:
    """A list of what failed, and why."""
    return [f"- failed: {plain(label)}: {plain(entry.failed or '')}" for label, entry in section.failed]


def _some(items: Sequence[str]) -> str:
    """The first of them, and how many more there are; the results file has them all."""
    items = list(dict.fromkeys(items))
    more = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return "; ".join([*items[:_SHOWN], *more])


def _absent(entries: Iterable[Entry]) -> str:
    return ", ".join(dict.fromkeys(name for entry in entries for name in entry.absent))


def _pairs(items: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {version}" for name, version in items)


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(value for value in values if value))
