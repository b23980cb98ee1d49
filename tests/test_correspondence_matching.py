"""Keypoint matching: compared with plain loops, on photos with known answers, and with unusable input."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from denoising_vit.errors import EvaluationError, PhotoError, PlanError, SizeError
from denoising_vit.evaluation.correspondence import (
    Matched,
    MatchingOptions,
    PairData,
    open_correspondence,
    open_pairs,
)
from denoising_vit.evaluation.correspondence import keypoint_matching as kp
from denoising_vit.evaluation.correspondence import match as errors_of
from denoising_vit.evaluation.correspondence.keypoint_matching import forward_passes
from denoising_vit.evaluation.features import FeatureCache
from denoising_vit.evaluation.patches import at_points
from denoising_vit.evaluation.sources import FeatureSource
from tiny_correspondence import marked, moving, pair_of, shuffled, write_davis, write_pair, write_spair
from tiny_labelled import PATCH, colours, source_of, speckled

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [(0, 1), (1, 0), (0, 2), (3, 1), (2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_spair(tmp_path_factory.mktemp("spair"), PAIRS)


@pytest.fixture(scope="module")
def data(folder: Path) -> PairData:
    return open_pairs(folder)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Pairs that a test may modify."""
    return write_spair(tmp_path / "own", PAIRS)


def match(source: FeatureSource, data: PairData, options: MatchingOptions, **more: Any) -> Matched:
    """Match at the alpha of the options if there is only one, else at 0.1."""
    alpha = options.alpha[0] if len(options.alpha) == 1 else 0.1
    return Matched.within(errors_of(source, data, options, **more), alpha)


# --- the pieces ---


@pytest.mark.parametrize("stride", [8, 4])
def test_features_between_patches_are_bilinear(stride: int) -> None:
    features = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    points = np.array([[9.0, 11.0], [0.0, 0.0], [30.5, 3.25], [4.0, 4.0], [1e3, 1e3]])
    found = at_points(features, points, 8, stride)
    for (row, column), feature in zip(points, found, strict=True):
        y, x = (min(max((place - 4) / stride, 0), n - 1) for place, n in ((row, 4), (column, 5)))
        i, j = min(int(y), 2), min(int(x), 3)
        a, b = y - i, x - j
        expected = (1 - a) * ((1 - b) * features[i, j] + b * features[i, j + 1]) + a * (
            (1 - b) * features[i + 1, j] + b * features[i + 1, j + 1]
        )
        assert torch.allclose(feature, expected, atol=1e-6)


@pytest.mark.parametrize("upsample", [1, 2, 3])
@pytest.mark.parametrize("at_once", [1, 40, 2**24])
def test_best_places_match_plain_loops(monkeypatch: pytest.MonkeyPatch, upsample: int, at_once: int) -> None:
    """For any number of places compared at once."""
    monkeypatch.setattr(kp, "_AT_ONCE", at_once)
    chance = torch.Generator().manual_seed(1)
    target, queries = torch.randn(4, 5, 3, generator=chance), torch.randn(7, 3, generator=chance)
    found = kp.best_places(queries, target, 8, 8, upsample)
    planes = target.permute(2, 0, 1)[None]
    finer = F.interpolate(planes, scale_factor=upsample, mode="bilinear") if upsample > 1 else planes
    for query, place in zip(queries, found, strict=True):
        best, where = -math.inf, (0.0, 0.0)
        for i in range(4 * upsample):
            for j in range(5 * upsample):
                cosine = float(F.cosine_similarity(query, finer[0, :, i, j], dim=0))
                if cosine > best + 1e-7:
                    best, where = cosine, ((i + 0.5) * 8 / upsample, (j + 0.5) * 8 / upsample)
        assert place.tolist() == pytest.approx(where)


def test_places_of_overlapping_patches_are_their_centres() -> None:
    target = torch.zeros(2, 3, 1)
    target[1, 2] = 1
    assert kp.best_places(torch.ones(1, 1), target, 8, 4).tolist() == [[8, 12]]


