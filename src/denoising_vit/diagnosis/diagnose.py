"""diagnose: metrics, findings and verdict for a backbone on photos."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import describe
from denoising_vit.data import Skipped
from denoising_vit.decomposition.calibration import OnPhoto, doubt_about
from denoising_vit.decomposition.inputs import named_pixels
from denoising_vit.diagnosis.evidence import Evidence, EvidenceCollector
from denoising_vit.diagnosis.options import DiagnoseOptions
from denoising_vit.diagnosis.verdict import (
    CLIP,
    Content,
    Finding,
    Judgement,
    Verdict,
    conclude,
    findings,
    judge,
    too_few,
)
from denoising_vit.environment import package_version
from denoising_vit.extractors import Extractor
from denoising_vit.metrics.artifacts import ArtifactMetrics, artifact_metrics
from denoising_vit.metrics.blank_test import blank_figures
from denoising_vit.metrics.tokens import typical_energy


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The result of a diagnosis.

    Attributes:
        verdict: whether to clean, and how.
        findings: artifacts of the raw features.
        judgements: effect of each method, by name.
        metrics: label-free metrics by source: raw, subtract, exact and further extractors.
        shared: fraction of the raw features' energy in a pattern that is the same in every photo.
        evidence: features, artifact and maps.
        info: backbone, options, photos and seconds as JSON values.
    """

    verdict: Verdict
    findings: tuple[Finding, ...]
    judgements: dict[str, Judgement]
    metrics: dict[str, ArtifactMetrics]
    shared: float
    evidence: Evidence = field(repr=False)
    info: dict[str, Any] = field(default_factory=dict, repr=False)

    def record(self) -> dict[str, Any]:
        """The diagnosis as JSON values, without features."""
        calibration = self.evidence.calibration
        return {
            "verdict": asdict(self.verdict),
            "findings": [asdict(finding) for finding in self.findings],
            "judgements": {name: asdict(judgement) for name, judgement in self.judgements.items()},
            "metrics": {name: asdict(metrics) for name, metrics in self.metrics.items()},
            "shared": self.shared,
            "stability": calibration.stability.record(),
            "split_half": {str(count): value for count, value in calibration.split_half.items()},
            **self.info,
        }


def diagnose(
    backbone: Backbone,
    photos: Iterable[Any],
    *,
    extractors: Mapping[str, Extractor] | None = None,
    progress: OnPhoto | None = None,
    options: DiagnoseOptions | None = None,
    **changes: Any,
) -> Diagnosis:
    """Diagnose a backbone on photos: raw features, features minus the artifact, and those of the exact method.

    Args:
        backbone: from :func:`~denoising_vit.load_backbone`.
        photos: paths, PIL images or (H, W, 3) uint8 arrays; at least 8, preferably a few dozen. Unusable photos are
            skipped and listed in ``info["skipped"]``.
        extractors: further extractors to evaluate, on the same grid.
        progress: called once per photo with its name, and None or the reason for skipping it.
        options: options of the diagnosis.
        **changes: individual fields of :class:`DiagnoseOptions`, such as ``views=16``.

    Raises:
        ArtifactError: if fewer than 8 photos are usable.
        EvaluationError: if features are constant.
        PlanError: if there are too few views, or an option is out of range.
        SizeError: if the size does not fit the patch grid.
    """
    options = replace(options or DiagnoseOptions(), **changes)
    return run_diagnosis(backbone, named_pixels(photos), extractors or {}, progress or (lambda *_: None), options)


def run_diagnosis(
    backbone: Backbone,
    photos: Iterable[tuple[str, np.ndarray | Skipped]],
    extractors: Mapping[str, Extractor],
    progress: OnPhoto,
    options: DiagnoseOptions,
) -> Diagnosis:
    """Like :func:`diagnose`, from names with pixels, or the reason why a photo was skipped."""
    started = time.perf_counter()
    evidence = EvidenceCollector(backbone, options, extractors).run(photos, progress)
    metrics = _metrics(evidence, options.seed)
    stability = evidence.calibration.stability
    signal = max(stability.signal, 0.0)
    shared = signal / (signal + typical_energy(evidence.crops["subtract"]))
    found = findings(metrics["raw"], shared, stability)
    content = Content.of(evidence.crops["subtract"], options.clip or CLIP)
    judgements = {name: judge(metrics[name], metrics["raw"], content, found) for name in metrics if name != "raw"}
    artifact = evidence.calibration.artifact
    info = {
        "backbone": describe(backbone),
        **options.recorded(),
        "size": list(artifact.size),
        "photos": artifact.info["photos"],
        "skipped": artifact.info["skipped"],
        "doubt": doubt_about(stability),
        "version": package_version(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    verdict = conclude(found, judgements, metrics, too_few(shared, stability))
    return Diagnosis(verdict, found, judgements, metrics, shared, evidence, info)


def _metrics(evidence: Evidence, seed: int) -> dict[str, ArtifactMetrics]:
    """Label-free metrics of every source."""
    blank = {name: blank_figures(probe, evidence.blank["raw"]) for name, probe in evidence.blank.items()}
    return {
        name: replace(
            artifact_metrics(features, responses=evidence.responses, pair=evidence.pairs.get(name), seed=seed),
            **blank.get(name, {}),
        )
        for name, features in evidence.crops.items()
    }
