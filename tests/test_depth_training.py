"""Depth evaluation end to end: scores, blocks and groups, and resumed training."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from denoising_vit.backbones import BackboneSpec
from denoising_vit.environment import run_info
from denoising_vit.errors import EvaluationError, FitError, PlanError, SizeError
from denoising_vit.evaluation import probing
from denoising_vit.evaluation.data import EvaluationImage
from denoising_vit.evaluation.depth import (
    PAPER,
    QUICK,
    DepthData,
    DepthOptions,
    DepthProtocol,
    Depths,
    LinearDepth,
    depth,
    evaluate,
    open_depth,
    protocol,
)
from denoising_vit.evaluation.depth.probe import DepthProbe, depth_loss
from denoising_vit.evaluation.depth.samples import KeptDepth
from denoising_vit.evaluation.features import FeatureCache
from denoising_vit.evaluation.outcomes import paired_interval
from denoising_vit.evaluation.results import Results
from denoising_vit.evaluation.sources import ExtractorSource
from denoising_vit.evaluation.workbench import Workbench
from denoising_vit.extractors import Extractor
from denoising_vit.progress import Progress, no_progress
from denoising_vit.views.crops import Crop
from tiny_depth import (
    backbone,
    blocky,
    data_of,
    flat,
    noisy,
    set_of,
    source_of,
    telling,
    write_pairs,
    write_splits,
)
from tiny_labelled import coloured, write_labelled

pytestmark = pytest.mark.usefixtures("one_thread")

#: Short training: the presets with only size, length and learning rate changed.
FAST = replace(QUICK, steps=32, warmup=4, batch=4, learning_rate=0.4, bins=32)
TINY = replace(PAPER, steps=40, warmup=4, batch=2, learning_rate=0.4, bins=32, mean_first=3, crop=(16, 24))

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> DepthData:
    """Eight photos without splits, four blocks."""
    return data_of(tmp_path_factory.mktemp("depth") / "rooms", blocky(8, 0), blocks=4)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> DepthData:
    root = write_splits(tmp_path_factory.mktemp("depth") / "splits", blocky(6, 1), blocky(5, 2))
    return open_depth(root)


def probes(
    source: ExtractorSource, data: DepthData, how: DepthProtocol = FAST, seeds: Sequence[int] = (0,), **more: Any
) -> list[tuple[int, Depths, list[list[Any]]]]:
    return list(LinearDepth(source, data, how, **more).probes(seeds))


def rmse(model: Callable[[Tensor], Tensor], data: DepthData, how: DepthProtocol = FAST) -> float:
    ((_, found, _),) = probes(source_of(model), data, how)
    return found.scored()["RMSE"]


# --- Samples of whole images


def numbered(images: int, batch: int, seed: int = 0) -> KeptDepth:
    """Images of 2 x 2 patches; the feature is the image's number, the depth that number plus 1, in metres."""
    features = [torch.full((2, 2, 1), float(number)) for number in range(images)]
    truths = [torch.full((2, 2), float(number + 1)) for number in range(images)]
    return KeptDepth(features, [], truths, replace(QUICK, batch=batch), CPU, seed)


class Recording(DepthProbe):
    """Records the images it is given."""

    def __init__(self) -> None:
        super().__init__(1, 4, 0.001, 10.0, 4, 0)
        self.seen: list[int] = []

    def at_patches(self, features: Tensor, token: Tensor | None) -> Tensor:
        self.seen += features[:, 0, 0, 0].int().tolist()
        return super().at_patches(features, token)


def order_of(samples: KeptDepth, steps: int) -> list[int]:
    probe = Recording()
    for step in range(steps):
        samples.loss(probe, step)
    return probe.seen


def test_each_epoch_has_every_image_once_in_an_order_set_by_the_seed() -> None:
    order = order_of(numbered(7, 3, seed=1), 7)
    epochs = [tuple(order[start : start + 7]) for start in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(epochs)) == 3
    assert order_of(numbered(7, 3, seed=1), 7) == order
    assert order_of(numbered(7, 3, seed=2), 7) != order


