"""Comparisons end to end: result lines are appended and never lost, and no work is repeated."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import denoising_vit as dv
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.environment import run_info
from denoising_vit.errors import EvaluationError, PlanError
from denoising_vit.evaluation.features import fitted_fields
from denoising_vit.evaluation.knn import crops_of, knn
from denoising_vit.evaluation.labelled import LabelledData
from denoising_vit.evaluation.options import KnnOptions
from denoising_vit.evaluation.outcomes import Curve, paired_interval
from denoising_vit.evaluation.results import Record, Results
from denoising_vit.evaluation.scores import Counts, scores
from denoising_vit.evaluation.segmentation import SegmentationOptions, segmentation
from denoising_vit.evaluation.sources import ExtractorSource, FeatureSource
from denoising_vit.evaluation.workbench import Line, Task, Workbench
from denoising_vit.extractors import KINDS, Extractor, parse_names
from denoising_vit.progress import Progress, no_progress
from denoising_vit.views.crops import Crop
from tiny_fit import MODEL, spec_of, write_weights
from tiny_labelled import coloured, colours, speckled, tiny_backbone, write_labelled

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = KnnOptions(k=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledData:
    return write_labelled(tmp_path_factory.mktemp("coloured"), coloured(3, 0), coloured(4, 1))


class Judge:
    """Counts that depend on the source's name, its identity and the seed only; records its calls."""

    def __init__(self, images: int = 4) -> None:
        self.images = images
        self.asked: list[tuple[str, tuple[int, ...]]] = []

    def counts(self, name: str, seed: int, salt: int = 0) -> Counts:
        chance = np.random.default_rng([*name.encode(), seed, salt])
        hits = chance.integers(0, 50, (self.images, 3))
        return Counts(hits, hits + chance.integers(1, 30, hits.shape), hits + chance.integers(1, 30, hits.shape))

    def __call__(self, source: FeatureSource, seeds: tuple[int, ...]) -> Iterator[tuple[int, Counts, Curve]]:
        self.asked.append((source.name, seeds))
        for seed in seeds:
            yield seed, self.counts(source.name, seed, source.identity.get("salt", 0)), [[1, 0.5, None], [2, 0.25, 9.0]]


@dataclass
class Comparison:
    bench: Workbench
    task: Task

    def compare(self, sources: Mapping[str, Callable[[], FeatureSource]]) -> Iterator[Line]:
        return self.bench.evaluate(self.task, sources)


def comparison(folder: Path, data: LabelledData, judge: Judge | Any, seeds: tuple[int, ...] = (0, 1)) -> Comparison:
    bench = Workbench(
        data=data,
        backbone=tiny_backbone(),
        spec=BackboneSpec("tiny"),
        results=Results(folder / "results.jsonl"),
        folder=folder,
        run={"command": "dvit evaluate"},
    )
    return Comparison(bench, Task("segmentation", judge, {}, seeds, (48, 48)))


def named(*names: str, **identity: int) -> Mapping[str, Callable[[], FeatureSource]]:
    backbone = tiny_backbone()
    return {name: lambda name=name: ExtractorSource(name, backbone, None, identity) for name in names}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# --- content of a line ---


def test_each_source_is_a_line_and_is_compared_with_the_first(tmp_path: Path, data: LabelledData) -> None:
    judge = Judge()
    results = list(comparison(tmp_path, data, judge).compare(named("a", "b", "c")))
    lines = lines_of(tmp_path)
    assert results == [(line, False) for line in lines]
    assert [line["features"] for line in lines] == ["a", "b", "c"]
    assert lines[0]["paired"] is None
    for line in lines[1:]:
        theirs, ours = ([judge.counts(name, seed) for seed in (0, 1)] for name in ("a", line["features"]))
        expected = paired_interval(ours, theirs)
        assert line["paired"]["against"] == "a"
        assert line["paired"]["difference"] == pytest.approx(line["metrics"]["mIoU"] - lines[0]["metrics"]["mIoU"])
        assert (line["paired"]["low"], line["paired"]["high"]) == (expected.low, expected.high)


