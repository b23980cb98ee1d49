"""The check of recorded calls: it finds what a power cut could lose, and nothing else."""

from __future__ import annotations

import pytest

import flushes


def calls(*lines: str) -> list[list[str]]:
    """Calls from lines such as "rename a b"."""
    return [[str(number), *line.split(), ""][:4] for number, line in enumerate(lines, 1)]


WRITTEN = ("open /o/.a.part", "write /o/.a.part")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((*WRITTEN, "fsync /o/.a.part", "rename /o/.a.part /o/a", "fsync /o"), []),
        ((*WRITTEN, "rename /o/.a.part /o/a", "fsync /o"), ["/o/a got its name before its content was flushed"]),
        (
            ("fsync /o/.a.part", *WRITTEN, "rename /o/.a.part /o/a", "fsync /o"),
            ["/o/a got its name before its content was flushed"],
        ),
        (
            (*WRITTEN, "fsync /o/.a.part", "fsync /o", "link /o/.a.part /o/a"),
            ["the folder of /o/a was not flushed after it"],
        ),
        (("mkdir /o/new",), ["the folder of /o/new was not flushed after it was made"]),
        (("write /o/a",), ["/o/a was written and not flushed"]),
        (("write /o/log.jsonl", "rename /o/leases/.x.part /o/leases/x"), []),
    ],
)
def test_losses_of_a_file(lines: tuple[str, ...], expected: list[str]) -> None:
    assert flushes.losses(calls(*lines)) == expected


def test_every_file_of_a_folder_is_flushed_before_the_folder_is_renamed() -> None:
    written = ("mkdir /o/.m.part", "write /o/.m.part/a", "write /o/.m.part/.b.part")
    named = ("fsync /o/.m.part/.b.part", "rename /o/.m.part/.b.part /o/.m.part/b", "fsync /o/.m.part")
    last = ("fsync /o/.m.part", "rename /o/.m.part /o/m", "fsync /o")
    lost = ["/o/m got its name before its content was flushed"]
    assert flushes.losses(calls(*written, *named, *last)) == lost
    assert flushes.losses(calls(*written, *named, "fsync /o/.m.part/a", *last)) == lost  # b has a new name
    assert flushes.losses(calls(*written, *named, "fsync /o/.m.part/a", "fsync /o/.m.part/b", *last)) == []
