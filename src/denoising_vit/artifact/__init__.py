"""The artifact G of a backbone: a file written by calibration, to subtract from features."""

from denoising_vit.artifact.artifact import (
    FORMAT,
    FORMAT_VERSION,
    NONE,
    SHIPPED,
    Artifact,
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
    "NONE",
    "SHIPPED",
    "Artifact",
    "KnownArtifact",
    "artifact_digest",
    "known_artifact",
    "load_artifact",
    "resampling_note",
    "shipped_for",
]
