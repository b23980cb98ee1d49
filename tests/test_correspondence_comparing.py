"""Comparisons by correspondence from end to end: lines of results, and no repeated work."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.errors import EvaluationError, PlanError, SizeError
from denoising_vit.evaluation.correspondence import (
    ClipData,
    MatchingOptions,
    PairData,
    PropagationOptions,
    matching,
    open_clips,
    open_pairs,
    propagation,
)
from denoising_vit.evaluation.knn import knn
from denoising_vit.evaluation.options import KnnOptions
from denoising_vit.evaluation.workbench import Line, Workbench
from tiny_correspondence import crossing, moving, shuffled, workbench, write_davis, write_spair
from tiny_fit import MODEL, spec_of, write_weights
from tiny_labelled import coloured, colours, write_labelled

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipData:
    root = write_davis(tmp_path_factory.mktemp("davis"), {"a": moving(3), "b": crossing(3, 1), "c": moving(3, 2)})
    return open_clips(root)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairData:
    return open_pairs(write_spair(tmp_path_factory.mktemp("spair"), [(0, 1), (1, 2), (2, 0), (3, 1), (1, 3)]))


Task = Callable[[Workbench], Iterator[Line]]


def carried(bench: Workbench, **options: int) -> Iterator[Line]:
    return propagation(bench, ["raw", "clean"], PropagationOptions(**options))


def matched(bench: Workbench, **options: int) -> Iterator[Line]:
    return matching(bench, ["raw", "clean"], MatchingOptions(alpha=(0.1,), **options))


class Counted:
    """An extractor that counts the images it sees."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, image: Tensor) -> Tensor:
        self.images += len(image)
        return colours(image)


def test_propagation_scores_better_features_higher(tmp_path: Path) -> None:
    five = {"a": moving(2), "b": crossing(2, 1), "c": moving(2, 2), "d": crossing(2, 3), "e": moving(2, 4)}
    bench = workbench(
        tmp_path, open_clips(write_davis(tmp_path / "davis", five)), {"clean": colours, "other": shuffled}
    )
    raw, clean, other = (line for line, _ in propagation(bench, ["raw", "clean", "other"], PropagationOptions(k=3)))
    assert list(clean["metrics"]) == ["J&F", "J", "F"]
    assert clean["metrics"]["J&F"] > raw["metrics"]["J&F"] + 5 and clean["metrics"]["J&F"] > 95
    assert other["metrics"]["J&F"] < raw["metrics"]["J&F"]
    assert raw["paired"] is None and clean["failed"] is None
    paired = clean["paired"]
    assert (paired["against"], paired["metric"], paired["over"]) == ("raw", "J&F", "sequences")
    assert paired["difference"] == pytest.approx(clean["metrics"]["J&F"] - raw["metrics"]["J&F"])
    assert 0 < paired["low"] <= paired["difference"] <= paired["high"]
    settings = clean["settings"]
    assert clean["task"] == "propagation" and clean["images"] == {"val": 10} and settings["seeds"] == [0]
    options = {"context": 7, "k": 3, "radius": 12, "temperature": 0.1, "size": "native"}
    assert {key: settings[key] for key in options} == options
    assert settings["data"]["layout"] == "davis"


def test_matching_scores_better_features_higher(tmp_path: Path, pairs: PairData) -> None:
    bench = workbench(tmp_path, pairs, {"clean": colours})
    raw, clean = (line for line, _ in matching(bench, ["raw", "clean"], MatchingOptions(size=(64, 96), alpha=(0.1,))))
    assert clean["metrics"] == {"PCK": 100.0, "PCK per point": 100.0} and raw["metrics"]["PCK"] < 95
    paired = clean["paired"]
    assert (paired["against"], paired["metric"], paired["over"]) == ("raw", "PCK", "pairs")
    assert paired["difference"] == pytest.approx(100 - raw["metrics"]["PCK"]) and paired["low"] > 0
    settings = clean["settings"]
    assert clean["task"] == "matching" and clean["images"] == {"val": 4}
    assert (settings["alpha"], settings["upsample"], settings["size"]) == ([0.1], 1, [64, 96])
    assert settings["data"]["name"] == "SPair-71k"


@pytest.mark.parametrize("kind", ["clips", "pairs"])
def test_repeated_run_keeps_lines_and_other_options_reuse_features(
    tmp_path: Path, clips: ClipData, pairs: PairData, kind: str
) -> None:
    data, task, other = (clips, carried, {"k": 1}) if kind == "clips" else (pairs, matched, {"upsample": 2})
    extractor = Counted()
    first = list(task(workbench(tmp_path, data, {"clean": extractor})))
    assert extractor.images == len(data.val.images)
    before = (tmp_path / "results.jsonl").read_bytes()
    again = list(task(workbench(tmp_path, data, {"clean": extractor})))
    assert again == [(line, True) for line, _ in first]
    assert (tmp_path / "results.jsonl").read_bytes() == before
    changed = list(task(workbench(tmp_path, data, {"clean": extractor}), **other))
    assert extractor.images == len(data.val.images) and not any(kept for _, kept in changed)