def test_first_of_equal_places_is_taken() -> None:
    assert kp.best_places(torch.ones(2, 1), torch.ones(3, 4, 1), 8, 8).tolist() == [[4, 4]] * 2


def test_to_shown_and_from_shown_are_inverse() -> None:
    points = [(0.0, 0.0), (99.5, 49.5), (20.0, 31.0)]
    places = kp.to_shown(points, 50, 100, (24, 32))
    assert places[0].tolist() == pytest.approx([0.24, 0.16])  # the centre of the first pixel
    assert places[1].tolist() == pytest.approx([24, 32])
    assert kp.from_shown(places, 50, 100, (24, 32)).tolist() == [pytest.approx(point) for point in points]


def test_pck_by_hand_at_four_alphas() -> None:
    """An error equal to alpha counts as correct. PCK averages over pairs, PCK per point over keypoints."""
    errors = [np.array([5, 7.4, 10, 0]) / 50, np.array([0.04])]
    scores = [Matched.within(errors, alpha).scored() for alpha in (0.05, 0.1, 0.15, 0.2)]
    assert [found["PCK"] for found in scores] == [62.5, 75, 87.5, 100]
    assert [found["PCK per point"] for found in scores] == pytest.approx([40, 60, 80, 100])


# --- matches ---


def test_keypoints_with_distinct_colours_are_found(data: PairData) -> None:
    found = match(source_of(colours), data, MatchingOptions(alpha=(1e-6,)))
    assert found.values.tolist() == [[100.0, 4.0]] * len(PAIRS)
    assert found.groups.tolist() == list(range(len(PAIRS)))
    assert found.scored() == {"PCK": 100.0, "PCK per point": 100.0}