def test_a_line_holds_means_over_seeds_and_each_seed(tmp_path: Path, data: LabelledData) -> None:
    judge = Judge()
    ((line, _),) = comparison(tmp_path, data, judge).compare(named("a", salt=3))
    each = [scores(judge.counts("a", seed, 3)) for seed in (0, 1)]
    assert line["metrics"]["mIoU"] == pytest.approx((each[0].miou + each[1].miou) / 2)
    assert [one["seed"] for one in line["seeds"]] == [0, 1]
    assert [one["mAcc"] for one in line["seeds"]] == [one.macc for one in each]
    assert list(line["classes"]) == ["class 0", "class 1", "class 2"]
    first = [one.iou[0] for one in each if one.iou[0] is not None]
    assert line["classes"]["class 0"]["IoU"] == pytest.approx(sum(first) / 2)
    assert line["curve"] == [[1, 0.5, None], [2, 0.25, 9.0]]
    assert line["images"] == {"train": 3, "val": 4}
    assert set(line["settings"]) == {"data", "backbone", "size", "seeds", "features"}
    assert {name: line["settings"][name] for name in ("size", "seeds", "features")} == {
        "size": [48, 48],
        "seeds": [0, 1],
        "features": {"salt": 3},
    }
    assert line["failed"] is None and line["run"] == {"command": "dvit evaluate"}


# --- no repeated work ---


def test_repeated_comparison_keeps_all_results(tmp_path: Path, data: LabelledData) -> None:
    first = list(comparison(tmp_path, data, Judge()).compare(named("a", "b")))
    before = (tmp_path / "results.jsonl").read_bytes()
    judge = Judge()
    again = list(comparison(tmp_path, data, judge).compare(named("a", "b")))
    assert judge.asked == []
    assert again == [(line, True) for line, _ in first]
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_added_seeds_compute_only_those(tmp_path: Path, data: LabelledData) -> None:
    list(comparison(tmp_path, data, Judge(), (0, 1)).compare(named("a", "b")))
    before = (tmp_path / "results.jsonl").read_bytes()
    judge = Judge()
    results = list(comparison(tmp_path, data, judge, (0, 1, 2)).compare(named("a", "b")))
    assert judge.asked == [("a", (2,)), ("b", (2,))]
    assert [[one["seed"] for one in line["seeds"]] for line, _ in results] == [[0, 1, 2]] * 2
    expected = [scores(judge.counts("a", seed)).miou for seed in range(3)]
    assert [one["mIoU"] for one in results[0][0]["seeds"]] == pytest.approx(expected)
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)


def test_fewer_seeds_add_a_line_without_computation(tmp_path: Path, data: LabelledData) -> None:
    list(comparison(tmp_path, data, Judge(), (0, 1)).compare(named("a")))
    judge = Judge()
    ((line, kept),) = comparison(tmp_path, data, judge, (1,)).compare(named("a"))
    assert judge.asked == [] and not kept
    assert line["metrics"]["mIoU"] == pytest.approx(scores(judge.counts("a", 1)).miou)


def test_other_identity_gives_another_result(tmp_path: Path, data: LabelledData) -> None:
    list(comparison(tmp_path, data, Judge()).compare(named("a", salt=1)))
    judge = Judge()
    ((line, kept),) = comparison(tmp_path, data, judge).compare(named("a", salt=2))
    assert judge.asked == [("a", (0, 1))] and not kept
    assert len(lines_of(tmp_path)) == 2
    assert line["metrics"]["mIoU"] != lines_of(tmp_path)[0]["metrics"]["mIoU"]


def test_other_reference_adds_lines_without_computation(tmp_path: Path, data: LabelledData) -> None:
    list(comparison(tmp_path, data, Judge()).compare(named("a", "b")))
    judge = Judge()
    results = list(comparison(tmp_path, data, judge).compare(named("b", "a")))
    assert judge.asked == []
    against = [(line["features"], (line["paired"] or {}).get("against")) for line, _ in results]
    assert against == [("b", None), ("a", "b")]
    assert len(lines_of(tmp_path)) == 4


