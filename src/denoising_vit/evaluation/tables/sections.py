"""Sections of the report: entries that differ in their features only, and their provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from denoising_vit.evaluation.tables.entries import Entry, canonical
from denoising_vit.evaluation.tables.markdown import code, differing, flat, plain, readable

#: Features that come first, whatever the order of the lines.
FIRST = "raw"


#: Settings that a heading names in any case.
_IN_TITLE = ("data.name", "backbone.name", "backbone.weights")


@dataclass(frozen=True)
class Section:
    """Records that differ in their features only.

    Attributes:
        task: what was evaluated.
        title: data, backbone, and what tells it from other sections of these.
        settings: dotted name to value, without those of the features and those that every title names.
        rows: label of the features, unique within the section, and their entry; raw features first.
    """

    task: str
    title: str
    settings: Mapping[str, str]
    rows: tuple[tuple[str, Entry], ...]

    @property
    def measured(self) -> list[tuple[str, Entry]]:
        """Rows that have figures."""
        return [(label, entry) for label, entry in self.rows if entry.failed is None]

    @property
    def failed(self) -> list[tuple[str, Entry]]:
        """Rows that have a reason instead of figures."""
        return [(label, entry) for label, entry in self.rows if entry.failed is not None]


def sections(entries: Sequence[Entry]) -> list[Section]:
    """Sections in the order in which they first appear."""
    groups = grouped(entries)
    titles = section_titles(groups)
    return [
        Section(group[0].task, title, _settings(group[0], ("features",)), _rows(group))
        for group, title in zip(groups, titles, strict=True)
    ]


def grouped(entries: Sequence[Entry], without: Sequence[str] = ("features",)) -> list[list[Entry]]:
    """Records whose task and settings are the same but for some settings."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(canonical([entry.task, _kept(entry.settings, without)]), []).append(entry)
    return list(groups.values())


def section_titles(groups: Sequence[Sequence[Entry]], without: Sequence[str] = ("features",)) -> list[str]:
    """A title for each group; where several have the same data and backbone, with the settings that differ."""
    titles: dict[int, str] = {}
    alike: dict[tuple[str, str], list[int]] = {}
    for index, group in enumerate(groups):
        alike.setdefault((group[0].task, data_title(group[0])), []).append(index)
    for (_, title), indices in alike.items():
        labels = differing(_told([groups[index][0] for index in indices], without))
        titles |= {index: f"{title}: {label}" if label else title for index, label in zip(indices, labels, strict=True)}
    return [titles[index] for index in range(len(groups))]


def _told(entries: Sequence[Entry], without: Sequence[str]) -> list[dict[str, str]]:
    """Settings as people tell data sets apart: by how many images, and by digests only where that does not do."""
    told = [_settings(entry, without) for entry in entries]
    sizes = [", ".join(f"{count} {split}" for split, count in entry.images.items()) for entry in entries]
    digests = [each.get("data.digest") for each in told]
    if len(set(zip(digests, sizes, strict=True))) == len(set(sizes)) == len(set(digests)):
        told = [{key: value for key, value in each.items() if key != "data.digest"} for each in told]
        told = [each | {"images": size} for each, size in zip(told, sizes, strict=True)]
    return told


def data_title(entry: Entry) -> str:
    """What every title begins with: data and backbone."""
    return f"{entry.data}, {entry.backbone['name']} ({readable(entry.backbone.get('weights'))})"


def _kept(settings: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in without}


def _settings(entry: Entry, without: Sequence[str]) -> dict[str, str]:
    found = flat(_kept(entry.settings, without))
    return {key: value for key, value in found.items() if key not in _IN_TITLE}


def feature_settings(entry: Entry) -> dict[str, str]:
    """What the features depend on; empty where their name says all."""
    found = entry.settings.get("features")
    return flat(found) if isinstance(found, dict) else {}


def _rows(group: Sequence[Entry]) -> tuple[tuple[str, Entry], ...]:
    """Features of one name that were made in several ways are told apart by what differs."""
    by_name: dict[str, list[Entry]] = {}
    for entry in group:
        by_name.setdefault(entry.features, []).append(entry)
    labels: dict[str, str] = {}
    for name, entries in by_name.items():
        for entry, label in zip(entries, differing([feature_settings(entry) for entry in entries]), strict=True):
            labels[entry.key] = f"{name} ({label})" if label else name
    ordered = sorted(group, key=lambda entry: entry.features != FIRST)
    return tuple((labels[entry.key], entry) for entry in ordered)


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
