"""Tables from results files: exact cells, replaced lines, reported failures, and reproducible output."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from denoising_vit.cli import app
from denoising_vit.errors import EvaluationError, FormatError
from denoising_vit.evaluation.tables import parse_entry, read_entries, report_markdown
from denoising_vit.evaluation.tables.markdown import code, differing, flat, plain, readable, signed
from denoising_vit.evaluation.tables.sections import ARTIFACT_LABELS
from denoising_vit.metrics.artifacts import ArtifactMetrics

Line = dict[str, Any]

SMALL = "vit_small_patch14_dinov2.lvd142m"
SETTINGS: Line = {
    "data": {"name": "camvid", "layout": "folders", "digest": "d1"},
    "backbone": {"name": SMALL, "weights": "bundled", "fingerprint": "ab12", "dtype": "float32"},
    "features": {},
    "size": [364, 476],
    "crops": "whole",
    "k": 20,
}
KNN: Line = {
    "task": "knn",
    "features": "raw",
    "metrics": {"mIoU": 36.704, "mAcc": 50.1, "aAcc": 80.25},
    "seeds": [{"seed": 0, "mIoU": 36.5, "mAcc": 50, "aAcc": 80}, {"seed": 3, "mIoU": 36.908, "mAcc": 50, "aAcc": 80}],
    "classes": {"sky": {"IoU": 90.1, "Acc": 95.0}, "fence": {"IoU": None, "Acc": None}},
    "paired": None,
    "images": {"train": 184, "val": 101},
    "skipped": [],
    "absent": [],
    "settings": SETTINGS,
    "failed": None,
    "seconds": 12.34,
    "run": {"command": "dvit evaluate knn camvid", "hardware": "2 cores", "software": {"torch": "2.15"}, "seed": 0},
    "published": None,
}
PAIRED: Line = {
    "against": "raw",
    "metric": "mIoU",
    "difference": 1.2,
    "low": -0.001,
    "high": 2.4,
    "over": "images",
    "groups": 101,
    "method": "jackknife t",
}


def line(settings: Line | None = None, **changes: Any) -> Line:
    found = copy.deepcopy(KNN) | changes
    found["settings"] = found["settings"] | (settings or {})
    return found


def denoised(settings: Line | None = None, **changes: Any) -> Line:
    metrics = {"mIoU": 37.904, "mAcc": 51.0, "aAcc": 81.0}
    return line(settings, **{"features": "denoised", "metrics": metrics, "seeds": [], "paired": PAIRED} | changes)


def segmentation(settings: Line | None = None, **changes: Any) -> Line:
    return line(settings, **{"task": "segmentation"} | changes)


Render = Callable[..., str]


@pytest.fixture
def render(tmp_path: Path) -> Render:
    """Writes lines to a results file and returns its report."""

    def call(*lines: Line | str) -> str:
        return report_markdown(read_entries([write(tmp_path / "results.jsonl", *lines)]))

    return call


def write(path: Path, *lines: Line | str) -> Path:
    path.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in lines))
    return path


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, without the separator row."""
    lines = text.split(f"\n{heading}\n", 1)[1].splitlines()
    start = next(index for index, each in enumerate(lines) if each.startswith("|"))
    end = next((index for index in range(start, len(lines)) if not lines[index].startswith("|")), len(lines))
    return [[cell.strip() for cell in each.strip("|").split(" | ")] for each in (lines[start], *lines[start + 2 : end])]


TITLE = f"### camvid, {SMALL} (bundled)"


def test_scores_have_spread_and_difference_and_raw_comes_first(render: Render) -> None:
    assert rows(render(denoised(), line()), TITLE) == [
        ["features", "mIoU", "mAcc", "aAcc", "spread over seeds", "difference (95 % interval)", "seconds"],
        ["raw", "36.70", "50.10", "80.25", "0.41", "-", "12.3"],
        ["denoised", "37.90", "51.00", "81.00", "-", "+1.20 [+0.00, +2.40]", "12.3"],
    ]