def test_reference_is_identified_by_its_features_not_its_name(tmp_path: Path, data: LabelledData) -> None:
    """As in `subtract,raw` with another artifact: raw's own result stays the same, its reference does not."""

    def against(salt: int) -> dict[str, Any]:
        sources = {**named("reference", salt=salt), **named("b")}
        return list(comparison(tmp_path, data, Judge()).compare(sources))[1][0]

    first, second = against(1), against(2)
    judge = Judge()
    theirs = np.mean([scores(judge.counts("reference", seed, 2)).miou for seed in (0, 1)])
    assert first["metrics"] == second["metrics"]
    assert second["paired"]["difference"] == pytest.approx(second["metrics"]["mIoU"] - theirs)


def test_lost_counts_of_the_reference_are_computed_again(tmp_path: Path, data: LabelledData) -> None:
    first = list(comparison(tmp_path, data, Judge()).compare(named("a")))
    damaged, whole = sorted((tmp_path / "counts").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:50])
    whole.unlink()
    judge = Judge()
    lines = list(comparison(tmp_path, data, judge).compare(named("a", "b")))
    assert judge.asked == [("b", (0, 1)), ("a", (0, 1))]
    assert lines[0] == (first[0][0], True)
    assert lines[1][0]["paired"]["against"] == "a"


# --- failures and interruptions ---


class Failing(Judge):
    def __call__(self, source: FeatureSource, seeds: tuple[int, ...]) -> Iterator[tuple[int, Counts, Curve]]:
        if source.name == "bad":
            raise EvaluationError("the bad one is bad")
        yield from super().__call__(source, seeds)


def test_failure_is_recorded_and_the_others_are_evaluated(tmp_path: Path, data: LabelledData) -> None:
    results = list(comparison(tmp_path, data, Failing()).compare(named("a", "bad", "c")))
    assert [line["failed"] for line, _ in results] == [None, "the bad one is bad", None]
    assert [line["features"] for line in lines_of(tmp_path)] == ["a", "bad", "c"]
    assert results[1][0]["metrics"] == {} and results[1][0]["paired"] is None
    assert results[2][0]["paired"]["against"] == "a"


def test_source_that_cannot_be_created_is_recorded_as_failed(tmp_path: Path, data: LabelledData) -> None:
    def broken() -> FeatureSource:
        raise EvaluationError("cannot be made")

    results = list(comparison(tmp_path, data, Judge()).compare({**named("a"), "b": broken, **named("c")}))
    assert [line["failed"] for line, _ in results] == [None, "cannot be made", None]


def test_only_failed_sources_are_retried(tmp_path: Path, data: LabelledData) -> None:
    list(comparison(tmp_path, data, Failing()).compare(named("a", "bad", "c")))
    before = (tmp_path / "results.jsonl").read_bytes()
    judge = Judge()
    results = list(comparison(tmp_path, data, judge).compare(named("a", "bad", "c")))
    assert judge.asked == [("bad", (0, 1))]
    assert [kept for _, kept in results] == [True, False, True]
    assert results[1][0]["failed"] is None and results[1][0]["paired"]["against"] == "a"
    after = (tmp_path / "results.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 4


def test_no_paired_differences_if_the_first_source_fails(tmp_path: Path, data: LabelledData) -> None:
    results = list(comparison(tmp_path, data, Failing()).compare(named("bad", "b", "c")))
    assert [line["paired"] for line, _ in results] == [None, None, None]
    judge = Judge()
    results = list(comparison(tmp_path, data, judge).compare(named("bad", "b", "c")))
    assert judge.asked == [("bad", (0, 1))]
    assert [(line["paired"] or {}).get("against") for line, _ in results] == [None, "bad", "bad"]


def test_interruption_between_seeds_loses_only_one_seed(tmp_path: Path, data: LabelledData) -> None:
    class Stopped(Judge):
        def __call__(self, source: FeatureSource, seeds: tuple[int, ...]) -> Iterator[tuple[int, Counts, Curve]]:
            for found in super().__call__(source, seeds):
                if (source.name, found[0]) == ("b", 1):
                    raise KeyboardInterrupt
                yield found

    with pytest.raises(KeyboardInterrupt):
        list(comparison(tmp_path, data, Stopped()).compare(named("a", "b", "c")))
    before = (tmp_path / "results.jsonl").read_bytes()
    assert [line["features"] for line in lines_of(tmp_path)] == ["a"]
    judge = Judge()
    results = list(comparison(tmp_path, data, judge).compare(named("a", "b", "c")))
    assert judge.asked == [("b", (1,)), ("c", (0, 1))]
    assert [kept for _, kept in results] == [True, False, False]
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)
    straight = [line for line, _ in comparison(tmp_path / "other", data, Judge()).compare(named("a", "b", "c"))]
    assert [line["metrics"] for line, _ in results] == [line["metrics"] for line in straight]
    assert [line["paired"] for line, _ in results] == [line["paired"] for line in straight]


