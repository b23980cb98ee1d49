"""Diagnosis of backbones with planted, and therefore known, artifacts."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import denoising_vit as dv
import planted
from denoising_vit.decomposition.calibration import Stability
from denoising_vit.diagnosis import verdict
from denoising_vit.diagnosis.diagnose import Diagnosis
from denoising_vit.diagnosis.verdict import Content, Finding, conclude, findings, judge, too_few
from denoising_vit.metrics.artifacts import ArtifactMetrics, artifact_metrics
from denoising_vit.metrics.tokens import consistency

PHOTOS, VIEWS = 24, 12


@cache
def diagnosis(share: float = 0.0, outliers: float = 0.0, seed: int = 0) -> Diagnosis:
    kinds = {"share": share, "outliers": outliers}
    return dv.diagnose(
        planted.backbone(**kinds),
        planted.photos(PHOTOS),
        extractors={"blurred": planted.backbone(**kinds, blur=5)},
        views=VIEWS,
        seed=seed,
    )


# --- findings and verdicts ---


def test_clean_features_need_no_cleaning() -> None:
    found = diagnosis()
    assert found.findings == ()
    assert not found.verdict.clean_up
    assert found.verdict.method is None
    assert "No artifact was found. Do not clean" in found.verdict.words


@pytest.mark.parametrize(
    ("share", "outliers", "kinds"),
    [(0.2, 0.0, ["positional"]), (0.0, 0.02, ["outlier tokens"]), (0.2, 0.02, ["positional", "outlier tokens"])],
)
def test_planted_artifacts_are_named(share: float, outliers: float, kinds: list[str]) -> None:
    found = diagnosis(share, outliers)
    assert [finding.kind for finding in found.findings] == kinds
    assert found.verdict.clean_up
    assert all(kind in found.verdict.words for kind in kinds)


def test_shared_energy_matches_the_planted_share() -> None:
    assert diagnosis(0.2).shared == pytest.approx(0.2, rel=0.25)
    assert diagnosis().shared < 0.002


def test_outlier_share_matches_the_planted_share() -> None:
    found = diagnosis(0.0, 0.02).metrics["raw"]
    assert found.outliers_high == pytest.approx(0.02, rel=0.3)
    assert found.outliers_low == 0


def test_outliers_do_not_hide_the_shared_pattern() -> None:
    assert diagnosis(0.2, 0.02).shared == pytest.approx(diagnosis(0.2).shared, rel=0.2)


def test_subtraction_removes_a_pattern_and_not_outliers() -> None:
    assert diagnosis(0.2).judgements["subtract"].outcome == "denoised"
    assert diagnosis(0.0, 0.02).judgements["subtract"].outcome == "unchanged"
    both = diagnosis(0.2, 0.02).judgements["subtract"]
    assert both.outcome == "partly"
    assert both.words.startswith("positional gone, outlier tokens still there")


def test_exact_method_is_recommended_for_outliers() -> None:
    assert diagnosis(0.2, 0.02).verdict.method == "exact"
    assert diagnosis(0.2, 0.02).judgements["exact"].outcome == "denoised"


@pytest.mark.parametrize(("share", "outliers"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.02), (0.2, 0.02)])
def test_blur_does_not_count_as_denoising(share: float, outliers: float) -> None:
    found = diagnosis(share, outliers)
    assert found.judgements["blurred"].outcome == "blurred"
    assert found.verdict.method != "blurred"


def test_blank_image_metrics_exist_for_all_methods_but_exact() -> None:
    metrics = diagnosis(0.2).metrics
    names = ("blank_variance", "blank_detail", "blurred_detail", "shift_change", "photo_variance")
    assert [getattr(metrics["raw"], name) for name in names] == [1] * 5
    assert [getattr(metrics["exact"], name) for name in names] == [None] * 5
    subtracted, blurred = metrics["subtract"], metrics["blurred"]
    assert (subtracted.blank_variance or 1) < 0.1 and (subtracted.photo_variance or 0) > 0.7
    assert (blurred.blank_detail or 1) < 0.1 < (blurred.blank_variance or 0)


def test_the_linear_probe_finds_a_pattern_only_until_it_is_subtracted() -> None:
    metrics = diagnosis(0.2).metrics
    assert metrics["raw"].linear_position > 0.9
    assert abs(metrics["subtract"].linear_position) < 0.1


def test_the_artifact_is_the_planted_pattern() -> None:
    artifact = diagnosis(0.2).evidence.calibration.artifact.values
    truth = planted.pattern(*artifact.shape[:2]).permute(1, 2, 0)  # (C, h, w) -> (h, w, C)
    assert torch.cosine_similarity(artifact.flatten(), truth.flatten(), dim=0) > 0.97


def test_the_same_seed_gives_the_same_diagnosis() -> None:
    first, again, other = (
        dv.diagnose(planted.backbone(share=0.2), planted.photos(8), views=VIEWS, seed=seed).metrics
        for seed in (0, 0, 1)
    )
    assert again == first
    assert other != first


def test_record_is_json_with_verdict_metrics_and_settings() -> None:
    record = json.loads(json.dumps(diagnosis(0.2).record()))
    assert record["verdict"]["method"] in ("subtract", "exact")
    assert record["metrics"]["raw"]["effective_rank"] == diagnosis(0.2).metrics["raw"].effective_rank
    assert (record["views"], len(record["photos"]), record["size"]) == (VIEWS, PHOTOS, [planted.SIZE] * 2)
    assert record["stability"]["photos"] == PHOTOS


def test_maps_of_a_few_photos_are_kept_for_display() -> None:
    found = dv.diagnose(planted.backbone(), planted.photos(8), views=VIEWS, shown=3)
    assert len(found.evidence.shown) == 3
    assert set(found.evidence.shown[0].maps) == {"raw", "subtract", "exact"}
    assert found.evidence.shown[0].pixels.shape == (120, 150, 3)


# --- bad input ---


def test_too_few_photos_are_rejected_with_the_number_needed() -> None:
    with pytest.raises(dv.ArtifactError, match=r"7 usable photos; a diagnosis needs at least 8"):
        dv.diagnose(planted.backbone(), planted.photos(7), views=VIEWS)


def test_duplicate_photos_count_once() -> None:
    with pytest.raises(dv.ArtifactError, match=r"1 usable photos \(9 skipped; first: photo 1: a duplicate"):
        dv.diagnose(planted.backbone(), planted.photos(1) * 10, views=VIEWS)


def test_photos_without_content_are_rejected() -> None:
    with pytest.raises(dv.ArtifactError, match="no content: all pixels are the same"):
        dv.diagnose(planted.backbone(), [np.full((100, 100, 3), n, np.uint8) for n in range(10)], views=VIEWS)


class Constant(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(image), 5, image.shape[2] // planted.PATCH, image.shape[3] // planted.PATCH)


class Broken(planted.Planted):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image) * float("nan")


def load(module: torch.nn.Module) -> dv.Backbone:
    return dv.load_backbone(module, patch_size=planted.PATCH, default_size=planted.SIZE, device="cpu")


def test_constant_output_is_refused() -> None:
    with pytest.raises(dv.DenoisingVitError, match="constant output"):
        dv.diagnose(load(Constant()), planted.photos(10), views=VIEWS)


def test_non_finite_features_are_rejected() -> None:
    with pytest.raises(dv.DenoisingVitError, match="not finite"):
        dv.diagnose(load(Broken()), planted.photos(10), views=VIEWS)


@pytest.mark.parametrize(
    ("extractor", "message"),
    [
        (lambda image: torch.zeros(1, 3, 3, planted.CHANNELS), r"mine: expected features of shape \(1, 11, 11, 24\)"),
        (lambda image: torch.full((1, 11, 11, planted.CHANNELS), torch.nan), "mine: features are not finite"),
    ],
)
def test_error_for_an_incompatible_extractor_names_it(extractor: Any, message: str) -> None:
    with pytest.raises(dv.DenoisingVitError, match=message):
        dv.diagnose(planted.backbone(), planted.photos(8), views=VIEWS, extractors={"mine": extractor})


def test_extractors_cannot_use_reserved_names() -> None:
    with pytest.raises(dv.DenoisingVitError, match="must not be named raw, subtract, exact; got raw"):
        dv.diagnose(planted.backbone(), planted.photos(8), views=VIEWS, extractors={"raw": planted.backbone()})


def test_common_vertical_gradient_is_not_a_shared_pattern() -> None:
    """The sky is at the top of photos: rotated crops cancel this, in both halves that are compared."""
    chance = np.random.default_rng(0)
    down = np.linspace(255, 0, 120)[:, None, None]
    photos = [(0.7 * down + chance.uniform(0, 75, (1, 1, 3)) + chance.normal(0, 20, (120, 150, 3))) for _ in range(16)]
    found = dv.diagnose(planted.backbone(), [p.clip(0, 255).astype(np.uint8) for p in photos], views=VIEWS)
    assert abs(found.metrics["raw"].shared) < 0.15  # chance, given the same strong gradient in all photos


def test_unusable_photos_are_skipped_and_recorded() -> None:
    given = [*planted.photos(9), np.zeros((100, 100, 3), np.uint8), "nowhere.jpg"]
    found = dv.diagnose(planted.backbone(), given, views=VIEWS)
    assert len(found.info["photos"]) == 9
    assert [name for name, _ in found.info["skipped"]] == ["photo 9", "nowhere.jpg"]


# --- consistency, metrics ---


def test_consistency_by_hand() -> None:
    features = torch.tensor([0.0, 2.0, 4.0, 6.0]).view(1, 2, 2, 1)
    expected = features + torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 2, 2, 1)
    assert consistency(expected, features) == pytest.approx(1 - 4 / 20)
    assert consistency(features, features) == 1
    with pytest.raises(dv.DenoisingVitError, match="constant output"):
        consistency(features, torch.ones_like(features))
    with pytest.raises(dv.DenoisingVitError, match="same shapes"):
        consistency(features[:, :1], features)


def test_metrics_without_responses_or_pairs_are_none() -> None:
    features = torch.randn(8, 7, 5, 6, generator=torch.Generator().manual_seed(0))
    metrics = artifact_metrics(features)
    assert metrics.leakage is None and metrics.consistency is None
    flat = torch.ones(2, 7, 5, 6)
    assert artifact_metrics(features, responses=flat).leakage is None


# --- thresholds ---

CLEAN = ArtifactMetrics(0.0, 0.0, 0.0, 0.1, 0.1, 0.0, 0.0, 0.5, 100.0, 0.5, 0.3)
CONTENT = Content(100.0, 0.3)
SURE = Stability(photos=64, signal=1.0, noise=1.0, split_half=0.98)
UNSURE = Stability(photos=64, signal=0.01, noise=1.0, split_half=0.2)


@pytest.mark.parametrize(
    ("shared", "strength"),
    [(0.0, None), (0.0049, None), (0.005, "weak"), (0.02, "moderate"), (0.1, "strong"), (0.9, "strong")],
)
def test_strength_of_a_shared_pattern(shared: float, strength: str | None) -> None:
    found = findings(CLEAN, shared, SURE)
    assert [finding.strength for finding in found] == ([strength] if strength else [])


def test_uncertain_shared_pattern_is_neither_reported_nor_ruled_out() -> None:
    assert findings(CLEAN, 0.5, UNSURE) == ()
    doubt = too_few(0.5, UNSURE)
    assert doubt is not None and "about 1900 would do" in doubt
    verdict = conclude((), {}, {}, doubt)
    assert not verdict.clean_up
    assert "too few to tell" in verdict.words and "nothing to gain" not in verdict.words
    assert too_few(0.5, SURE) is None
    assert too_few(0.001, UNSURE) is None


def test_neighbour_position_raises_a_weak_pattern_to_moderate() -> None:
    (found,) = findings(dataclasses.replace(CLEAN, neighbour_position=0.6), 0.01, SURE)
    assert found.strength == "moderate"


def test_verdict_describes_partial_removal() -> None:
    both = (*POSITIONAL, Finding("outlier tokens", "strong", 0.1, "10 %"))
    spoiled = dataclasses.replace(RAW, outliers_high=0.1)
    judged = judge(dataclasses.replace(CLEAN, outliers_high=0.1), spoiled, CONTENT, both)
    assert judged.outcome == "partly"
    verdict = conclude(both, {"subtract": judged}, {"raw": spoiled, "subtract": CLEAN})
    assert verdict.clean_up and verdict.method == "subtract"
    assert "removes a part: positional gone, outlier tokens still there" in verdict.words


def test_unchanged_features_do_not_count_as_damaged() -> None:
    """Artifacts may have less rank and detail than the content under them."""
    low = dataclasses.replace(RAW, effective_rank=60.0, detail=0.12)
    assert judge(low, low, CONTENT, POSITIONAL).outcome == "unchanged"


def test_neighbour_position_alone_is_a_positional_finding() -> None:
    (found,) = findings(dataclasses.replace(CLEAN, neighbour_position=0.6), 0.0, UNSURE)
    assert (found.kind, found.strength) == ("positional", "weak")


@pytest.mark.parametrize(("high", "low", "side"), [(0.03, 0.0, "high"), (0.0, 0.03, "low")])
def test_outliers_of_either_side(high: float, low: float, side: str) -> None:
    (found,) = findings(dataclasses.replace(CLEAN, outliers_high=high, outliers_low=low), 0.0, UNSURE)
    assert (found.kind, found.strength) == ("outlier tokens", "moderate")
    assert found.words == f"3.0% of {side} norm, as fractions of the tokens"


POSITIONAL = (Finding("positional", "strong", 0.2, "20 %"),)
RAW = dataclasses.replace(CLEAN, shared=0.2, linear_position=0.8, neighbour_position=0.4, leakage=0.3)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "denoised"),
        ({"shared": 0.15}, "unchanged"),
        ({"linear_position": 0.5}, "unchanged"),
        ({"neighbour_position": 0.3}, "unchanged"),
        ({"leakage": 0.4}, "denoised"),
        ({"detail": 0.1}, "blurred"),
        ({"detail": 0.17, "effective_rank": 90.0}, "blurred"),
        ({"detail": 0.17}, "denoised"),
        ({"effective_rank": 70.0}, "damaged"),
        ({"consistency": 0.4}, "damaged"),
    ],
)
def test_judgements(changes: dict[str, float], outcome: str) -> None:
    assert judge(dataclasses.replace(CLEAN, **changes), RAW, CONTENT, POSITIONAL).outcome == outcome


def test_outcome_is_unknown_if_the_crops_show_no_artifact() -> None:
    blind = dataclasses.replace(CLEAN, linear_position=-0.5, neighbour_position=-0.1)
    judged = judge(CLEAN, blind, CONTENT, POSITIONAL)
    assert judged.outcome == "unknown"
    verdict = conclude(POSITIONAL, {"subtract": judged, "exact": judged}, {"raw": blind, "subtract": CLEAN})
    assert not verdict.clean_up
    assert "Too few photos to tell" in verdict.words


def test_content_is_measured_without_outliers() -> None:
    chance = torch.Generator().manual_seed(0)
    features = torch.randn(4, 9, 9, 16, generator=chance).cumsum(1).cumsum(2)
    spoiled = features.clone()
    spoiled[:, ::4, ::4] *= 20
    clipped, unclipped = Content.of(spoiled, verdict.CLIP), Content.of(spoiled, 1e9)
    assert clipped.detail < unclipped.detail / 2
    assert Content.of(features, verdict.CLIP) == Content.of(features, 1e9)


def test_cheapest_sufficient_method_is_recommended() -> None:
    good = judge(CLEAN, RAW, CONTENT, POSITIONAL)
    metrics = {"raw": RAW, "subtract": CLEAN, "exact": dataclasses.replace(CLEAN, consistency=0.51)}
    assert conclude(POSITIONAL, {"subtract": good, "exact": good}, metrics).method == "subtract"
    metrics["exact"] = dataclasses.replace(CLEAN, consistency=0.6)
    assert conclude(POSITIONAL, {"subtract": good, "exact": good}, metrics).method == "exact"


def test_cleaning_is_not_recommended_for_a_weak_artifact() -> None:
    weak = (dataclasses.replace(POSITIONAL[0], strength="weak"),)
    good = judge(CLEAN, RAW, CONTENT, weak)
    verdict = conclude(weak, {"subtract": good}, {"raw": RAW, "subtract": CLEAN})
    assert not verdict.clean_up
    assert verdict.method == "subtract"


def test_cleaning_is_not_recommended_if_no_method_helps() -> None:
    bad = judge(RAW, RAW, CONTENT, POSITIONAL)
    verdict = conclude(POSITIONAL, {"subtract": bad, "exact": bad}, {"raw": RAW, "subtract": RAW, "exact": RAW})
    assert not verdict.clean_up and verdict.method is None
    assert "do not clean" in verdict.words