def test_differences_are_explained_once_or_for_each_source(render: Render) -> None:
    words = "mIoU minus that of raw, 95 % interval over 101 images (jackknife t)."
    assert f"\nDifference: {words}\n" in render(line(), denoised())
    other = denoised(features="other", paired=PAIRED | {"groups": 50})
    text = render(line(), denoised(), other)
    assert f"Difference of denoised: {words}" in text
    assert "Difference of other: mIoU minus that of raw, 95 % interval over 50 images (jackknife t)." in text
    assert "Difference" not in render(line())


def test_too_few_groups_and_older_intervals_show_only_the_difference(render: Render) -> None:
    few = denoised(paired=PAIRED | {"low": None, "high": None, "groups": 3})
    text = render(line(), few)
    assert rows(text, TITLE)[2][5] == "+1.20"
    assert "no interval: 3 images, at least 5 are needed." in text
    old = {key: value for key, value in PAIRED.items() if key not in ("groups", "method")} | {"draws": 1000}
    text = render(line(), denoised(paired=old))
    assert rows(text, TITLE)[2][5] == "+1.20"
    assert "interval of an older version not shown; evaluate again" in text


def test_one_seed_has_no_spread(render: Render) -> None:
    assert rows(render(line(seeds=KNN["seeds"][:1])), TITLE)[1][4] == "-"


def test_later_line_replaces_the_earlier_one(render: Render) -> None:
    again = denoised(metrics={"mIoU": 1.0, "mAcc": 2.0, "aAcc": None}, seconds=None)
    found = rows(render(denoised(), denoised(features="other"), line(), again), TITLE)
    assert [row[0] for row in found[1:]] == ["raw", "denoised", "other"]
    assert found[2][1:4] == ["1.00", "2.00", "-"]
    assert found[2][-1] == "-"


def test_order_of_settings_does_not_matter(render: Render) -> None:
    again = line() | {"settings": dict(reversed(SETTINGS.items())), "seconds": 1.0}
    assert [row[-1] for row in rows(render(line(), again), TITLE)] == ["seconds", "1.0"]


def test_different_settings_make_sections_that_say_what_differs(render: Render) -> None:
    text = render(line(), line({"k": 5}), line({"temperature": 0.07}))
    for label in ("k 20, temperature none", "k 5, temperature none", "k 20, temperature 0.07"):
        assert f"\n{TITLE}: {label}\n" in text
    assert "k 20" not in next(each for each in render(line()).splitlines() if each.startswith("###"))


def test_features_with_the_same_name_are_labelled_by_their_settings(render: Render) -> None:
    one, two = ({"features": {"artifact": name, "views": 64}} for name in ("g1", "g2"))
    text = render(line(), denoised(one), denoised(two))
    assert [row[0] for row in rows(text, TITLE)[1:]] == ["raw", "denoised (artifact g1)", "denoised (artifact g2)"]
    assert "Features: denoised (artifact g1) (artifact g1, views 64); denoised (artifact g2) (artifact g2" in text


def test_an_overview_has_features_by_size_and_crops(render: Render) -> None:
    native: Line = {"size": "native", "crops": "neutral"}
    failing = denoised(native, features="other", failed="out of memory")
    differing_metric = denoised(native, paired=PAIRED | {"metric": "mAcc"})
    text = render(denoised(), line(), line(native), differing_metric, failing)
    assert rows(text, f"### Overview: camvid, {SMALL} (bundled)") == [
        ["features", "364 x 476, whole", "native, neutral"],
        ["raw", "36.70", "36.70"],
        ["denoised", "37.90 (+1.20)", "37.90"],
        ["other", "-", "failed"],
    ]