@pytest.mark.parametrize("kind", ["clips", "pairs"])
def test_interrupted_comparison_resumes_where_it_stopped(
    tmp_path: Path, clips: ClipData, pairs: PairData, kind: str
) -> None:
    data, task, looks = (clips, carried, 9) if kind == "clips" else (pairs, matched, 8)
    reported: list[tuple[str, int | None]] = []
    steps: list[int] = []

    @contextlib.contextmanager
    def stopping(what: str, total: int | None) -> Iterator[Callable[[], None]]:
        reported.append((what, total))

        def advance() -> None:
            steps.append(1)
            if len(steps) == looks + 3:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        list(task(workbench(tmp_path, data, {"clean": colours}, stopping)))
    noun = "frames" if kind == "clips" else "photos"
    assert reported == [(f"raw: {noun}", looks), (f"clean: {noun}", looks)]
    before = (tmp_path / "results.jsonl").read_bytes()
    assert before.count(b"\n") == 1
    extractor = Counted()
    resumed = list(task(workbench(tmp_path, data, {"clean": extractor})))
    assert [kept for _, kept in resumed] == [True, False]
    assert extractor.images < len(data.val.images)
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)
    straight = list(task(workbench(tmp_path / "other", data, {"clean": colours})))
    for (ours, _), (theirs, _) in zip(resumed, straight, strict=True):
        assert (ours["metrics"], ours["paired"]) == (theirs["metrics"], theirs["paired"])


def test_failed_source_is_reported_and_the_others_are_evaluated(tmp_path: Path, clips: ClipData) -> None:
    bench = workbench(tmp_path, clips, {"clean": lambda image: colours(image) * float("nan"), "fine": colours})
    lines = [line for line, _ in propagation(bench, ["raw", "clean", "fine"], PropagationOptions())]
    assert [bool(line["failed"]) for line in lines] == [False, True, False]
    assert "not finite" in lines[1]["failed"]


def test_one_sequence_has_no_interval(tmp_path: Path) -> None:
    data = open_clips(write_davis(tmp_path / "davis", {"one": moving(3)}))
    first = list(carried(workbench(tmp_path, data, {"clean": colours})))
    paired = first[1][0]["paired"]
    assert (paired["low"], paired["high"], paired["groups"]) == (None, None, 1) and paired["difference"] > 0
    assert list(carried(workbench(tmp_path, data, {"clean": colours}))) == [(line, True) for line, _ in first]


def test_skipped_sequences_are_in_the_lines(tmp_path: Path) -> None:
    data = open_clips(write_davis(tmp_path / "davis", {"one": moving(3), "short": moving(1)}))
    (line, _), *_ = carried(workbench(tmp_path, data, {"clean": colours}))
    assert line["skipped"] == [["val/short", "a sequence of one frame; expected at least two"]]


def test_data_of_another_kind_is_rejected(tmp_path: Path, clips: ClipData, pairs: PairData) -> None:
    labelled = write_labelled(tmp_path / "labelled", coloured(1, 0), coloured(1, 1))
    for data, layout in ((pairs, "spair"), (labelled, "folders")):
        with pytest.raises(EvaluationError, match=f"expected videos with masks of objects .*, got {layout}"):
            list(carried(workbench(tmp_path, data)))
    for data, layout in ((clips, "davis"), (labelled, "folders")):
        with pytest.raises(EvaluationError, match=f"expected pairs of photos with keypoints, got {layout}"):
            list(matched(workbench(tmp_path, data)))
    with pytest.raises(EvaluationError, match="expected photos with masks of classes, got davis"):
        list(knn(workbench(tmp_path, clips), ["raw"], KnnOptions()))
    assert not (tmp_path / "results.jsonl").read_text()


def test_invalid_options_are_rejected_before_anything_is_written(
    tmp_path: Path, clips: ClipData, pairs: PairData
) -> None:
    with pytest.raises(PlanError, match="k must be at least 1"):
        list(carried(workbench(tmp_path, clips, {"clean": colours}), k=0))
    with pytest.raises(PlanError, match="upsample must be at least 1"):
        list(matched(workbench(tmp_path, pairs, {"clean": colours}), upsample=0))
    with pytest.raises(SizeError):
        list(carried(workbench(tmp_path, clips, {"clean": colours}), size=50))
    with pytest.raises(EvaluationError, match="unknown features cleen"):
        list(matching(workbench(tmp_path, pairs), ["raw", "cleen"], MatchingOptions(alpha=(0.1,))))
    assert not (tmp_path / "results.jsonl").read_text()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, BackboneSpec]:
    """A vision transformer with random weights, which are the same each time it is loaded."""
    spec = spec_of(write_weights(tmp_path_factory.mktemp("weights") / f"{MODEL}.safetensors"))
    return spec.load(), spec


def test_fields_of_stage_one_are_evaluated(tmp_path: Path, pairs: PairData, vit: tuple[Backbone, BackboneSpec]) -> None:
    backbone, spec = vit
    bench = workbench(tmp_path, pairs, backbone=backbone)
    bench = replace(bench, spec=spec, exact=DenoiseOptions(views=16, size=64))
    lines = [line for line, _ in matching(bench, ["raw", "exact"], MatchingOptions(size=64, alpha=(0.1,)))]
    assert [line["failed"] for line in lines] == [None, None]
    assert lines[1]["settings"]["features"]["views"] == 16
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[1]) == lines[1]


def test_objects_of_one_video_are_one_group_of_an_interval(tmp_path: Path, clips: ClipData) -> None:
    """The interval is over three sequences, not over four objects."""
    ((line, _), (clean, _)) = carried(workbench(tmp_path, clips, {"clean": colours}))
    assert clean["paired"]["groups"] == 3
    kept = [load_file(path) for path in (tmp_path / "cache" / "counts").iterdir()]
    assert line["images"] == {"val": 9} and len(kept) == 2
    for arrays in kept:
        assert arrays["groups"].tolist() == [0, 1, 1, 2] and torch.isfinite(arrays["values"]).all()
