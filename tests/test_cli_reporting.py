"""Progress in log files, and ``--quiet``."""

from __future__ import annotations

import pytest

from denoising_vit.cli.reporting import LogProgress, progress_bar, quiet


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_log_file_gets_at_most_one_line_per_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress_bar("photos", get_time=clock) as progress:
        task = progress.add_task("cat\\[1].jpg", total=1000)
        for _ in range(300):  # one photo a second
            clock.now += 1
            progress.advance(task)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "cat[1].jpg: 60 / 1,000 photos, 1 photos/s, 16 min left",
        "cat[1].jpg: 120 / 1,000 photos, 1 photos/s, 15 min left",
        "cat[1].jpg: 180 / 1,000 photos, 1 photos/s, 14 min left",
        "cat[1].jpg: 240 / 1,000 photos, 1 photos/s, 13 min left",
        "cat[1].jpg: 300 / 1,000 photos, 1 photos/s, 12 min left",
    ]


def test_log_lines_without_a_total_and_with_fields(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = progress_bar("steps, loss {task.fields[loss]}", get_time=clock)
    assert isinstance(progress, LogProgress)
    task = progress.add_task("", total=None, loss="-")
    clock.now = 61
    progress.update(task, completed=7, loss="0.250")
    assert capsys.readouterr().err == "7 steps, loss 0.250\n"


def test_log_line_starts_with_the_prefix_of_the_items(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = progress_bar("raw: images", get_time=clock)
    task = progress.add_task("", total=300)
    clock.now = 61
    progress.update(task, completed=61)
    assert capsys.readouterr().err.startswith("raw: 61 / 300 images")


@pytest.mark.parametrize("shown", [True, False])
def test_nothing_is_shown_when_quiet(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with quiet(shown), progress_bar("photos", shown=shown, get_time=clock) as progress:
        task = progress.add_task("", total=2)
        clock.now = 100
        progress.advance(task)
    assert capsys.readouterr() == ("", "")
