"""CorLoc of planted objects with good, bad and random features; and comparisons end to end."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from denoising_vit.backbones import BackboneSpec
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.environment import run_info
from denoising_vit.errors import EvaluationError, PlanError, SizeError
from denoising_vit.evaluation.discovery import (
    BoxedData,
    DiscoveryOptions,
    Localised,
    discovery,
    find_object,
    localise,
    open_boxed,
)
from denoising_vit.evaluation.discovery.lost import best_overlap, on_image
from denoising_vit.evaluation.features import FeatureCache
from denoising_vit.evaluation.results import METRICS, Results
from denoising_vit.evaluation.sources import ExtractorSource
from denoising_vit.evaluation.workbench import Workbench
from denoising_vit.extractors import Extractor
from denoising_vit.progress import Progress, no_progress
from denoising_vit.views.crops import Crop
from tiny_discovery import GRID, scene, scenes, write_davis, write_folders
from tiny_fit import MODEL, spec_of, write_weights
from tiny_labelled import PATCH, coloured, colours, source_of, speckled, tiny_backbone, write_labelled

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = DiscoveryOptions()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> BoxedData:
    return open_boxed(write_folders(tmp_path_factory.mktemp("planted"), scenes(30)))


def corloc(model: Callable[[Tensor], Tensor], data: BoxedData, options: DiscoveryOptions = PLAIN) -> float:
    return localise(source_of(model), data, options).scored()["CorLoc"]


def unknowing(image: Tensor) -> Tensor:
    """Random features that are unrelated to the content and different for each image."""
    height, width = image.shape[2:]
    found = []
    for one in image:
        seed = int(one.double().sum() * 1e6) % 2**31
        chance = torch.Generator().manual_seed(seed)
        blurred = torch.nn.functional.avg_pool2d(
            torch.randn(1, 5, height // PATCH, width // PATCH, generator=chance), 3, 1, 1
        )
        found.append(blurred[0].permute(1, 2, 0))
    return torch.stack(found)


def boxes_found(model: Callable[[Tensor], Tensor], data: BoxedData) -> list[tuple[float, ...]]:
    """Independent of the code under test except for LOST itself: whole patches, photos at native size."""
    source, found = source_of(model), []
    for image in data.val.images:
        inputs = source.inputs(image, Crop.whole((image.height, image.width)))
        box = find_object(source.features(inputs[None])[0]).box
        found.append(tuple(float(side * PATCH) for side in box))
    return found


def by_hand(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union."""
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    down = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return across * down / (sum(areas) - across * down)


def by_chance(found: list[tuple[float, ...]], data: BoxedData) -> float:
    """CorLoc if the box of each image is compared with the true boxes of every other image."""
    truth = [image.boxes for image in data.val.images]
    hits = [
        any(by_hand(box, one) >= 0.5 for one in boxes)
        for number, box in enumerate(found)
        for other, boxes in enumerate(truth)
        if other != number
    ]
    return 100 * float(np.mean(hits))


# --- overlap and CorLoc by hand ---


@pytest.mark.parametrize(
    ("box", "boxes", "expected"),
    [
        ((0, 0, 10, 10), [(0, 0, 10, 10)], 1.0),
        ((0, 0, 10, 10), [(0, 0, 10, 5)], 0.5),
        ((0, 0, 10, 10), [(5, 0, 15, 10)], 50 / 150),
        ((0, 0, 10, 10), [(10, 0, 20, 10)], 0.0),  # they only touch
        ((0, 0, 10, 10), [(50, 50, 60, 60), (2, 2, 10, 10), (90, 0, 91, 1)], 0.64),
        ((0.5, 0, 1.5, 1), [(0, 0, 2, 1)], 0.5),
    ],
)
def test_overlap_by_hand(box: tuple[float, ...], boxes: list[tuple[float, ...]], expected: float) -> None:
    assert best_overlap(box, boxes) == pytest.approx(expected)  # pyright: ignore[reportArgumentType]