def pck_by_loops(model: Callable[[Tensor], Tensor], folder: Path, alpha: float) -> list[float]:
    """PCK of each pair, from the files and keypoint by keypoint; keypoints are at patch centres."""
    shares = []
    for path in sorted((folder / "PairAnnotation" / "test").iterdir()):
        pair = json.loads(path.read_text())
        maps = []
        for name in (pair["src_imname"], pair["trg_imname"]):
            pixels = np.array(Image.open(folder / "JPEGImages" / pair["category"] / name))
            maps.append(model(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0].half().float())
        x0, y0, x1, y1 = pair["trg_bndbox"]
        right = 0
        for (x, y), wanted in zip(pair["src_kps"], pair["trg_kps"], strict=True):
            query = maps[0][int(y) // PATCH, int(x) // PATCH]
            cosines = F.cosine_similarity(query, maps[1], dim=-1)
            i, j = divmod(int(cosines.argmax()), cosines.shape[1])
            place = (PATCH * (j + 0.5) - 0.5, PATCH * (i + 0.5) - 0.5)
            right += math.dist(place, wanted) <= alpha * max(y1 - y0, x1 - x0)
        shares.append(100 * right / len(pair["src_kps"]))
    return shares


@pytest.mark.parametrize("alpha", [0.1, 0.35])
@pytest.mark.parametrize("model", [speckled, shuffled])
def test_pck_matches_plain_loops(data: PairData, folder: Path, model: Callable[[Tensor], Tensor], alpha: float) -> None:
    found = match(source_of(model), data, MatchingOptions(alpha=(alpha,)))
    assert found.values[:, 0].tolist() == pytest.approx(pck_by_loops(model, folder, alpha))
    assert found.values.mean() < 75


def test_threshold_is_relative_to_the_larger_side_of_the_box(own: Path) -> None:
    """The box is that of the target; each match is 8 pixels away from the annotated keypoint."""
    for path in (own / "PairAnnotation" / "test").iterdir():
        path.unlink()
    moved = [[x + 8 if x < 88 else x - 8, y] for x, y in marked(1)[1]]
    for number, box in enumerate(([0, 0, 79, 30], [0, 0, 30, 80], [10, 10, 91, 12])):
        write_pair(own, f"{number}", pair_of(0, 1, trg_kps=moved, trg_bndbox=box))
    found = match(source_of(colours), open_pairs(own), MatchingOptions())
    assert found.values[:, 0].tolist() == [0, 100, 100]


def test_pck_weights_pairs_equally(own: Path) -> None:
    """PCK averages over pairs; per point, 1 of 5 keypoints is correct."""
    shutil.rmtree(own / "PairAnnotation")
    good, bad = pair_of(0, 1), pair_of(0, 2, trg_kps=[[0.0, 0.0]] * 4)
    write_pair(own, "0", good | {"src_kps": good["src_kps"][:1], "trg_kps": good["trg_kps"][:1]})
    write_pair(own, "1", bad | {"trg_bndbox": [0, 0, 5, 5]})
    assert match(source_of(colours), open_pairs(own), MatchingOptions()).scored() == {
        "PCK": 50.0,
        "PCK per point": 20.0,
    }


def test_better_features_have_higher_pck(data: PairData) -> None:
    scores = [match(source_of(model), data, MatchingOptions()).scored()["PCK"] for model in (colours, speckled)]
    chance = match(source_of(shuffled), data, MatchingOptions()).scored()["PCK"]
    assert chance < 20 and chance < scores[1] < scores[0] == 100


def test_upsampling_locates_keypoints_between_patches(tmp_path: Path) -> None:
    """The keypoints lie on borders between patches; only the interpolated map contains their positions."""
    height, width = 8, 96
    x = np.linspace(0, 1, width)
    ramp = np.stack([255 * x, 255 * (1 - x), np.full(width, 40)], -1)[None].repeat(height, 0).astype(np.uint8)
    (tmp_path / "JPEGImages" / "ramp").mkdir(parents=True)
    for name in ("a", "b"):
        Image.fromarray(ramp).save(tmp_path / "JPEGImages" / "ramp" / f"{name}.png")
    points = [[39.5, 3.5], [55.5, 3.5]]  # on the borders of patches
    content = pair_of(0, 1, category="ramp", src_imname="a.png", trg_imname="b.png", src_kps=points, trg_kps=points)
    write_pair(tmp_path, "0", content | {"src_imsize": [96, 8, 3], "trg_imsize": [96, 8, 3]})
    rough, fine = (
        match(source_of(colours), open_pairs(tmp_path), MatchingOptions(alpha=(3.5 / 96,), upsample=upsample)).scored()
        for upsample in (1, 4)
    )
    assert (rough["PCK"], fine["PCK"]) == (0, 100)


def test_photos_of_any_size_are_matched_in_their_own_pixels(own: Path) -> None:
    """They are resized to the nearest size of whole patches, or to the given size."""
    pixels, points = marked(1)
    larger = np.array(Image.fromarray(pixels).resize((193, 129), Image.Resampling.NEAREST))
    Image.fromarray(larger).save(own / "JPEGImages" / "mark" / "01.png")
    shutil.rmtree(own / "PairAnnotation")
    scaled = [[(x + 0.5) * 193 / 96 - 0.5, (y + 0.5) * 129 / 64 - 0.5] for x, y in points]
    write_pair(own, "0", pair_of(0, 1, trg_kps=scaled, trg_imsize=[193, 129, 3], trg_bndbox=[0, 0, 193, 129]))
    write_pair(own, "1", pair_of(1, 0, src_kps=scaled, src_imsize=[193, 129, 3]))
    for size in (None, (64, 96)):
        found = match(source_of(colours), open_pairs(own), MatchingOptions(size=size, alpha=(0.04,)))
        assert found.values[:, 0].tolist() == [100, 100]


def test_each_photo_has_one_pass_as_source_and_one_as_target(tmp_path: Path, data: PairData) -> None:
    seen: list[int] = []
    steps: list[int] = []

    def model(image: Tensor) -> Tensor:
        seen.append(len(image))
        return colours(image)

    match(source_of(model), data, MatchingOptions(), progress=lambda: steps.append(1))
    assert sum(seen) == len(steps) == forward_passes(data) == 8
    seen.clear()
    cache = FeatureCache(tmp_path)
    match(source_of(model), data, MatchingOptions(), cache=cache)
    match(source_of(model), data, MatchingOptions(upsample=2), cache=cache)
    assert sum(seen) == 4


def test_matching_is_deterministic(data: PairData) -> None:
    first, again = (match(source_of(speckled), data, MatchingOptions(alpha=(0.3,))) for _ in range(2))
    assert np.array_equal(first.values, again.values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MatchingOptions(alpha=(0,)), r"alpha must be one or more different positive numbers, got \(0,\)"),
        (MatchingOptions(alpha=(float("nan"),)), "alpha must be one or more different positive numbers, got .nan"),
        (MatchingOptions(upsample=0), "upsample must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(data: PairData, options: MatchingOptions, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        match(source_of(colours), data, options)


def test_non_finite_features_and_invalid_sizes_are_rejected(data: PairData) -> None:
    with pytest.raises(EvaluationError, match="not finite"):
        match(source_of(lambda image: colours(image) * float("nan")), data, MatchingOptions())
    with pytest.raises(SizeError):
        match(source_of(colours), data, MatchingOptions(size=50))


# --- reading ---


def test_photos_are_listed_once_and_pairs_in_order(data: PairData) -> None:
    assert (data.name, data.layout, data.note) == ("SPair-71k", "spair", "5 pairs of 4 photos, split test")
    assert [photo.id for photo in data.val.images] == [f"mark/{seed:02}.png" for seed in range(4)]
    assert [images.split for images in data.splits] == ["val"] and data.val.skipped == ()
    first = data.pairs[0]
    assert first.name == "000000-00-01:mark" and first.source == "mark/00.png" and first.target == "mark/01.png"
    assert [list(point) for point in first.source_points] == marked(0)[1]
    assert first.box == (0, 0, 96, 64) and first.side == 96
    assert np.array_equal(data.val.images[2].pixels(), marked(2)[0])


def test_layout_list_selects_and_orders_pairs(own: Path) -> None:
    (own / "Layout" / "large").mkdir(parents=True)
    (own / "Layout" / "large" / "test.txt").write_text(
        "000003-03-01:mark\n000000-00-01:mark\n\nmissing\n000003-03-01:mark\n"
    )
    data = open_correspondence(own)
    assert isinstance(data, PairData)
    assert [pair.name for pair in data.pairs] == ["000003-03-01:mark", "000000-00-01:mark"]
    assert [(entry.item, "no such file" in entry.reason) for entry in data.val.skipped] == [("missing", True)]
    (own / "Layout" / "large" / "test.txt").write_text("\n")
    with pytest.raises(EvaluationError, match=r"test\.txt: expected names, one per line, found none"):
        open_pairs(own)


def test_subset_of_pairs_reads_only_their_photos(own: Path) -> None:
    steps: list[int] = []
    data = open_pairs(own, pairs=1, progress=lambda: steps.append(1))
    assert [pair.name for pair in data.pairs] == ["000002-00-02:mark"] and len(steps) == 2
    assert [photo.id for photo in data.val.images] == ["mark/00.png", "mark/02.png"]
    with pytest.raises(EvaluationError, match="number of pairs of at least 1, or 0 for all, got -1"):
        open_pairs(own, pairs=-1)


def test_other_splits_are_opened_by_name(own: Path) -> None:
    write_spair(own, [(5, 6)], "trn")
    data = open_pairs(own, split="trn")
    assert data.name == "SPair-71k trn" and len(data.pairs) == 1 and data.splits[0].split == "val"
    for split in ("train", ""):
        with pytest.raises(EvaluationError, match=f"split '{split}' in PairAnnotation; found splits: test, trn"):
            open_pairs(own, split=split)


def test_digest_covers_photos_pairs_and_their_order(own: Path, tmp_path: Path) -> None:
    other = shutil.copytree(own, tmp_path / "copy")
    digests = [open_pairs(own).val.digest]
    assert open_pairs(other).val.digest == digests[0]
    write_pair(other, "000000-00-01:mark", pair_of(0, 1, trg_bndbox=[0, 0, 50, 50]))
    digests.append(open_pairs(other).val.digest)
    write_pair(other, "000000-00-01:mark", pair_of(0, 1, trg_kps=marked(1)[1][::-1]))
    digests.append(open_pairs(other).val.digest)
    (other / "PairAnnotation" / "test" / "000001-01-00:mark.json").unlink()
    digests.append(open_pairs(other).val.digest)
    Image.fromarray(marked(9)[0]).save(other / "JPEGImages" / "mark" / "02.png")
    digests.append(open_pairs(other).val.digest)
    (other / "Layout" / "large").mkdir(parents=True)
    names = ["000003-03-01:mark", "000000-00-01:mark", "000002-00-02:mark", "000004-02-03:mark"]
    (other / "Layout" / "large" / "test.txt").write_text("\n".join(names))  # another order, which the outcomes follow
    digests.append(open_pairs(other).val.digest)
    assert len(set(digests)) == len(digests)


def test_parent_folder_of_the_data_is_accepted(own: Path, tmp_path: Path) -> None:
    (tmp_path / "above").mkdir()
    own.rename(tmp_path / "above" / "SPair-71k")
    assert len(open_pairs(tmp_path / "above").pairs) == len(PAIRS)


# --- skipped pairs ---


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in pair_of(0, 1).items() if key not in keys}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected a pair as JSON"),
        ("", "expected a pair as JSON"),
        ("[" * 100_000, "expected a pair as JSON"),
        ([1, 2], "expected a pair with its keypoints, got list"),
        (without("trg_kps", "category"), "expected category, src_imname, .*; category, trg_kps missing"),
        (pair_of(0, 1, src_kps=[]), "expected equal numbers of keypoints, got 0 and 4"),
        (pair_of(0, 1, trg_kps=[[1, 2]]), "expected equal numbers of keypoints, got 4 and 1"),
        (pair_of(0, 1, src_kps=[[1, 2, 3]] * 4), "src_kps: expected 2 finite numbers each"),
        (pair_of(0, 1, src_kps=[["1", 2]] * 4), "src_kps: expected 2 finite numbers each"),
        (pair_of(0, 1, src_kps=[[True, 2]] * 4), "src_kps: expected 2 finite numbers each"),
        (pair_of(0, 1, src_kps="none"), "src_kps: expected 2 finite numbers each"),
        (pair_of(0, 1, trg_kps=[[float("nan"), 2]] * 4), "trg_kps: expected 2 finite numbers each"),
        (pair_of(0, 1, trg_kps=[[10**400, 2]] * 4), "trg_kps: expected 2 finite numbers each"),
        (pair_of(0, 1, trg_bndbox=[1, 2, 3]), "trg_bndbox: expected 4 finite numbers each"),
        (pair_of(0, 1, trg_bndbox=None), "trg_bndbox: expected 4 finite numbers each"),
        (pair_of(0, 1, trg_bndbox=[5, 5, 5, 50]), "expected a box x0, y0, x1, y1 with an area"),
        (pair_of(0, 1, trg_bndbox=[9, 5, 5, 50]), "expected a box x0, y0, x1, y1 with an area"),
        (pair_of(0, 1, src_kps=[[97, 3]] * 4), "00.png: keypoint 97, 3 is outside the photo of 96 x 64"),
        (pair_of(0, 1, trg_kps=[[3, -1]] * 4), "01.png: keypoint 3, -1 is outside the photo of 96 x 64"),
        (pair_of(0, 1, trg_imsize=[48, 32, 3]), "for a photo of 48 x 32 pixels, but this photo has 96 x 64"),
        (pair_of(0, 1, src_imname="77.png"), r"77\.png: no such file"),
        (pair_of(0, 1, trg_imname="../mark/01.png"), "expected names in category and trg_imname"),
        (pair_of(0, 1, category=".."), "expected names in category and src_imname"),
        (pair_of(0, 1, category=7), "expected names in category and src_imname"),
    ],
)
def test_unusable_pair_is_skipped(own: Path, content: Any, words: str) -> None:
    write_pair(own, "000001-01-00:mark", content)
    data = open_pairs(own)
    assert [pair.name[:6] for pair in data.pairs] == ["000000", "000002", "000003", "000004"]
    (entry,) = data.val.skipped
    assert entry.item == "000001-01-00:mark"
    assert re.search(words, entry.reason)
    shutil.rmtree(own / "PairAnnotation")
    write_pair(own, "bad", content)
    with pytest.raises(EvaluationError, match=f"none of 1 is usable; first reason: bad: .*{words}"):
        open_pairs(own)


