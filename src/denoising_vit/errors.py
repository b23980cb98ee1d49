"""Errors and warnings that users are meant to read: what was expected, what came, what to do."""

from __future__ import annotations


class DenoisingVitError(Exception):
    """Base of every error this package raises on purpose."""


class PhotoError(DenoisingVitError):
    """A photo that cannot be read or used; a batch job skips it and says why."""


class BackboneError(DenoisingVitError):
    """A backbone that cannot be built, or whose output is not a patch grid."""


class WeightsError(BackboneError):
    """Weights that are missing, belong to another model, or are not finite."""


class SizeError(DenoisingVitError, ValueError):
    """An image size that does not fit the patch grid."""


class PlanError(DenoisingVitError, ValueError):
    """An option out of range, or options that do not fit together."""


class FitError(DenoisingVitError):
    """A fit that failed numerically, or cannot be carried out."""


class OutputError(DenoisingVitError):
    """A place that cannot be written to, or holds something that is not ours to replace."""


class FormatError(DenoisingVitError):
    """A file that is not what this package writes, or was written for something else."""


class ArtifactError(DenoisingVitError):
    """An artifact that cannot be found from these photos, or belongs to another backbone."""


class DenoiserError(DenoisingVitError):
    """A denoiser that cannot be found, or belongs to another backbone."""


class ExportError(DenoisingVitError):
    """An export that cannot be made or checked, or that was changed since."""


class HubError(DenoisingVitError):
    """A hub that cannot be reached, or that refuses to give or take a file."""


class TrainError(DenoisingVitError):
    """A training run that cannot be started, resumed or carried on."""


class StoreError(DenoisingVitError):
    """A feature store that cannot be opened, read or written as asked."""


class FieldError(StoreError):
    """One image's field that a store cannot hold; the others are not affected."""


class EvaluationError(DenoisingVitError):
    """Data or features that a metric cannot be computed on."""


class AppError(DenoisingVitError):
    """The app cannot start, or a request to it is invalid."""


class ClipError(DenoisingVitError):
    """A video that cannot be read or made; a batch job skips it and says why."""


class DenoisingVitWarning(UserWarning):
    """Something worth knowing that does not stop the work."""