# --- the results file ---


def a_record(features: str = "raw", **changes: Any) -> Record:
    return replace(Record("knn", features, {"k": 5}, {"mIoU": 12.5}), **changes)


def test_truncated_last_line_does_not_break_later_runs(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for name in ("a", "b"):
        Results(path).add(a_record(name))
    path.write_bytes(path.read_bytes()[:-20])
    cut = path.read_bytes()

    second = Results(path)
    assert second.find(a_record("a")) is not None and second.find(a_record("b")) is None
    second.add(a_record("b"))
    assert path.read_bytes().startswith(cut)

    third = Results(path)
    assert third.find(a_record("a")) is not None and third.find(a_record("b")) is not None


def test_last_line_without_newline_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(path).add(a_record("a"))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    results = Results(path)
    assert results.find(a_record("a")) is not None
    results.add(a_record("b"))
    assert [line["features"] for line in lines_of(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    [
        "# Notes\n\nNot results at all.\n",
        "Not results at all.\n",
        '{"name": "another", "version": 1}\n',
        "[1, 2, 3]\n",
        "17\n",
        '{\n  "task": "knn"\n}\n',
    ],
)
def test_file_with_other_content_is_rejected_and_unchanged(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=r"notes, line 1: not a result of `dvit evaluate`.*another file with -o"):
        Results(path)
    assert path.read_text() == text


def test_binary_file_is_rejected_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0" * 20)
    with pytest.raises(EvaluationError, match=r"photo\.jpg.*another file with -o"):
        Results(path)
    assert path.read_bytes() == b"\xff\xd8\xff\xe0" * 20


def test_folder_as_results_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"cannot write results to .*another file with -o"):
        Results(tmp_path)


def test_results_are_found_by_everything_that_affects_them(tmp_path: Path) -> None:
    Results(tmp_path / "deep" / "results.jsonl").add(a_record(seconds=3.0))
    results = Results(tmp_path / "deep" / "results.jsonl")
    found = results.find(a_record(run={"command": "another"}))
    assert found is not None and found["metrics"] == {"mIoU": 12.5}
    others = [
        a_record("exact"),
        a_record(task="segmentation"),
        a_record(settings={"k": 6}),
        a_record(published={"model": "DINOv2"}),
    ]
    assert [results.find(other) for other in others] == [None] * 4


def test_last_duplicate_line_counts_and_failures_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = Results(path)
    results.add(a_record(failed="once"))
    assert results.find(a_record()) is None
    results.add(a_record(metrics={"mIoU": 1.0}))
    results.add(a_record(metrics={"mIoU": 2.0}))
    results.add(a_record(failed="again"))
    for one in (results, Results(path)):
        found = one.find(a_record())
        assert found is not None and found["metrics"] == {"mIoU": 2.0}


def test_run_info_has_command_hardware_and_software() -> None:
    info = run_info(["evaluate", "knn", "my data"])
    assert info["command"] == "dvit evaluate knn 'my data'"
    assert "CPU cores" in info["hardware"] and set(info["software"]) == {"denoising-vit", "torch", "python"}


# --- the workbench ---


class Counted:
    """An extractor that counts the images it processes."""

    def __init__(self, model: Callable[[Tensor], Tensor] = colours) -> None:
        self.model, self.images = model, 0

    def __call__(self, image: Tensor) -> Tensor:
        self.images += len(image)
        return self.model(image)


def workbench(
    folder: Path,
    data: LabelledData,
    extractors: Mapping[str, Extractor] | None = None,
    backbone: Backbone | None = None,
    watch: Progress = no_progress,
) -> Workbench:
    return Workbench(
        data=data,
        backbone=backbone or tiny_backbone(speckled),
        spec=BackboneSpec("tiny"),
        results=Results(folder / "results.jsonl"),
        folder=folder / "cache",
        run=run_info(["evaluate"]),
        extractors=extractors or {},
        progress=watch,
    )


def summary(results: list[Line]) -> list[tuple[str, float, Any]]:
    return [(line["features"], line["metrics"]["mIoU"], line["paired"]) for line, _ in results]


def test_better_features_score_higher(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", coloured(4, 1), coloured(6, 2))
    raw, clean = list(knn(workbench(tmp_path, data, {"clean": colours}), ["raw", "clean"], FEW))
    assert clean[0]["metrics"]["mIoU"] > raw[0]["metrics"]["mIoU"] + 20
    assert raw[0]["paired"] is None
    assert clean[0]["paired"]["against"] == "raw" and clean[0]["paired"]["low"] > 0
    settings = clean[0]["settings"]
    assert settings["k"] == 5 and settings["size"] == "native" and settings["seeds"] == [0]
    assert settings["backbone"]["name"] == "speckled" and settings["features"] == {"extractor": "clean"}
    assert settings["data"]["layout"] == "folders"


def test_lines_are_kept_if_the_counts_are_deleted(tmp_path: Path, data: LabelledData) -> None:
    """Counts are only needed to compare further sources."""
    passes: list[int] = []

    def counting(image: Tensor) -> Tensor:
        passes.append(len(image))
        return colours(image)

    first = list(knn(workbench(tmp_path, data, {"clean": counting}), ["raw", "clean"], FEW))
    shutil.rmtree(tmp_path / "cache")
    passes.clear()
    again = list(knn(workbench(tmp_path, data, {"clean": counting}), ["raw", "clean"], FEW))
    assert again == [(line, True) for line, _ in first]
    assert not passes
    (_, (other, kept)) = knn(workbench(tmp_path, data, {"other": counting}), ["raw", "other"], FEW)
    assert not kept and other["paired"]["against"] == "raw" and passes


def test_repeated_command_processes_no_image(tmp_path: Path, data: LabelledData) -> None:
    extractor = Counted()
    first = list(knn(workbench(tmp_path, data, {"clean": extractor}), ["raw", "clean"], FEW))
    assert extractor.images == 7
    before = (tmp_path / "results.jsonl").read_bytes()
    again = list(knn(workbench(tmp_path, data, {"clean": extractor}), ["raw", "clean"], FEW))
    assert extractor.images == 7
    assert again == [(line, True) for line, _ in first]
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_other_options_reuse_the_cached_features(tmp_path: Path, data: LabelledData) -> None:
    extractor = Counted()
    for number, options in enumerate((FEW, KnnOptions(k=1), KnnOptions(k=5, gallery=30), KnnOptions(k=5, seed=1))):
        ((_, kept),) = knn(workbench(tmp_path, data, {"clean": extractor}), ["clean"], options)
        assert not kept and extractor.images == 7
        assert len(lines_of(tmp_path)) == number + 1
    list(knn(workbench(tmp_path, data, {"clean": extractor}), ["clean"], KnnOptions(k=5, crops="neutral")))
    assert extractor.images == 14


def test_non_finite_source_fails_and_the_others_are_evaluated(tmp_path: Path, data: LabelledData) -> None:
    extractors = {"broken": lambda image: colours(image) * float("nan"), "clean": colours}
    results = list(knn(workbench(tmp_path, data, extractors), ["raw", "broken", "clean"], FEW))
    assert [bool(line["failed"]) for line, _ in results] == [False, True, False]
    assert "broken: " in results[1][0]["failed"] and "not finite" in results[1][0]["failed"]
    extractors["broken"] = colours
    again = list(knn(workbench(tmp_path, data, extractors), ["raw", "broken", "clean"], FEW))
    assert [kept for _, kept in again] == [True, False, True]
    assert again[1][0]["metrics"] == again[2][0]["metrics"]


@pytest.mark.parametrize("after", [2, 5, 11])
def test_interrupted_comparison_resumes(tmp_path: Path, data: LabelledData, after: int) -> None:
    """Interrupted after that many of 2 x 7 images; batches not reported in full may be processed again."""
    steps = []

    @contextlib.contextmanager
    def stopping(_what: str, _total: int | None) -> Iterator[Callable[[], None]]:
        def advance() -> None:
            steps.append(1)
            if len(steps) == after:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        list(knn(workbench(tmp_path, data, {"clean": colours}, watch=stopping), ["raw", "clean"], FEW))
    before = (tmp_path / "results.jsonl").read_bytes()
    assert before.count(b"\n") == after // 7
    kept = len(list((tmp_path / "cache" / "features").rglob("*.safetensors")))
    assert kept >= after
    extractor = Counted()
    results = list(knn(workbench(tmp_path, data, {"clean": extractor}), ["raw", "clean"], FEW))
    assert extractor.images == 14 - max(kept, 7)
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)
    straight = list(knn(workbench(tmp_path / "other", data, {"clean": colours}), ["raw", "clean"], FEW))
    assert summary(results) == summary(straight)


def test_two_backbones_in_one_folder_are_not_mixed_up(tmp_path: Path, data: LabelledData) -> None:
    """As with the default results file and two models of the same patch size."""
    ((bad, _),) = knn(workbench(tmp_path, data, backbone=tiny_backbone(speckled)), ["raw"], FEW)
    ((good, kept),) = knn(workbench(tmp_path, data, backbone=tiny_backbone(colours)), ["raw"], FEW)
    assert not kept
    assert good["metrics"]["mIoU"] > bad["metrics"]["mIoU"] + 20


def test_other_labels_of_the_same_photos_give_another_result(tmp_path: Path, data: LabelledData) -> None:
    list(knn(workbench(tmp_path, data), ["raw"], FEW))
    swapped = [(pixels, (mask + 1) % 3) for pixels, mask in coloured(3, 0)]
    other = write_labelled(tmp_path / "swapped", swapped, coloured(4, 1))
    ((line, kept),) = knn(workbench(tmp_path, other, backbone=tiny_backbone(speckled)), ["raw"], FEW)
    assert not kept and line["metrics"]["mIoU"] < 40


def test_added_probe_seeds_reuse_existing_probes(tmp_path: Path, data: LabelledData) -> None:
    trained: list[int] = []

    @contextlib.contextmanager
    def counting(what: str, total: int | None) -> Iterator[Callable[[], None]]:
        if what.endswith("steps") and total is not None:
            trained.append(total)
        yield lambda: None

    quick = SegmentationOptions(seeds=(0,), steps=4, batch=2)
    bench = workbench(tmp_path, data, watch=counting)
    ((one, _),) = segmentation(bench, ["raw"], quick)
    ((two, kept),) = segmentation(bench, ["raw"], replace(quick, seeds=(0, 1)))
    assert trained == [4, 4] and not kept
    assert two["seeds"][0] == one["seeds"][0]
    assert two["curve"] == one["curve"]
    assert [seed["seed"] for seed in two["seeds"]] == [0, 1]


@pytest.mark.parametrize("names", ["raw,rwa", "raw,,exact", "", "raw,raw", "Raw"])
def test_unknown_or_repeated_source_names_are_rejected(names: str) -> None:
    with pytest.raises(PlanError, match=r"features.*; choose from raw, subtract, exact"):
        parse_names(names, KINDS)


def test_source_names_keep_their_order() -> None:
    assert parse_names("exact, raw", KINDS) == parse_names(["exact", "raw"], KINDS) == ("exact", "raw")


def test_unknown_source_is_rejected_or_recorded_by_name(tmp_path: Path, data: LabelledData) -> None:
    """Not a KeyError: either rejected at once or recorded as failed."""
    try:
        results = list(knn(workbench(tmp_path, data, {"clean": colours}), ["raw", "cleen"], FEW))
    except EvaluationError as error:
        assert "cleen" in str(error)
    else:
        assert "cleen" in results[1][0]["failed"]


def test_options_out_of_range_are_rejected_before_writing_results(tmp_path: Path, data: LabelledData) -> None:
    with pytest.raises(PlanError, match="k must be at least 1"):
        list(knn(workbench(tmp_path, data), ["raw"], KnnOptions(k=0)))
    assert lines_of(tmp_path) == []


# --- fields of stage 1 ---


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, BackboneSpec]:
    """A vision transformer with random weights, the same each time it is loaded."""
    spec = spec_of(write_weights(tmp_path_factory.mktemp("weights") / f"{MODEL}.safetensors"))
    return spec.load(), spec


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> LabelledData:
    return write_labelled(tmp_path_factory.mktemp("larger"), coloured(2, 0, (64, 64)), coloured(2, 1, (64, 64)))