def test_annotation_that_is_not_text_is_skipped(own: Path) -> None:
    (own / "PairAnnotation" / "test" / "000001-01-00:mark.json").write_bytes(b"\xff\xfe\x00\x80")
    assert "expected a pair as JSON" in open_pairs(own).val.skipped[0].reason


def test_keypoints_on_the_border_are_accepted(own: Path) -> None:
    """Pixel coordinates may start at 1."""
    write_pair(own, "000001-01-00:mark", pair_of(1, 0, src_kps=[[96, 64], [0, 0], [96, 0], [0, 64]]))
    data = open_pairs(own)
    assert not data.val.skipped
    assert np.isfinite(match(source_of(colours), data, MatchingOptions()).values).all()


def test_pairs_of_a_damaged_photo_are_skipped(own: Path) -> None:
    path = own / "JPEGImages" / "mark" / "03.png"
    path.write_bytes(path.read_bytes()[:100])
    data = open_pairs(own)
    assert [pair.name[:6] for pair in data.pairs] == ["000000", "000001", "000002"]
    assert [photo.id for photo in data.val.images] == ["mark/00.png", "mark/01.png", "mark/02.png"]
    assert all("damaged" in entry.reason for entry in data.val.skipped) and len(data.val.skipped) == 2


def test_photo_deleted_after_opening_raises_photo_error(own: Path) -> None:
    data = open_pairs(own)
    (own / "JPEGImages" / "mark" / "03.png").unlink()
    with pytest.raises(PhotoError, match=r"03\.png: no such file"):
        match(source_of(colours), data, MatchingOptions())