def test_batch_larger_than_the_data_has_each_image_once() -> None:
    assert [sorted(order_of(numbered(3, 16), 4)[start : start + 3]) for start in (0, 3, 6, 9)] == [[0, 1, 2]] * 4


def test_step_loss_weights_each_grid_by_its_images(tmp_path: Path) -> None:
    pictures = [*blocky(2, 0), *blocky(1, 1, (24, 40))]
    kept = KeptDepth.take(source_of(), set_of(tmp_path, pictures), replace(QUICK, batch=3, mean_first=1), None)
    probe = DepthProbe(6, 8, 0.001, 10.0, 4, seed=0)
    for step in (0, 1):
        total = torch.zeros(())
        for places in ([0, 1], [2]):
            features, token, truth = (
                torch.stack([values[place] for place in places]).float()
                for values in (kept.features, kept.tokens, kept.truths)
            )
            part = depth_loss(probe.at_patches(features, token), truth, 0.5, mean_only=step == 0)
            total = total + part * len(places) / 3
        assert float(kept.loss(probe, step).detach()) == pytest.approx(float(total.detach()), rel=1e-5)


# --- Scores


@pytest.mark.parametrize("how", [FAST, TINY], ids=["quick", "paper"])
def test_features_with_depth_score_better_than_noise(rooms: DepthData, how: DepthProtocol) -> None:
    good, bad = rmse(telling, rooms, how), rmse(noisy, rooms, how)
    assert good < 0.8 < bad - 0.2


