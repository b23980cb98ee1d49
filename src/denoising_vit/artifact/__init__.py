"""G of a backbone as a thing of its own: found by calibration, kept in a file, taken away from any features."""

from denoising_vit.artifact.artifact import FORMAT, FORMAT_VERSION, Artifact
from denoising_vit.artifact.known import (
    SHIPPED,
    KnownArtifact,
    artifact_digest,
    known_artifact,
    load_artifact,
    resampling_note,
    shipped_for,
)

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "SHIPPED",
    "Artifact",
    "KnownArtifact",
    "artifact_digest",
    "known_artifact",
    "load_artifact",
    "resampling_note",
    "shipped_for",
]