def relabelled(data: BoxedData, boxes: list[list[tuple[float, ...]]]) -> BoxedData:
    images = tuple(
        replace(image, boxes=tuple(one)) for image, one in zip(data.val.images[: len(boxes)], boxes, strict=True)
    )
    return replace(data, splits=(replace(data.val, images=images),))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> BoxedData:
    """Four images; the box found in each is (32, 16, 64, 64): 32 wide, 48 high."""
    every = [scene((32, 16, 64, 64), seed=number) for number in range(4)]
    return open_boxed(write_folders(tmp_path_factory.mktemp("four"), every))


def test_an_overlap_of_a_half_counts_and_less_does_not(four: BoxedData) -> None:
    truth: list[list[tuple[float, ...]]] = [
        [(32, 16, 64, 40)],  # half of the box found
        [(32, 16, 64, 39.9)],
        [(0, 0, 8, 8), (32, 16, 96, 64)],  # twice the box found, and another box
        [(0, 0, 8, 8), (32, 0, 96, 64)],
    ]
    found = localise(source_of(), relabelled(four, truth), PLAIN)
    assert found.values.tolist() == [[100.0], [0.0], [100.0], [0.0]]
    assert found.scored() == {"CorLoc": 50.0}
    assert found.groups.tolist() == [0, 1, 2, 3]
    strict = localise(source_of(), relabelled(four, truth), DiscoveryOptions(iou=0.51))
    assert strict.values.any() == False  # noqa: E712
    lax = localise(source_of(), relabelled(four, truth), DiscoveryOptions(iou=0.3))
    assert lax.values.all()


def test_metric_names_match_those_of_results() -> None:
    assert [metric.name for metric in METRICS["discovery"]] == list(Localised.METRICS)


# --- from patches to pixels ---


def test_patch_boxes_map_to_image_pixels() -> None:
    whole = ((4, 6), 8, 8, (32, 48), (32, 48))
    assert on_image((1, 2, 4, 3), *whole) == (8, 16, 32, 24)
    assert on_image((0, 0, 6, 4), *whole) == (0, 0, 48, 32)
    doubled = ((4, 6), 8, 8, (32, 48), (64, 24))
    assert on_image((1, 2, 4, 3), *doubled) == (4, 32, 16, 48)
    assert on_image((0, 1, 6, 4), *doubled) == (0, 16, 24, 64)


def test_overlapping_patches_end_halfway_between_their_centres() -> None:
    """Patches of 8 every 4 pixels: centres at 4, 8, 12, ..., and the outer ones reach the border."""
    every = ((7, 7), 8, 4, (32, 32), (32, 32))
    assert on_image((1, 2, 3, 3), *every) == (6, 10, 14, 14)
    assert on_image((0, 6, 1, 7), *every) == (0, 26, 6, 32)
    assert on_image((0, 0, 7, 7), *every) == (0, 0, 32, 32)


# --- what CorLoc measures ---


@pytest.mark.parametrize("seed_by", ["degree", "norm"])
@pytest.mark.parametrize("centred", [False, True])
def test_planted_objects_are_all_found(data: BoxedData, seed_by: str, centred: bool) -> None:
    options = DiscoveryOptions(seed_by=seed_by, centred=centred)  # pyright: ignore[reportArgumentType]
    assert corloc(colours, data, options) == 100


@pytest.mark.parametrize("size", [None, 96, (64, 112), 48])
def test_objects_are_found_in_photos_of_any_size(tmp_path: Path, size: int | tuple[int, int] | None) -> None:
    """Boxes are in the photo's pixels, whatever size it is resized to."""
    every = [
        scene((30, 20, 90, 70), (101, 133)),
        scene((4, 60, 70, 110), (150, 90)),
        scene((100, 10, 190, 50), (61, 200)),
    ]
    mixed = open_boxed(write_folders(tmp_path, every))
    assert corloc(colours, mixed, DiscoveryOptions(size=size)) == 100


def test_better_features_score_better(data: BoxedData) -> None:
    def noisy(image: Tensor) -> Tensor:
        return colours(image) + 0.8 * unknowing(image)[..., :3]

    good, fair, bad = (corloc(model, data) for model in (colours, noisy, unknowing))
    assert good == 100
    assert bad + 20 < fair < good - 20
    assert bad < 30