# --- invalid folders ---


def test_folders_without_pairs_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="expected a data set folder, found nothing"):
        open_pairs(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="expected a data set folder, found a file"):
        open_pairs(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"expected SPair-71k \(JPEGImages, .*; found an empty folder"):
        open_pairs(tmp_path / "empty")
    with pytest.raises(EvaluationError, match=r"expected SPair-71k .* or DAVIS .*; found an empty folder"):
        open_correspondence(tmp_path / "empty")
    videos = write_davis(tmp_path / "davis", {"a": moving(2)})
    with pytest.raises(EvaluationError, match="davis looks like SPair-71k, but lacks PairAnnotation"):
        open_pairs(videos)
    for kind in ("PairAnnotation/test", "JPEGImages"):
        (tmp_path / "bare" / kind).mkdir(parents=True)
    with pytest.raises(EvaluationError, match=r"PairAnnotation/test: expected pairs, found none"):
        open_pairs(tmp_path / "bare")


def test_either_layout_is_recognised(tmp_path: Path, folder: Path) -> None:
    videos = open_correspondence(write_davis(tmp_path / "davis", {"a": moving(2), "b": moving(3)}), sequences=1)
    assert videos.layout == "davis" and len(videos.splits[0].images) == 3
    pairs = open_correspondence(folder, pairs=2)
    assert pairs.layout == "spair" and isinstance(pairs, PairData) and len(pairs.pairs) == 2