def test_overview_notes_different_settings_of_features(render: Render) -> None:
    native: Line = {"size": "native", "crops": "neutral"}
    small: Line = {"size": [140, 140]}
    usual, other = {"features": {"views": 32}}, {"features": {"views": 32, "of": "image"}}
    text = render(line(), line(native), line(small), denoised(usual), denoised(native | other), denoised(small | usual))
    overview = text.split("### Overview", 1)[1].split("###", 1)[0]
    assert "\n\n- denoised, native, neutral: of image\n" in overview
    assert overview.count("\n- ") == 1


def test_a_single_setting_and_other_tasks_have_no_overview(render: Render) -> None:
    assert "Overview" not in render(line(), denoised())
    assert "Overview" not in render(segmentation(), segmentation({"size": "native"}))
    assert "Overview" not in render(line(), line({"size": "native", "k": 5}))  # more than size and crops differ


def test_iou_of_each_class_is_in_a_collapsed_table(render: Render) -> None:
    text = render(line(), denoised(classes={"sky": {"IoU": 91.0}, "car": {"IoU": 5.126}}))
    assert "<summary>IoU of each class</summary>\n\n| class | raw | denoised |" in text
    assert rows(text, "<summary>IoU of each class</summary>")[1:] == [
        ["sky", "90.10", "91.00"],
        ["fence", "-", "-"],
        ["car", "-", "5.13"],
    ]


def test_curves_are_shown_where_they_were_measured(render: Render) -> None:
    curve = [[100, 2.0, 10.0], [150, 1.5, None], [200, 1.0, 20.0]]
    text = render(segmentation(curve=curve), segmentation(features="denoised", curve=[[200, 0.9, 22.0]]))
    section = text.split("## Segmentation by a trained head", 1)[1]
    start = section.index("| mIoU at step")
    assert section[start:].splitlines()[:4] == [
        "| mIoU at step (first seed) | raw | denoised |",
        "| ---: | ---: | ---: |",
        "| 100 | 10.00 | - |",
        "| 200 | 20.00 | 22.00 |",
    ]
    assert "mIoU at step" not in render(segmentation(curve=[[1, 2.0, None]]))


def test_artifact_table_has_a_row_per_metric_and_a_column_per_source(render: Render) -> None:
    raw = {"shared": 0.12345, "effective_rank": 212.4, "leakage": None, "novel": 1.0}
    cleaned = {"shared": 0.01, "effective_rank": 220.0, "leakage": 0.5}
    both = [
        line(task="artifacts", features=name, metrics=metrics, seeds=[], classes=None)
        for name, metrics in (("raw", raw), ("cleaned", cleaned))
    ]
    assert rows(render(*both), TITLE) == [
        ["", "raw", "cleaned"],
        ["same in all photos (energy)", "0.123", "0.01"],
        ["leakage of empty images", "-", "0.5"],
        ["effective rank", "212", "220"],
        ["novel", "1", "-"],
        ["seconds", "12.3", "12.3"],
    ]


def test_every_artifact_metric_has_a_label() -> None:
    assert list(ARTIFACT_LABELS) == [field.name for field in dataclasses.fields(ArtifactMetrics)]


def test_provenance_is_complete_and_names_shared_values_once(render: Render) -> None:
    run = KNN["run"] | {"hardware": "one GPU"}
    text = render(line(skipped=[["a.png", "truncated"]], absent=["bicyclist"]), denoised(run=run, absent=["bicyclist"]))
    assert (
        "Command: `dvit evaluate knn camvid`. Hardware: 2 cores; one GPU. Software: torch 2.15. Precision: float32."
        " Images: 184 train, 101 val. Seeds: 0, 3; 0. Skipped: a.png (truncated)."
        " Never occurs in val, left out of the means: bicyclist."
    ) in text.splitlines()
    assert "Skipped: none. Never occurs in val, left out of the means: none." in render(line())
    assert (
        "Settings: data.layout folders, data.digest d1, backbone.fingerprint ab12, backbone.dtype float32,"
        " size 364 x 476, crops whole, k 20."
    ) in text.splitlines()


