"""Findings, judgements and verdict from label-free metrics.

The thresholds are conventions, chosen from planted artifacts, planted clean features and available models
(docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from denoising_vit.decomposition.calibration import Stability
from denoising_vit.decomposition.statistics import clip_norms
from denoising_vit.metrics.artifacts import ArtifactMetrics
from denoising_vit.metrics.tokens import detail, effective_rank

Strength = Literal["weak", "moderate", "strong"]
Kind = Literal["positional", "outlier tokens"]
Outcome = Literal["denoised", "partly", "blurred", "damaged", "unchanged", "unknown"]

#: Fractions of the features' energy common to all photos that count as weak, moderate, strong.
SHARED = (0.005, 0.02, 0.1)

#: Reliability of the calibrated artifact above which the shared part is more than chance.
RELIABLE = 0.5

#: R^2 of the neighbour probe above which features encode position although no common pattern is found.
PLACE = 0.25

#: Fractions of tokens with outlying norms that count as weak, moderate, strong.
OUTLIERS = (0.001, 0.01, 0.05)

#: Minimum R^2 for a probe to count as a detection.
_SEEN = 0.03

#: An artifact counts as removed if at most this fraction of a raw metric remains.
REMOVED = 0.5

#: Features are blurred if their detail is below the first fraction of the content's, or below the second while their
#: effective rank is below the third fraction of the content's.
BLURRED, BLURRED_DETAIL, BLURRED_RANK = 0.4, 0.6, 0.95

#: Features are damaged if their effective rank is below this fraction of the content's, or if consistency falls by more
#: than this.
DAMAGED_RANK, DAMAGED_CONSISTENCY = 0.8, 0.05

#: Number of median absolute deviations above the median beyond which norms do not count as content.
CLIP = 6.0

#: Gain of consistency over subtraction above which the exact method is worth its many passes.
WORTH = 0.03


@dataclass(frozen=True)
class Finding:
    """One kind of artifact in the raw features."""

    kind: Kind
    strength: Strength
    share: float  #: fraction of the features' energy (positional) or of the tokens
    words: str


@dataclass(frozen=True)
class Content:
    """Rank and detail of the content, which cleaning must preserve; raw features also have those of their artifacts."""

    effective_rank: float  # RankMe
    detail: float  # fraction of the variance in differences of adjacent patches

    @classmethod
    def of(cls, features: Tensor, clip: float) -> Content:
        """Compute from features without the shared artifact (N, h, w, C), with outlying norms clipped as for a fit."""
        clipped, _ = clip_norms(features, clip)
        return cls(effective_rank(clipped), detail(clipped))


@dataclass(frozen=True)
class Judgement:
    """The effect of one method.

    Attributes:
        outcome: denoised if all findings are removed without loss of sharpness or content (partly: some of them);
            unknown if there are too few photos.
        words: reason.
    """

    outcome: Outcome
    words: str


@dataclass(frozen=True)
class Verdict:
    """Whether to clean, and how.

    Attributes:
        clean_up: True if cleaning is worthwhile.
        method: the cheapest method that works: subtract, exact or another extractor; None if none does.
        words: the verdict in one or two sentences.
    """

    clean_up: bool
    method: str | None
    words: str


def findings(raw: ArtifactMetrics, shared: float, stability: Stability) -> tuple[Finding, ...]:
    """Artifacts of raw features, from the fraction of their energy that is common to all photos."""
    found = []
    strength = _strength(shared, SHARED) if stability.reliability >= RELIABLE else None
    placed = raw.neighbour_position >= PLACE
    if strength:
        words = f"{shared:.1%} of the features' energy is the same pattern in every photo"
        raised = "moderate" if strength == "weak" and placed else strength
        found.append(Finding("positional", raised, shared, words))
    elif placed:
        words = (
            f"features encode the position in the view (R² {raw.neighbour_position:.2f}), but not as one shared pattern"
        )
        found.append(Finding("positional", "weak", max(shared, 0.0), words))
    if strength := _strength(raw.outliers, OUTLIERS):
        sides = {"high": raw.outliers_high, "low": raw.outliers_low}
        parts = " and ".join(f"{share:.1%} of {side} norm" for side, share in sides.items() if share >= OUTLIERS[0] / 2)
        found.append(Finding("outlier tokens", strength, raw.outliers, f"{parts}, as fractions of the tokens"))
    return tuple(found)


def too_few(shared: float, stability: Stability) -> str | None:
    """The reason if there are too few photos to detect a shared pattern; None if there are enough."""
    if shared < SHARED[0] or stability.reliability >= RELIABLE:
        return None
    number = f"; about {stability.suggested} would do" if stability.suggested else ""
    return (
        f"{stability.photos} photos are too few to tell: {shared:.1%} of the features' energy seems to be the same "
        f"pattern in every photo, but that may be chance (reliability {stability.reliability:.2f}){number}."
    )


def judge(cleaned: ArtifactMetrics, raw: ArtifactMetrics, content: Content, found: tuple[Finding, ...]) -> Judgement:
    """Evaluate a method by the metrics before and after cleaning."""
    # Artifacts may have less detail or rank than the content.
    rank = cleaned.effective_rank / min(content.effective_rank, raw.effective_rank)
    sharpness = cleaned.detail / min(content.detail, raw.detail)
    if sharpness < BLURRED or (sharpness < BLURRED_DETAIL and rank < BLURRED_RANK):
        return Judgement("blurred", f"detail is {sharpness:.2f} and effective rank {rank:.2f} of the content's")
    if rank < DAMAGED_RANK:
        return Judgement("damaged", f"effective rank is {rank:.2f} of the content's")
    gain = _gain(cleaned, raw)
    if gain is not None and gain < -DAMAGED_CONSISTENCY:
        return Judgement("damaged", f"views agree less than before (R² {gain:+.2f})")
    if unseen := [finding.kind for finding in found if not _is_seen(finding, raw)]:
        return Judgement("unknown", f"{' and '.join(unseen)} cannot be detected in so few crops; use more photos")
    gone = [finding.kind for finding in found if _is_gone(finding, cleaned, raw)]
    left = [finding.kind for finding in found if finding.kind not in gone]
    if not gone:
        return Judgement("unchanged", f"{' and '.join(left)} still there" if left else "there was nothing to remove")
    agreement = "" if gain is None else f"; agreement of views {gain:+.3f}"
    rest = f", {' and '.join(left)} still there" if left else ""
    return Judgement("partly" if left else "denoised", f"{' and '.join(gone)} gone{rest}{agreement}")


def conclude(
    found: tuple[Finding, ...],
    judgements: Mapping[str, Judgement],
    metrics: Mapping[str, ArtifactMetrics],
    doubt: str | None = None,
) -> Verdict:
    """Whether to clean, and how; ``doubt`` is the reason if there are too few photos."""
    if not found:
        return Verdict(False, None, doubt or "No artifact was found. Do not clean: there is nothing to gain.")
    summary = f"Found: {' and '.join(f'{item.strength} {item.kind} artifact ({item.words})' for item in found)}."
    outcomes = {outcome: [n for n, j in judgements.items() if j.outcome == outcome] for outcome in get_args(Outcome)}
    able = outcomes["denoised"] or outcomes["partly"]
    if not able and outcomes["unknown"]:
        return Verdict(False, None, f"{summary} Too few photos to tell whether cleaning works; use more.")
    if not able:
        return Verdict(False, None, f"{summary} None of the methods tried removes it without harm; do not clean.")
    method = _cheapest(able, metrics)
    if all(finding.strength == "weak" for finding in found):
        return Verdict(False, method, f"{summary} Cleaning ({method}) removes it, but it is too weak to matter.")
    if not outcomes["denoised"]:
        part = f"which removes a part: {judgements[method].words}"
        return Verdict(True, method, f"{summary} Clean with method {method}, {part}.")
    why = {
        "subtract": "one pass and a subtraction are enough",
        "exact": "views agree clearly better with it than after subtraction"
        if "subtract" in able
        else "subtraction alone is not enough",
    }.get(method, "it removes these artifacts")
    return Verdict(True, method, f"{summary} Clean with method {method}: {why}.")


def _cheapest(able: list[str], metrics: Mapping[str, ArtifactMetrics]) -> str:
    """The first of the methods, which are ordered by cost, unless exact is worth its many passes."""
    if able[0] == "subtract" and "exact" in able and (_gain(metrics["exact"], metrics["subtract"]) or 0) >= WORTH:
        return "exact"
    return able[0]


def _strength(share: float, steps: tuple[float, float, float]) -> Strength | None:
    weak, moderate, strong = steps
    return "strong" if share >= strong else "moderate" if share >= moderate else "weak" if share >= weak else None


def _gain(cleaned: ArtifactMetrics, other: ArtifactMetrics) -> float | None:
    if cleaned.consistency is None or other.consistency is None:
        return None
    return cleaned.consistency - other.consistency


def _is_gone(finding: Finding, cleaned: ArtifactMetrics, raw: ArtifactMetrics) -> bool:
    if finding.kind == "outlier tokens":
        return cleaned.outliers <= REMOVED * raw.outliers
    # Each probe may miss an artifact (the linear one some kinds, the other if content dominates, all with few photos),
    # so all probes that detected it before must have fallen. Leakage is not a criterion: it is relative, and grows when
    # outliers are removed.
    probes = [
        (cleaned.shared, raw.shared, SHARED[0]),
        (cleaned.linear_position, raw.linear_position, _SEEN),
        (cleaned.neighbour_position, raw.neighbour_position, _SEEN),
    ]
    fallen = [after <= REMOVED * before for after, before, seen in probes if before >= seen]
    return bool(fallen) and all(fallen)


def _is_seen(finding: Finding, raw: ArtifactMetrics) -> bool:
    """True if the crops show a finding, so that they can show its removal."""
    seen = raw.shared >= SHARED[0] or max(raw.linear_position, raw.neighbour_position) >= _SEEN
    return seen or finding.kind == "outlier tokens"