def test_random_features_score_at_chance_level(data: BoxedData) -> None:
    chance = by_chance(boxes_found(unknowing, data), data)
    assert chance < 10
    assert corloc(unknowing, data) == pytest.approx(chance, abs=5)


def test_shuffled_boxes_score_at_chance_level(data: BoxedData) -> None:
    found = boxes_found(colours, data)
    chance = by_chance(found, data)
    assert chance < 10
    order = np.roll(np.arange(30), 7)
    shuffled = relabelled(data, [list(data.val.images[number].boxes) for number in order])
    assert corloc(colours, shuffled) == pytest.approx(chance, abs=8)


def test_localise_scores_the_boxes_of_lost(data: BoxedData) -> None:
    """Checked image by image, with an overlap that is computed here."""
    found = boxes_found(speckled, data)
    expected = [
        [100.0 if max(by_hand(box, one) for one in image.boxes) >= 0.5 else 0.0]
        for box, image in zip(found, data.val.images, strict=True)
    ]
    assert localise(source_of(speckled), data, PLAIN).values.tolist() == expected


def test_centring_finds_objects_hidden_by_a_common_offset(data: BoxedData) -> None:
    def lifted(image: Tensor) -> Tensor:
        return colours(image) + 1.0

    assert corloc(lifted, data) == 0  # finds the whole photo, of which the largest object is a quarter
    assert corloc(lifted, data, DiscoveryOptions(centred=True)) == 100


def test_k_changes_which_objects_are_found(data: BoxedData) -> None:
    """Checks that k is passed on to LOST."""
    scores = {
        k: localise(source_of(unknowing), data, DiscoveryOptions(k=k, iou=0.1)).values.tobytes() for k in (1, 144)
    }
    assert len(set(scores.values())) == 2


def test_frames_of_a_sequence_are_one_group(tmp_path: Path) -> None:
    every = scenes(6)
    films = open_boxed(write_davis(tmp_path, {"b": every[:3], "a": every[3:5], "c": every[5:]}))
    assert localise(source_of(), films, PLAIN).groups.tolist() == [0, 0, 1, 1, 1, 2]


def test_outcome_is_restored_from_its_arrays(data: BoxedData) -> None:
    found = localise(source_of(unknowing), data, PLAIN)
    again = Localised.of(found.arrays())
    assert np.array_equal(again.values, found.values) and np.array_equal(again.groups, found.groups)
    assert found.items == 30 and found.classes(data) == {}