# --- a folder of keypoints ---


def write_keypoints(root: Path, seeds: dict[str, int], **boxes: list[float]) -> Path:
    """Write marked photos under these names below images/, and their named keypoints."""
    for name, seed in seeds.items():
        pixels, points = marked(seed)
        for kind in ("images", "keypoints"):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        content = {"keypoints": dict(zip("abcd", points, strict=True))}
        content |= {"box": boxes[name]} if name in boxes else {}
        (root / "keypoints" / f"{name}.json").write_text(json.dumps(content))
    return root


def test_photos_of_one_folder_with_named_keypoints_are_paired(tmp_path: Path) -> None:
    root = write_keypoints(tmp_path / "own", {"cats/one": 0, "cats/two": 1, "dogs/one": 2, "dogs/two": 3})
    path = root / "keypoints" / "dogs" / "two.json"
    few = dict(list(json.loads(path.read_text())["keypoints"].items())[::-1][:2])
    path.write_text(json.dumps({"keypoints": few | {"tail": [1, 2]}, "box": [0, 0, 40, 20]}))
    data = open_correspondence(root)
    assert isinstance(data, PairData) and (data.name, data.layout) == ("own", "keypoints")
    assert data.note == "4 pairs of 4 photos"
    names = [pair.name.replace(".png", "") for pair in data.pairs]
    assert names == ["cats/one cats/two", "cats/two cats/one", "dogs/one dogs/two", "dogs/two dogs/one"]
    cats, _, dogs, _ = data.pairs
    assert [list(point) for point in cats.source_points] == marked(0)[1]
    x, y = zip(*marked(1)[1], strict=True)
    assert cats.box == (min(x), min(y), max(x) + 1, max(y) + 1)
    assert [list(point) for point in dogs.target_points] == marked(3)[1][2:] and dogs.side == 40
    assert match(source_of(colours), data, MatchingOptions()).scored() == {"PCK": 100.0, "PCK per point": 100.0}