def test_only_the_first_of_many_skipped_items_are_named(render: Render) -> None:
    skipped = [[f"{index}.png", "truncated"] for index in range(12)]
    text = render(line(skipped=skipped), denoised(skipped=skipped))
    assert "; 9.png (truncated); and 2 more. Never" in text
    assert "and" not in render(line(skipped=skipped[:10])).split("9.png", 1)[1].splitlines()[0]


def test_results_without_classes_do_not_mention_absent_classes(render: Render) -> None:
    text = render(line(task="artifacts", metrics={"shared": 0.1}, seeds=[]))
    assert " Seeds: 0. Skipped: none." in text
    assert "Never occurs" not in text


def test_failures_are_listed_with_their_reason_and_have_no_row(render: Render) -> None:
    text = render(line(), denoised(failed="not finite", metrics=None))
    assert "- failed: denoised: not finite" in text.splitlines()
    assert [row[0] for row in rows(text, TITLE)[1:]] == ["raw"]
    alone = render(line(failed="no images"))
    assert "- failed: raw: no images" in alone.splitlines()
    assert "| features |" not in alone


def test_measured_scores_are_next_to_published_ones(render: Render) -> None:
    voc = {"data": {"name": "voc2012", "layout": "voc"}}
    text = render(
        segmentation(voc, published={"model": SMALL, "variant": "baseline"}),
        segmentation(voc | {"size": 518}, published={"model": SMALL, "variant": "baseline"}),
        segmentation({"data": {"name": "ADE20K"}}, published={"model": SMALL, "variant": "voc_denoised"}),
    )
    head, *found = rows(text, "### VOC")
    assert head[2:] == ["mIoU published", "mIoU measured", "mAcc published", "mAcc measured", "measured as"]
    assert found[:3] == [
        [SMALL, "baseline", "81.78", "36.70", "88.44", "50.10", "raw (size 364 x 476, crops whole)"],
        [SMALL, "baseline", "81.78", "36.70", "88.44", "50.10", "raw (size 518, crops whole)"],
        [SMALL, "voc_denoised", "82.78", "-", "90.69", "-", "-"],
    ]
    assert len(found) == 35
    ade = rows(text, "### ADE20K")[1:]
    assert ade[1] == [SMALL, "voc_denoised", "45.14", "36.70", "56.35", "50.10", "raw (size 364 x 476, crops whole)"]
    assert len(ade) == 34
    assert rows(text, "### NYU depth")[1][2:] == ["0.4340", "-", "0.1331", "-", "84.49", "-", "-"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "knn"}, "expected the published task segmentation, got knn"),
        ({"published": {"model": SMALL, "variant": "x"}}, "with published scores (baseline, voc_denoised), got 'x'"),
        ({}, "expected a data set named VOC, ADE20K, NYU depth, got camvid"),
    ],
)
def test_measurements_without_a_published_score_are_listed(render: Render, changes: Line, reason: str) -> None:
    data = {"data": {"name": "voc2012"}} if "task" in changes else None
    text = render(segmentation(data, **{"published": {"model": SMALL, "variant": "baseline"}} | changes))
    assert reason in next(each for each in text.splitlines() if each.startswith("- not compared: "))
    assert {row[3] for row in rows(text, "### VOC")[1:]} == {"-"}


def test_names_cannot_break_a_table(render: Render) -> None:
    text = render(line(features="a|b\n<i>", classes={"road|lane": {"IoU": 1.0}}))
    assert r"| a\|b &lt;i&gt; |" in text
    assert r"| road\|lane | 1.00 |" in text