def exact_bench(
    folder: Path, data: LabelledData, vit: tuple[Backbone, BackboneSpec], watch: Progress = no_progress, **options: Any
) -> Workbench:
    backbone, spec = vit
    stage_one = DenoiseOptions(views=16, size=64, **options)
    return replace(workbench(folder, data, backbone=backbone, watch=watch), spec=spec, exact=stage_one)


def test_fields_are_fitted_once_and_reused(
    tmp_path: Path, larger: LabelledData, vit: tuple[Backbone, BackboneSpec]
) -> None:
    watched: list[str] = []

    @contextlib.contextmanager
    def naming(what: str, _total: int | None) -> Iterator[Callable[[], None]]:
        yield lambda: watched.append(what)

    bench = exact_bench(tmp_path, larger, vit, naming)
    first = list(knn(bench, ["raw", "exact"], FEW))
    assert [(line["features"], line["failed"]) for line, _ in first] == [("raw", None), ("exact", None)]
    assert first[1][0]["paired"]["against"] == "raw"
    assert first[1][0]["settings"]["features"]["views"] == 16
    assert watched.count("exact: train images fitted") == watched.count("exact: val images fitted") == 2
    stores = [path for path in (tmp_path / "cache" / "fields").rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in stores if "field" in path.parts[-3:]}
    assert before
    again = list(knn(exact_bench(tmp_path, larger, vit), ["raw", "exact"], FEW))
    assert again == [(line, True) for line, _ in first]
    assert {path: path.stat().st_mtime_ns for path in before} == before

    # Other options of the task use the same fields; other options of stage 1 give another result.
    ((line, kept),) = knn(exact_bench(tmp_path, larger, vit), ["exact"], KnnOptions(k=3))
    assert not kept and line["failed"] is None
    assert len(list((tmp_path / "cache" / "fields").iterdir())) == 2
    ((line, kept),) = knn(exact_bench(tmp_path, larger, vit, smoothness=0.5), ["exact"], FEW)
    assert not kept and line["failed"] is None
    assert len(list((tmp_path / "cache" / "fields").iterdir())) == 4