def test_keypoint_folder_and_spair_give_the_same_errors(tmp_path: Path, data: PairData) -> None:
    """The same pairs, stored in both formats."""
    boxes = {f"{seed:02}": [0.0, 0.0, 96.0, 64.0] for seed in range(4)}
    folder = open_pairs(write_keypoints(tmp_path, {name: int(name) for name in boxes}, **boxes))
    assert len(folder.pairs) == 12 and len(open_pairs(tmp_path, pairs=5).pairs) == 5
    errors = dict(
        zip(
            [pair.name for pair in folder.pairs],
            errors_of(source_of(speckled), folder, MatchingOptions()),
            strict=True,
        )
    )
    for pair, error in zip(data.pairs, errors_of(source_of(speckled), data, MatchingOptions()), strict=True):
        name = " ".join(id.removeprefix("mark/") for id in (pair.source, pair.target))
        assert errors[name].tolist() == pytest.approx(error.tolist())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "expected keypoints as JSON .no such file"),
        ("{", "expected keypoints as JSON"),
        ("[]", "with at least one keypoint"),
        ('{"keypoints": {}}', "with at least one keypoint"),
        ('{"keypoints": {"a": [1]}}', "keypoints: expected 2 finite numbers each"),
        ('{"keypoints": {"a": [1, 2]}, "box": [3, 3, 1, 4]}', "expected a box x0, y0, x1, y1 with an area"),
        ('{"keypoints": {"a": [97, 2]}}', "keypoint 97, 2 is outside the photo of 96 x 64"),
    ],
)
def test_unusable_keypoints_are_skipped(tmp_path: Path, content: str | None, words: str) -> None:
    root = write_keypoints(tmp_path, {"one": 0, "two": 1, "three": 2})
    path = root / "keypoints" / "three.json"
    path.unlink() if content is None else path.write_text(content)
    data = open_pairs(root)
    assert [pair.name for pair in data.pairs] == ["one.png two.png", "two.png one.png"]
    assert data.val.skipped and all(re.search(words, entry.reason) for entry in data.val.skipped)