def test_same_lines_give_an_identical_report(tmp_path: Path) -> None:
    lines = [line(), denoised(), segmentation(), line({"size": "native"})]
    shuffled = [dict(reversed(each.items())) for each in lines]  # the order of keys does not matter
    texts = [
        report_markdown(read_entries([write(tmp_path / "a.jsonl", *each), write(tmp_path / "b.jsonl", *each)]))
        for each in (lines, lines, shuffled)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].startswith("# Results\n\nGenerated by `dvit report` from `a.jsonl`, `b.jsonl`;")
    assert str(tmp_path) not in texts[0]
    assert texts[0].endswith("|\n")


BROKEN = {
    "cut off": ('{"task": "knn"', "not JSON"),
    "not a number": ('{"seconds": NaN}', "NaN is not a JSON number"),
    "no object": ("[1]", r"the line: expected an object, got \[1\]"),
    "no task": ("{}", "task is missing; expected a line written by `dvit evaluate`"),
    "other task": (line(task="detection"), 'task: expected one of knn, segmentation, .*, artifacts, got "detection"'),
    "no score": (line(metrics={"mIoU": 1.0, "mAcc": 1.0}), "metrics.aAcc is missing"),
    "text": (line(metrics=KNN["metrics"] | {"mIoU": "36"}), 'metrics.mIoU: expected a valid number, got "36"'),
    "no data": (line({"data": {}}), "settings.data.name is missing"),
    "no run": (line(run={}), "run.command is missing"),
    "point": (line(curve=[[1, 2]]), r"curve.0.2 is missing"),
    "skipped": (line(skipped=["a.png"]), 'skipped.0: expected a valid tuple, got "a.png"'),
    "seed": (line(seeds=[{"seed": True}]), "seeds.0.seed: expected a valid integer, got true"),
    "interval": (line(paired={**PAIRED, "low": "0"}), 'paired.low: expected a valid number, got "0"'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_line_is_skipped_and_reported(tmp_path: Path, name: str) -> None:
    broken, reason = BROKEN[name]
    found = read_entries([write(tmp_path / "results.jsonl", "", broken, denoised())])
    assert [entry.features for entry in found.entries] == ["denoised"]
    (only,) = found.broken
    assert (only.file.name, only.line) == ("results.jsonl", 2)
    assert re.search(reason, only.reason)
    assert "\n## Lines that could not be used\n\n- results.jsonl:2: " in report_markdown(found)


def test_bytes_that_are_not_text_invalidate_only_their_line(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"\xff\xfe\n" + json.dumps(line()).encode() + b"\r\n")
    found = read_entries([path])
    assert (len(found.entries), [each.line for each in found.broken]) == (1, [1])


def test_exponent_that_overflows_to_infinity_is_rejected() -> None:
    assert math.isinf(json.loads("1e999"))
    with pytest.raises(FormatError, match="seconds: expected a finite number, got Infinity"):
        parse_entry(line(seconds=json.loads("1e999")))


def test_no_usable_line_is_an_error_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="got no usable line; run `dvit evaluate` first"):
        read_entries([write(tmp_path / "empty.jsonl")])
    with pytest.raises(EvaluationError, match=r"bad\.jsonl:1: task is missing"):
        read_entries([write(tmp_path / "bad.jsonl", "{}")])
    with pytest.raises(EvaluationError, match=r"none\.jsonl, but it cannot be read \(No such file"):
        read_entries([tmp_path / "none.jsonl"])


def test_report_command_writes_the_report_and_exits_1_on_invalid_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write(tmp_path / "good.jsonl", line()), write(tmp_path / "bad.jsonl", "{}")
    out = tmp_path / "results.md"
    assert app.run(["report", str(good), "-o", str(out)]) == 0
    assert out.read_bytes() == report_markdown(read_entries([good])).encode()
    assert app.run(["report", str(good), str(bad), "--out", str(out)]) == 1
    assert f"skipped: {bad}:1: task is missing" in capsys.readouterr().err
    assert "`good.jsonl`, `bad.jsonl`" in out.read_text()


def test_report_command_rejects_invalid_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write(tmp_path / "results.md", line())
    before = results.read_bytes()
    assert app.run(["report", str(results), "-o", str(results)]) == 2
    assert "this is one of the results files" in capsys.readouterr().err
    assert results.read_bytes() == before
    assert app.run(["report", str(results), "-o", str(tmp_path / "none" / "a.md")]) == 2
    assert app.run(["report", str(results), "-o", str(tmp_path / "a.txt")]) == 2
    assert app.run(["report", "-o", str(tmp_path / "a.md")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.md"]


def test_markdown_helpers() -> None:
    assert [signed(value) for value in (1.005, -0.004, -1.0)] == ["+1.00", "+0.00", "-1.00"]
    assert [readable(value) for value in ([1, 2], True, False, None, 0.07)] == ["1, 2", "yes", "no", "none", "0.07"]
    assert flat({"a": {"b": 1, "size": [3, 5]}, "seeds": [0, 1]}) == {"a.b": "1", "a.size": "3 x 5", "seeds": "0, 1"}
    assert differing([{"a": "1", "b": "2"}, {"a": "1"}]) == ["b 2", "b none"]
    assert differing([{"a": "1", "b": "2"}], always=("a", "z")) == ["a 1"]
    assert code("a `b` c") == "`` a `b` c ``"
    assert plain(" a\n|b ") == r"a \|b"


# --- published discovery ---

DISCOVERY: Line = {
    "task": "discovery",
    "metrics": {"CorLoc": 31.25},
    "seeds": [{"seed": 0, "CorLoc": 31.25}],
    "classes": {},
    "images": {"val": 5011},
    "settings": {
        "data": {"name": "VOC 2007 trainval", "layout": "voc", "digest": "d1"},
        "backbone": {
            "name": "vit_base_patch14_dinov2.lvd142m",
            **{"weights": "hub", "fingerprint": "ab12", "layer": 11, "norm": True, "stride": 14, "dtype": "float32"},
        },
        **{"size": "native", "seed_by": "norm", "k": 100, "iou": 0.5, "centred": False, "seeds": [0], "features": {}},
    },
}


def measured(render: Render, **changes: Any) -> list[str]:
    """The measured scores of VOC 2007, one per published row."""
    found = copy.deepcopy(KNN) | copy.deepcopy(DISCOVERY)
    for key, value in changes.items():
        place = found
        *above, last = key.split("__")
        for name in above:
            place = place[name]
        place[last] = value
    return [row[3] for row in rows(render(found), "### Object discovery (CorLoc)")[1:]]


def test_discovery_with_all_published_settings_counts_as_measured(render: Render) -> None:
    assert measured(render) == ["31.2", "-", "-", "-"]
    assert measured(render, settings__backbone__dtype="bfloat16") == ["31.2", "-", "-", "-"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("settings__iou", 0.25),
        ("settings__k", 20),
        ("settings__size", 224),
        ("settings__seed_by", "degree"),
        ("settings__centred", True),
        ("settings__features", {"artifact": "a"}),
        ("settings__backbone__weights", "random"),
        ("settings__backbone__layer", 5),
        ("settings__backbone__norm", False),
        ("settings__backbone__stride", 7),
        ("settings__data__name", "VOC 2007 test"),
        ("settings__data__name", "my VOC07"),
        ("images", {"val": 5}),
        ("skipped", [["000001.jpg", "damaged"]]),
        ("features", "denoiser"),
    ],
)
def test_discovery_with_another_setting_does_not_count_as_measured(render: Render, setting: str, value: object) -> None:
    assert measured(render, **{setting: value}) == ["-"] * 4


def test_line_with_published_model_is_a_separate_entry(tmp_path: Path) -> None:
    published = {"model": SMALL, "variant": "baseline"}
    found = read_entries([write(tmp_path / "results.jsonl", line(), line(published=published))])
    assert len(found.entries) == 2
