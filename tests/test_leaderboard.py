"""The leaderboard: bold differences, further columns, and the report below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from denoising_vit.cli import app
from denoising_vit.evaluation.tables import read_entries, report_markdown
from test_tables import KNN, PAIRED, SMALL, Line, denoised, line, rows, write

HEADING = f"### {SMALL} (bundled), layer none"


def text_of(folder: Path, *lines: Line) -> str:
    return report_markdown(read_entries([write(folder / "results.jsonl", *lines)]), leading=True)


def other(name: str, low: float | None, high: float | None, difference: float, **changes: Any) -> Line:
    return denoised(features=name, paired=PAIRED | {"difference": difference, "low": low, "high": high}, **changes)


def depth(features: str, rmse: float, paired: Line | None = None) -> Line:
    metrics = {"RMSE": rmse, "AbsRel": 0.1, "log10": 0.05, "a1": 84.0, "a2": 97.0, "a3": 99.0}
    settings = {"data": {"name": "nyu", "layout": "nyu", "digest": "d2"}}
    return line(settings, task="depth", features=features, metrics=metrics, seeds=[], classes=None, paired=paired)


def test_certain_differences_of_either_sign_are_bold(tmp_path: Path) -> None:
    worse = PAIRED | {"metric": "RMSE", "difference": -0.0321, "low": -0.05, "high": -0.01, "over": "scenes"}
    found = rows(
        text_of(
            tmp_path,
            line(),
            other("better", 0.2, 2.2, 1.2),
            other("alike", -0.1, 2.4, 1.2),
            other("touching", 0.0, 2.4, 1.2),
            depth("raw", 0.434),
            depth("better", 0.4019, worse | {"groups": 41}),
        ),
        HEADING,
    )
    assert found == [
        ["task", "raw", "better", "alike", "touching", "groups"],
        [
            "1. knn, camvid: mIoU",
            "36.70",
            "37.90 (**+1.20 [+0.20, +2.20]**)",
            "37.90 (+1.20 [-0.10, +2.40])",
            "37.90 (+1.20 [+0.00, +2.40])",
            "101 images",
        ],
        [
            "2. depth, nyu: RMSE, lower is better",
            "0.4340",
            "0.4019 (**-0.0321 [-0.0500, -0.0100]**)",
            "-",
            "-",
            "41 scenes",
        ],
    ]


def test_differences_without_an_interval_are_not_bold(tmp_path: Path) -> None:
    few = other("few", None, None, 9.0)
    few["paired"]["groups"] = 3
    found = rows(text_of(tmp_path, line(), few), HEADING)
    assert found[1] == ["1. knn, camvid: mIoU", "36.70", "37.90 (+9.00)", "3 images"]


def test_each_row_has_its_settings_reference_and_command(tmp_path: Path) -> None:
    text = text_of(tmp_path, line(), denoised(), line({"size": [518, 518]}))
    assert rows(text, HEADING)[2] == ["2. knn, camvid: mIoU (size 518 x 518)", "36.70", "-", ""]
    words = "against raw, 95 % interval over 101 images (jackknife t). Command: `dvit evaluate knn camvid`."
    assert f"\n1. camvid, {SMALL} (bundled): size 364 x 476; {words}\n2. camvid, {SMALL} (bundled): size 518 x" in text


def test_backbones_and_layers_have_separate_tables(tmp_path: Path) -> None:
    ninth = line({"backbone": {**KNN["settings"]["backbone"], "layer": 9}}, metrics=KNN["metrics"] | {"mIoU": 39.5})
    text = text_of(tmp_path, line(), ninth)
    assert rows(text, HEADING)[1:] == [["1. knn, camvid: mIoU (backbone.layer none)", "36.70", ""]]
    assert rows(text, f"### {SMALL} (bundled), layer 9")[1:] == [
        ["1. knn, camvid: mIoU (backbone.layer 9)", "39.50", ""]
    ]


def test_label_free_metrics_and_failures_are_not_on_the_leaderboard(tmp_path: Path) -> None:
    free = line(task="artifacts", metrics={"shared": 0.1}, seeds=[], classes=None)
    text = text_of(tmp_path, free, line(features="gone", failed="no file"))
    assert "No labelled task has been evaluated yet; run `dvit evaluate` first." in text
    found = rows(text_of(tmp_path, free, line(), denoised(failed="no file")), HEADING)
    assert found == [["task", "raw", "groups"], ["1. knn, camvid: mIoU", "36.70", ""]]


def test_report_puts_details_below_and_overwrites_its_own_page(tmp_path: Path) -> None:
    results, out = write(tmp_path / "results.jsonl", line(), denoised()), tmp_path / "page.md"
    plainly = report_markdown(read_entries([results]))
    for _ in range(2):
        assert app.run(["report", str(results), "--leaderboard", "-o", str(out)]) == 0
        text = out.read_text()
        head, details = plainly.split("\n## Nearest neighbours\n", 1)
        assert text.startswith(f"{head}\n## Leaderboard\n") and text.endswith(f"\n## Nearest neighbours\n{details}")
    assert app.run(["report", str(results), "-o", str(out)]) == 0
    assert out.read_text() == plainly


def test_a_picture_is_shown_below_the_leaderboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, picture = write(tmp_path / "results.jsonl", line(), denoised()), tmp_path / "maps of photos.png"
    shown = [str(results), "--picture", str(picture), "-o", str(tmp_path / "page.md")]
    assert app.run(["report", *shown, "--leaderboard"]) == 2
    assert f"--picture {picture}: expected an image file, together with --leaderboard" in capsys.readouterr().err
    picture.touch()
    assert app.run(["report", *shown]) == 2
    assert app.run(["report", *shown, "--leaderboard"]) == 0
    head, details = (
        (tmp_path / "page.md")
        .read_text()
        .split("\n\n![The same photos, by kind of features](<maps of photos.png>)\n\n")
    )
    assert "\n## Leaderboard\n" in head and details.startswith("## Nearest neighbours\n")