def test_fields_match_denoise_image(tmp_path: Path, larger: LabelledData, vit: tuple[Backbone, BackboneSpec]) -> None:
    backbone, spec = vit
    options = DenoiseOptions(views=16, size=64, held_out=0)
    source = fitted_fields("exact", larger, tmp_path, backbone, spec, options)
    image = larger.val.images[1]
    direct = dv.denoise_image(backbone, image.photo, views=16, size=64, held_out=0)
    whole = source.features(source.inputs(image, Crop.whole((64, 64)))[None])[0]
    assert whole.shape == direct.semantic.shape
    error = float((whole - direct.semantic).square().mean() / direct.semantic.var())
    assert error < 1e-3
    turned = source.inputs(image, replace(Crop.whole((64, 64)), inverted=True))
    assert torch.allclose(turned.float(), whole.flip((0, 1)), atol=1e-4)
    assert not source.cached


def test_neutral_crops_are_fitted_as_separate_images(
    tmp_path: Path, larger: LabelledData, vit: tuple[Backbone, BackboneSpec]
) -> None:
    """Fields of whole images use content outside the crop, so the comparison would not be like for like."""
    backbone, spec = vit
    neutral = KnnOptions(k=3, crops="neutral", size=64)
    bench = exact_bench(tmp_path, larger, vit)
    ((line, _),) = knn(bench, ["exact"], neutral)
    assert line["failed"] is None and line["settings"]["features"]["of"] == "crop"
    ((other, _),) = knn(replace(bench, fields_of="image"), ["exact"], neutral)
    assert other["failed"] is None and other["settings"]["features"]["of"] == "image"

    crops = {images.split: crops_of(images, backbone, neutral) for images in (larger.train, larger.val)}
    options = DenoiseOptions(views=16, size=64, held_out=0)
    source = fitted_fields("exact", larger, tmp_path / "cache" / "fields", backbone, spec, options, crops=crops)
    image, crop = crops["val"][1]
    direct = dv.denoise_image(backbone, crop.cut(image.pixels()).copy(), views=16, size=64, held_out=0)
    found = source.features(source.inputs(image, crop)[None])[0]
    assert float((found - direct.semantic).square().mean() / direct.semantic.var()) < 1e-3