def test_shuffled_depth_scores_like_predicting_the_mean(tmp_path: Path) -> None:
    pictures = blocky(12, 3)
    shuffled = [(photo, pictures[(number + 5) % 12][1]) for number, (photo, _) in enumerate(pictures)]
    data = data_of(tmp_path / "shuffled", shuffled, blocks=3)
    chance = []
    for number, (_, metres) in enumerate(shuffled):
        others = np.concatenate([other for place, (_, other) in enumerate(shuffled) if place // 4 != number // 4])
        chance.append(np.sqrt(np.mean((metres - np.exp(np.log(others).mean())) ** 2)))
    found = rmse(telling, data)
    assert found == pytest.approx(np.mean(chance), rel=0.1)
    assert rmse(telling, data_of(tmp_path / "whole", pictures, blocks=3)) < 0.7 * found


def test_both_presets_learn_on_photos_of_sizes_off_the_patch_grid(tmp_path: Path) -> None:
    sizes = [(33, 50), (47, 31), (29, 90), (32, 48)]
    pictures = [blocky(1, number, sizes[number % 4])[0] for number in range(8)]
    data = data_of(tmp_path / "mixed", pictures)
    for how in (FAST, TINY):
        ((_, found, curve),) = probes(source_of(), data, how)
        assert found.scored()["RMSE"] < 0.85
        assert curve[-1][1] < curve[0][1] and curve[-1][0] == how.steps
        assert [look is not None for _, _, look in curve] == [how is FAST] * 8


def test_each_seed_has_its_own_order(rooms: DepthData, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    usual = KeptDepth.loss

    def loss(self: KeptDepth, probe: DepthProbe, step: int) -> Tensor:
        seen.append(self.seed)
        return usual(self, probe, step)

    monkeypatch.setattr(KeptDepth, "loss", loss)
    probes(source_of(), rooms, replace(FAST, steps=2), (3, 5))
    assert seen == [3] * 8 + [5] * 8


def test_curve_evaluates_the_first_block_and_changes_no_result(rooms: DepthData) -> None:
    (found, again) = probes(source_of(), rooms, replace(FAST, steps=16), (0, 1))
    assert len(found[2]) == 8 and all(look is not None for _, _, look in found[2])
    assert all(look is None for _, _, look in again[2])
    assert found[2][-1][2] == pytest.approx(found[1].values[:2, 0].mean())
    ((_, alone, _),) = probes(source_of(), rooms, replace(FAST, steps=16), (1,))
    assert np.array_equal(alone.values, again[1].values)


# --- Blocks, splits and groups


def test_groups_are_the_blocks(rooms: DepthData) -> None:
    ((_, found, _),) = probes(source_of(), rooms, replace(FAST, steps=2))
    assert found.items == 8
    assert found.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("how", [FAST, TINY], ids=["quick", "paper"])
def test_with_two_splits_each_photo_is_its_own_group(splits: DepthData, how: DepthProtocol) -> None:
    ((_, found, _),) = probes(source_of(), splits, replace(how, steps=2, warmup=0))
    assert found.groups.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_probe_is_not_trained_on_its_block_or_the_photos_next_to_it(
    tmp_path: Path, rooms: DepthData, preset: str
) -> None:
    """Changing the depth there changes no probe; changing it elsewhere does."""
    how = replace(FAST if preset == "quick" else TINY, steps=4, warmup=0, batch=8)
    kept: list[list[float]] = []
    usual = evaluate.evaluate_probe
    for changed in ((), (3, 4, 5, 6), (0, 7)):
        pictures = blocky(8, 0)
        for place in changed:
            pictures[place] = pictures[place][0], pictures[place][1][::-1, ::-1]
        data = data_of(tmp_path / f"{len(changed)}", pictures, blocks=4)
        weights: list[float] = []

        def judge(probe: DepthProbe, *args: Any, weights: list[float] = weights, **more: Any) -> np.ndarray:
            weights.append(float(probe.weigh.weight.detach().double().sum()))
            return usual(probe, *args, **more)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(evaluate, "evaluate_probe", judge)
            probes(source_of(), data, how)
        kept.append(weights[-4:])
    plain, inside, outside = kept
    assert plain[2] == inside[2] and plain[2] != outside[2]
    assert plain[0] != inside[0]


def test_evaluated_photos_are_those_of_the_block(rooms: DepthData) -> None:
    """With one bin the prediction is constant, so each photo has its own error, in the order of the photos."""
    ((_, found, _),) = probes(source_of(), rooms, replace(FAST, steps=1, warmup=0, bins=1, nearest=0.5))
    wanted = [np.sqrt(np.mean((metres.round(3) - 0.5) ** 2)) for _, metres in blocky(8, 0)]
    np.testing.assert_allclose(found.values[:, 0], wanted, atol=1e-4)


# --- Determinism and resumed training


@pytest.mark.parametrize("how", [FAST, TINY], ids=["quick", "paper"])
def test_same_seed_gives_the_same_bits_and_others_differ(splits: DepthData, how: DepthProtocol) -> None:
    short = replace(how, steps=8, warmup=2)
    first, again, other = (probes(source_of(), splits, short, (seed,))[0] for seed in (0, 0, 1))
    assert np.array_equal(first[1].values, again[1].values) and first[2] == again[2]
    assert not np.array_equal(first[1].values, other[1].values)
    both = probes(source_of(), splits, short, (1, 0))
    assert [seed for seed, _, _ in both] == [1, 0]
    assert np.array_equal(both[1][1].values, first[1].values)


def test_cached_features_give_the_same_bits(tmp_path: Path, splits: DepthData) -> None:
    short = replace(FAST, steps=8)
    plain = probes(source_of(), splits, short)[0][1].values
    for _ in range(2):
        cached = probes(source_of(), splits, short, cache=FeatureCache(tmp_path / "cache"))[0][1].values
        assert np.array_equal(plain, cached)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 22  # features and class tokens of 11 photos


class Stop(Exception):
    pass


class Counting(ExtractorSource):
    """Counts the requested crops of the training size."""

    def __init__(self) -> None:
        super().__init__("raw", backbone())
        self.asked = 0

    def inputs(self, image: EvaluationImage, crop: Crop, colour: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        self.asked += crop.size == TINY.crop
        return super().inputs(image, crop, colour)


def stopping(after: int) -> Progress:
    """Raise `Stop` after that many steps in total over all training runs."""
    left = [after]

    @contextlib.contextmanager
    def watch(what: str, _total: int | None) -> Iterator[Callable[[], None]]:
        def advance() -> None:
            left[0] -= what.endswith("steps")
            if not left[0]:
                raise Stop

        yield advance

    return watch


@pytest.mark.parametrize("stopped", [5, 8, 18])
def test_interrupted_training_resumes_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    """Interrupted in the first block of two, or in the second."""
    monkeypatch.setattr(probing, "_CHECKPOINT_EVERY", 3)
    data = data_of(tmp_path / "rooms", blocky(6, 0))
    how = replace(TINY, steps=11, warmup=2, mean_first=4)
    ((_, straight, curve),) = probes(Counting(), data, how)
    folder = tmp_path / "checkpoints"
    with pytest.raises(Stop):
        probes(Counting(), data, how, checkpoints=folder, progress=stopping(stopped))
    assert sorted(path.name for path in folder.iterdir()) == (["0-0.pt"] if stopped < 11 else ["0-0.pt", "0-1.pt"])
    source = Counting()
    ((_, found, looks),) = probes(source, data, how, checkpoints=folder)
    assert np.array_equal(found.values, straight.values)
    assert looks == curve
    steps = {5: 8 + 11, 8: 5 + 11, 18: 2 + 5}[stopped]  # checkpoints after 3, after 6, and after 9 and 6 of 11
    assert source.asked == 2 * steps + 2  # plus one in each block for the number of channels


def test_each_seed_and_block_has_its_own_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_CHECKPOINT_EVERY", 2)
    data = data_of(tmp_path / "rooms", blocky(4, 0))
    how = replace(TINY, steps=3, warmup=0)
    probes(source_of(), data, how, (0, 4), checkpoints=tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["0-0.pt", "0-1.pt", "4-0.pt", "4-1.pt"]
    probes(source_of(), data, replace(FAST, steps=3), checkpoints=tmp_path / "quick")
    assert not (tmp_path / "quick").exists()


def test_diverging_loss_suggests_a_smaller_learning_rate(splits: DepthData) -> None:
    with pytest.raises(FitError, match=r"loss is nan at step \d+; try a smaller learning_rate"):
        probes(source_of(lambda image: telling(image) * 3e4), splits, replace(FAST, learning_rate=1e38))


# --- Photos without depth


def test_curve_has_no_score_for_photos_without_evaluated_depth(tmp_path: Path) -> None:
    pictures = [flat(20), flat(30), *blocky(4, 0)]
    data = data_of(tmp_path / "far", pictures)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((_, found, curve),) = probes(source_of(), replace(data, blocks=3), replace(FAST, steps=8))
    assert np.isnan(found.values[:2]).all() and not np.isnan(found.values[2:]).any()
    assert [look for _, _, look in curve] == [None] * 8


@pytest.mark.parametrize("how", [FAST, TINY], ids=["quick", "paper"])
def test_training_photos_without_depth_in_range_are_rejected(tmp_path: Path, how: DepthProtocol) -> None:
    root = write_splits(tmp_path / "far", [flat(20), flat(30)], blocky(2, 0))
    with pytest.raises(EvaluationError, match=r"none of .* below 10 m.*--farthest"):
        probes(source_of(), open_depth(root), replace(how, steps=3))


# --- Comparisons


def bench_of(
    folder: Path, data: Any, extractors: Mapping[str, Extractor] | None = None, watch: Progress = no_progress
) -> Workbench:
    return Workbench(
        data=data,
        backbone=backbone(noisy),
        spec=BackboneSpec("tiny"),
        results=Results(folder / "results.jsonl"),
        folder=folder / "cache",
        run=run_info(["evaluate", "depth"]),
        extractors=extractors or {"clean": telling},
        progress=watch,
    )


QUICKLY = DepthOptions(seeds=(0, 1), steps=25, batch=4, learning_rate=0.4)


def test_comparison_shows_which_features_are_better(tmp_path: Path, rooms: DepthData) -> None:
    (raw, _), (clean, _) = depth(bench_of(tmp_path, rooms), ["raw", "clean"], QUICKLY)
    assert (raw["task"], raw["failed"], clean["failed"]) == ("depth", None, None)
    assert list(clean["metrics"]) == ["RMSE", "AbsRel", "log10", "a1", "a2", "a3"]
    paired = clean["paired"]
    assert (paired["against"], paired["metric"], paired["over"]) == ("raw", "RMSE", "blocks")
    assert paired["difference"] == pytest.approx(clean["metrics"]["RMSE"] - raw["metrics"]["RMSE"])
    assert paired["difference"] < 0  # lower is better
    assert (paired["low"], paired["high"], paired["groups"]) == (None, None, 4)  # too few groups for an interval
    assert clean["metrics"]["a1"] > raw["metrics"]["a1"] + 5
    for line in (raw, clean):
        each = [seed["RMSE"] for seed in line["seeds"]]
        assert line["metrics"]["RMSE"] == pytest.approx(np.mean(each)) and each[0] != each[1]
        settings = line["settings"]
        assert (settings["preset"], settings["steps"], settings["blocks"]) == ("quick", 25, 4)
        assert settings["size"] == "native" and settings["data"]["layout"] == "folders"
        assert line["images"] == {"val": 8} and line["classes"] == {} and len(line["curve"]) == 8


def test_comparison_of_splits_has_an_interval_over_images(tmp_path: Path, splits: DepthData) -> None:
    short = replace(QUICKLY, steps=5)
    _, (clean, _) = depth(bench_of(tmp_path, splits), ["raw", "clean"], short)
    assert clean["paired"]["over"] == "images"
    how = short.protocol()
    ours, theirs = (
        [found for _, found, _ in probes(ExtractorSource(name, backbone(noisy), model), splits, how, (0, 1))]
        for name, model in (("clean", telling), ("raw", None))
    )
    expected = paired_interval(ours, theirs)
    assert clean["paired"]["difference"] == pytest.approx(expected.difference)
    assert (clean["paired"]["low"], clean["paired"]["high"]) == pytest.approx((expected.low, expected.high))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_repeating_a_comparison_keeps_the_results(tmp_path: Path, rooms: DepthData) -> None:
    seen: list[int] = []

    def counted(image: Tensor) -> Tensor:
        seen.append(len(image))
        return telling(image)

    options = replace(QUICKLY, steps=4)
    first = list(depth(bench_of(tmp_path, rooms, {"clean": counted}), ["raw", "clean"], options))
    before = (tmp_path / "results.jsonl").read_bytes()
    assert sum(seen) == 8  # each photo once, for all seeds, blocks and evaluations
    again = list(depth(bench_of(tmp_path, rooms, {"clean": counted}), ["raw", "clean"], options))
    assert again == [(line, True) for line, _ in first]
    assert (tmp_path / "results.jsonl").read_bytes() == before and sum(seen) == 8


@pytest.mark.parametrize(
    "changes", [{"steps": 5}, {"gradient": 0.0}, {"farthest": 8.0}, {"size": (24, 48)}, {"weight_decay": 0.5}]
)
def test_other_options_give_a_new_result(tmp_path: Path, rooms: DepthData, changes: dict[str, Any]) -> None:
    options = replace(QUICKLY, steps=4, seeds=(0,))
    list(depth(bench_of(tmp_path, rooms), ["clean"], options))
    ((line, kept),) = depth(bench_of(tmp_path, rooms), ["clean"], replace(options, **changes))
    assert not kept and line["failed"] is None
    first, second = lines_of(tmp_path)
    assert first["metrics"] != second["metrics"]


def test_other_blocks_or_scale_give_a_new_result(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "rooms", blocky(8, 0))
    options = replace(QUICKLY, steps=2, seeds=(0,))
    for blocks, scale in ((2, 1000), (4, 1000), (2, 2000)):
        data = open_depth(root, blocks=blocks, scale=scale)
        ((line, kept),) = depth(bench_of(tmp_path, data), ["clean"], options)
        assert not kept and line["settings"]["blocks"] == blocks
    assert len({line["metrics"]["RMSE"] for line in lines_of(tmp_path)}) == 3


def test_only_added_seeds_are_trained(tmp_path: Path, rooms: DepthData) -> None:
    options = replace(QUICKLY, steps=4, seeds=(0,))
    ((one, _),) = depth(bench_of(tmp_path, rooms), ["clean"], options)
    trained: list[str] = []

    @contextlib.contextmanager
    def watch(what: str, _total: int | None) -> Iterator[Callable[[], None]]:
        trained.append(what)
        yield lambda: None

    ((two, kept),) = depth(bench_of(tmp_path, rooms, watch=watch), ["clean"], replace(options, seeds=(0, 1)))
    assert not kept
    assert [what for what in trained if what.endswith("steps")] == [
        f"clean, seed 1, block {number} of 4: steps" for number in range(1, 5)
    ]
    assert two["seeds"][0] == one["seeds"][0] and two["curve"] == one["curve"]


def test_interrupted_comparison_resumes(tmp_path: Path, rooms: DepthData) -> None:
    options = replace(QUICKLY, steps=4)
    with pytest.raises(Stop):
        # The first seed of the second source is finished.
        stop_in_the_last_seed(tmp_path, rooms, options)
    before = (tmp_path / "results.jsonl").read_bytes()
    assert before.count(b"\n") == 1
    results = list(depth(bench_of(tmp_path, rooms), ["raw", "clean"], options))
    assert [kept for _, kept in results] == [True, False]
    straight = list(depth(bench_of(tmp_path / "other", rooms), ["raw", "clean"], options))
    for (ours, _), (theirs, _) in zip(results, straight, strict=True):
        assert (ours["metrics"], ours["paired"], ours["curve"]) == (
            theirs["metrics"],
            theirs["paired"],
            theirs["curve"],
        )


def stop_in_the_last_seed(folder: Path, data: DepthData, options: DepthOptions) -> None:
    @contextlib.contextmanager
    def watch(what: str, _total: int | None) -> Iterator[Callable[[], None]]:
        if what.startswith("clean, seed 1, block 3"):
            raise KeyboardInterrupt
        yield lambda: None

    try:
        list(depth(bench_of(folder, data, watch=watch), ["raw", "clean"], options))
    except KeyboardInterrupt as error:
        raise Stop from error


def test_paper_comparison_resumes_from_checkpoints(
    tmp_path: Path, rooms: DepthData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "_CHECKPOINT_EVERY", 3)
    monkeypatch.setattr(protocol, "PAPER", TINY)
    data = replace(rooms, blocks=2)
    options = DepthOptions("paper", seeds=(0,), steps=8)
    straight = list(depth(bench_of(tmp_path / "straight", data), ["raw"], options))
    done = []

    @contextlib.contextmanager
    def watch(_what: str, _total: int | None) -> Iterator[Callable[[], None]]:
        def advance() -> None:
            done.append(1)
            if len(done) == 7:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        list(depth(bench_of(tmp_path, data, watch=watch), ["raw"], options))
    (kept,) = (tmp_path / "cache" / "checkpoints").rglob("*.pt")
    state = torch.load(kept, weights_only=True)
    assert state["step"] == 6
    results = list(depth(bench_of(tmp_path, data), ["raw"], options))
    assert results[0][0]["metrics"] == straight[0][0]["metrics"]
    assert results[0][0]["settings"]["features"] == {"normalisation": "imagenet"}


def test_paper_preset_rejects_stage_one_fields_before_computing(tmp_path: Path, rooms: DepthData) -> None:
    with pytest.raises(EvaluationError, match=r"exact: stage 1 fields .*--preset quick"):
        list(depth(bench_of(tmp_path, rooms), ["raw", "exact"], DepthOptions("paper", steps=2)))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_paper_preset_rejects_a_photo_smaller_than_its_crops(tmp_path: Path) -> None:
    data = data_of(tmp_path / "rooms", [*blocky(5, 0), *blocky(1, 1, (15, 48))])
    source = Counting()
    with pytest.raises(EvaluationError, match=r"05\.png: 48 x 15 pixels are smaller than .* crops of 24 x 16; .*quick"):
        probes(source, data, replace(TINY, steps=4, warmup=0, batch=1))
    assert source.asked == 0


def test_data_without_depth_are_refused(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "labelled", coloured(2, 0), coloured(2, 1))
    with pytest.raises(EvaluationError, match="labelled: expected photos with depth maps, got folders"):
        list(depth(bench_of(tmp_path, data), ["raw"], QUICKLY))


def test_options_out_of_range_are_refused_before_anything_is_written(tmp_path: Path, rooms: DepthData) -> None:
    for options, kind in ((DepthOptions(steps=0), PlanError), (DepthOptions(size=50), SizeError)):
        with pytest.raises(kind):
            list(depth(bench_of(tmp_path, rooms), ["raw"], options))
    assert lines_of(tmp_path) == []