def test_features_from_disk_and_other_batches_score_the_same(
    data: BoxedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = localise(source_of(speckled), data, PLAIN)
    steps: list[int] = []
    for times in (1, 2):
        cache = FeatureCache(tmp_path / "cache")
        found = localise(source_of(speckled), data, PLAIN, cache=cache, progress=lambda: steps.append(1))
        assert np.array_equal(found.values, first.values) and len(steps) == 30 * times
    assert len(list(tmp_path.rglob("*.safetensors"))) == 30
    monkeypatch.setattr("denoising_vit.evaluation.features.fitting_batch", lambda *_: 7)
    assert np.array_equal(localise(source_of(speckled), data, PLAIN).values, first.values)


# --- rejected input ---


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (DiscoveryOptions(k=0), "k must be at least 1, got 0"),
        (DiscoveryOptions(iou=0.0), "iou must be above 0 and at most 1, got 0"),
        (DiscoveryOptions(iou=1.01), "iou must be above 0 and at most 1, got 1.01"),
        (DiscoveryOptions(iou=math.nan), "iou must be above 0 and at most 1, got nan"),
        (DiscoveryOptions(seed_by="size"), "seed_by must be one of degree, norm, got 'size'"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_options_out_of_range_are_refused(
    data: BoxedData, tmp_path: Path, options: DiscoveryOptions, reason: str
) -> None:
    with pytest.raises(PlanError, match=reason):
        localise(source_of(), data, options)
    with pytest.raises(PlanError, match=reason):
        list(discovery(workbench(tmp_path, data), ["raw"], options))
    assert not (tmp_path / "results.jsonl").read_text()


def test_a_size_that_does_not_fit_the_patch_grid_is_refused(data: BoxedData, tmp_path: Path) -> None:
    for size in (GRID * PATCH + 3, (GRID * PATCH, GRID * PATCH + 3)):
        with pytest.raises(SizeError, match=r"99 pixels does not fit the patch grid"):
            localise(source_of(), data, DiscoveryOptions(size=size))
        with pytest.raises(SizeError, match=r"99 pixels does not fit the patch grid"):
            list(discovery(workbench(tmp_path, data), ["raw"], DiscoveryOptions(size=size)))


def test_non_finite_features_raise_with_the_source_name(data: BoxedData) -> None:
    source = ExtractorSource("the broken one", tiny_backbone(), lambda image: colours(image) * math.inf)
    with pytest.raises(EvaluationError, match=r"the broken one: \d+ of \d+ feature values are not finite"):
        localise(source, data, PLAIN)


def test_data_without_boxes_are_refused(tmp_path: Path) -> None:
    labelled = write_labelled(tmp_path / "data", coloured(1, 0), coloured(1, 1))
    bench = Workbench(
        data=labelled,
        backbone=tiny_backbone(),
        spec=BackboneSpec("tiny"),
        results=Results(tmp_path / "results.jsonl"),
        folder=tmp_path / "cache",
        run={},
    )
    with pytest.raises(EvaluationError, match="expected photos with boxes around their objects, got folders"):
        list(discovery(bench, ["raw"], PLAIN))


# --- end to end ---


class Counted:
    """An extractor that counts the images it processes."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, image: Tensor) -> Tensor:
        self.images += len(image)
        return colours(image)


def workbench(
    folder: Path,
    data: BoxedData,
    extractors: Mapping[str, Extractor] | None = None,
    watch: Progress = no_progress,
) -> Workbench:
    return Workbench(
        data=data,
        backbone=tiny_backbone(unknowing),
        spec=BackboneSpec("tiny"),
        results=Results(folder / "results.jsonl"),
        folder=folder / "cache",
        run=run_info(["evaluate"]),
        extractors=extractors or {},
        progress=watch,
    )


def test_sources_are_compared_with_the_first(data: BoxedData, tmp_path: Path) -> None:
    (raw, kept), (clean, _) = discovery(workbench(tmp_path, data, {"clean": colours}), ["raw", "clean"], PLAIN)
    assert not kept and raw["failed"] is None and clean["failed"] is None
    assert raw["task"] == "discovery" and raw["paired"] is None
    assert clean["metrics"] == {"CorLoc": 100.0}
    assert raw["metrics"]["CorLoc"] == corloc(unknowing, data)
    paired = clean["paired"]
    assert (paired["against"], paired["metric"], paired["over"]) == ("raw", "CorLoc", "images")
    assert paired["difference"] == pytest.approx(100 - raw["metrics"]["CorLoc"])
    assert 50 < paired["low"] < paired["difference"] < paired["high"]
    assert paired["groups"] == clean["images"]["val"]
    settings = clean["settings"]
    asked = {"seed_by": "degree", "k": 100, "iou": 0.5, "centred": False, "size": "native", "seeds": [0]}
    assert asked.items() <= settings.items()
    assert settings["data"]["layout"] == "masks" and clean["images"] == {"val": 30} and clean["skipped"] == []


def test_paired_interval_is_over_sequences_if_there_are_any(tmp_path: Path) -> None:
    every = scenes(6)
    films = open_boxed(write_davis(tmp_path / "data", {"a": every[:3], "b": every[3:]}))
    _, (line, _) = discovery(workbench(tmp_path, films, {"clean": colours}), ["raw", "clean"], PLAIN)
    assert line["paired"]["over"] == "sequences"
    assert line["settings"]["data"]["layout"] == "davis"


def test_repeats_and_other_options_reuse_cached_features(data: BoxedData, tmp_path: Path) -> None:
    extractor = Counted()
    first = list(discovery(workbench(tmp_path, data, {"clean": extractor}), ["raw", "clean"], PLAIN))
    assert extractor.images == 30
    before = (tmp_path / "results.jsonl").read_bytes()
    again = list(discovery(workbench(tmp_path, data, {"clean": extractor}), ["raw", "clean"], PLAIN))
    assert again == [(line, True) for line, _ in first] and extractor.images == 30
    assert (tmp_path / "results.jsonl").read_bytes() == before
    for number, options in enumerate(
        (
            DiscoveryOptions(seed_by="norm"),
            DiscoveryOptions(k=5),
            DiscoveryOptions(iou=0.7),
            DiscoveryOptions(centred=True),
        )
    ):
        ((_, kept),) = discovery(workbench(tmp_path, data, {"clean": extractor}), ["clean"], options)
        assert not kept and extractor.images == 30
        assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3 + number


@pytest.mark.parametrize("after", [4, 37])
def test_interrupted_comparison_resumes(data: BoxedData, tmp_path: Path, after: int) -> None:
    reported: list[tuple[str, int | None]] = []
    steps: list[int] = []

    @contextlib.contextmanager
    def stopping(what: str, total: int | None) -> Iterator[Callable[[], None]]:
        reported.append((what, total))

        def advance() -> None:
            steps.append(1)
            if len(steps) == after:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        list(discovery(workbench(tmp_path, data, {"clean": colours}, stopping), ["raw", "clean"], PLAIN))
    assert reported == [("raw: images", 30), ("clean: images", 30)][: 1 + after // 30]
    before = (tmp_path / "results.jsonl").read_bytes()
    assert before.count(b"\n") == after // 30
    extractor = Counted()
    lines = [line for line, _ in discovery(workbench(tmp_path, data, {"clean": extractor}), ["raw", "clean"], PLAIN)]
    assert extractor.images <= 30
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)
    straight = [
        line for line, _ in discovery(workbench(tmp_path / "other", data, {"clean": colours}), ["raw", "clean"], PLAIN)
    ]
    for ours, theirs in zip(lines, straight, strict=True):
        assert (ours["metrics"], ours["paired"]) == (theirs["metrics"], theirs["paired"])


def test_other_boxes_of_the_same_photos_give_another_result(data: BoxedData, tmp_path: Path) -> None:
    list(discovery(workbench(tmp_path, data, {"clean": colours}), ["clean"], PLAIN))
    elsewhere = relabelled(data, [[(0.0, 0.0, 4.0, 4.0)] for _ in range(30)])
    ((line, kept),) = discovery(workbench(tmp_path, elsewhere, {"clean": colours}), ["clean"], PLAIN)
    assert not kept and line["metrics"] == {"CorLoc": 0.0}


def test_failed_source_is_recorded_and_the_others_are_evaluated(data: BoxedData, tmp_path: Path) -> None:
    extractors = {"broken": lambda image: colours(image) * math.nan, "clean": colours}
    lines = [line for line, _ in discovery(workbench(tmp_path, data, extractors), ["raw", "broken", "clean"], PLAIN)]
    assert [bool(line["failed"]) for line in lines] == [False, True, False]
    assert "broken: " in lines[1]["failed"]
    written = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert written == lines


def test_stage_one_fields_are_evaluated(tmp_path: Path) -> None:
    """Frames of videos have one split only, and ids that contain folders."""
    films = open_boxed(write_davis(tmp_path / "data", {"a": scenes(1), "b": scenes(2)}))
    spec = spec_of(write_weights(tmp_path / f"{MODEL}.safetensors"))
    bench = replace(
        workbench(tmp_path, films), backbone=spec.load(), spec=spec, exact=DenoiseOptions(views=16, size=64)
    )
    lines = [line for line, _ in discovery(bench, ["raw", "exact"], DiscoveryOptions(size=64))]
    assert [line["failed"] for line in lines] == [None, None]
    assert lines[1]["paired"]["over"] == "sequences" and lines[1]["settings"]["size"] == 64


def test_separate_runs_give_the_same_results(data: BoxedData, tmp_path: Path) -> None:
    def run(folder: Path) -> list[tuple[object, object, object]]:
        bench = workbench(folder, data, {"speckled": speckled})
        return [
            (line["metrics"], line["paired"], line["settings"])
            for line, _ in discovery(bench, ["raw", "speckled"], PLAIN)
        ]

    assert run(tmp_path / "one") == run(tmp_path / "two")