def test_image_that_could_not_be_fitted_fails_and_is_retried(
    tmp_path: Path, vit: tuple[Backbone, BackboneSpec]
) -> None:
    data = write_labelled(tmp_path / "data", coloured(2, 0, (64, 64)), coloured(2, 1, (64, 64)))
    photo = data.val.images[1].photo
    kept = photo.read_bytes()
    photo.write_bytes(kept[:100])
    ((line, _),) = knn(exact_bench(tmp_path, data, vit), ["exact"], FEW)
    assert "1 val images could not be fitted" in line["failed"] and photo.name in line["failed"]
    photo.write_bytes(kept)
    ((line, again),) = knn(exact_bench(tmp_path, data, vit), ["exact"], FEW)
    assert line["failed"] is None and not again


def test_other_stage_one_method_fails_with_a_message(
    tmp_path: Path, larger: LabelledData, vit: tuple[Backbone, BackboneSpec]
) -> None:
    results = list(knn(exact_bench(tmp_path, larger, vit, method="subtract"), ["raw", "exact"], FEW))
    assert results[0][0]["failed"] is None
    assert "exact method for stage 1 of a data set, got 'subtract'" in results[1][0]["failed"]


def test_interval_of_an_older_method_is_recomputed_from_counts(tmp_path: Path, data: LabelledData) -> None:
    judge = Judge()
    results = list(comparison(tmp_path, data, judge).compare(named("a", "b")))
    path = tmp_path / "results.jsonl"
    old = [json.loads(line) for line in path.read_text().splitlines()]
    for name in ("method", "groups"):
        del old[1]["paired"][name]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    asked = list(judge.asked)
    again = list(comparison(tmp_path, data, judge).compare(named("a", "b")))
    assert judge.asked == asked
    assert [kept for _, kept in again] == [True, False] and again[1][0]["paired"] == results[1][0]["paired"]
