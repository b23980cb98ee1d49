"""Errors and warnings for users: what was expected, what was given, what to do; and a check of options."""

from __future__ import annotations

from collections.abc import Mapping


class DenoisingVitError(Exception):
    """Base class of all errors that this package raises deliberately."""


class PhotoError(DenoisingVitError):
    """A photo cannot be read or used; a batch job skips it with the reason."""


class BackboneError(DenoisingVitError):
    """A backbone cannot be built, or its output is not a patch grid."""


class WeightsError(BackboneError):
    """Weights are missing, belong to another model, or are not finite."""


class SizeError(DenoisingVitError, ValueError):
    """An image size does not fit the patch grid."""


class PlanError(DenoisingVitError, ValueError):
    """An option is out of range, or options are inconsistent."""


class FitError(DenoisingVitError):
    """A fit failed numerically, or cannot be run."""


class OutputError(DenoisingVitError):
    """A location is not writable, or contains a file that must not be replaced."""


class FormatError(DenoisingVitError):
    """A file was not written by this package, or was written for another purpose."""


class ArtifactError(DenoisingVitError):
    """An artifact cannot be estimated from these photos, or belongs to another backbone."""


class DenoiserError(DenoisingVitError):
    """A denoiser cannot be found, or belongs to another backbone."""


class ExportError(DenoisingVitError):
    """An export cannot be written or checked, or was changed afterwards."""


class HubError(DenoisingVitError):
    """A hub is unreachable, or rejects an upload or download."""


class TrainError(DenoisingVitError):
    """A training run cannot be started, resumed or continued."""


class StoreError(DenoisingVitError):
    """A feature store cannot be opened, read or written as requested."""


class FieldError(StoreError):
    """A store cannot hold one image's field; other images are not affected."""


class EvaluationError(DenoisingVitError):
    """A metric cannot be computed on the data or features."""


class AppError(DenoisingVitError):
    """The app cannot start, or a request to it is invalid."""


class ClipError(DenoisingVitError):
    """A video cannot be read or written; a batch job skips it with the reason."""


class DenoisingVitWarning(UserWarning):
    """A problem that does not stop the work."""


def require_at_least(options: object, least: Mapping[str, float], error: type[DenoisingVitError]) -> None:
    """Raise the error unless each of these options is None or at least this number; NaN is rejected too."""
    for name, number in least.items():
        value = getattr(options, name)
        if value is not None and not value >= number:
            raise error(f"{name} must be at least {number}, got {value}")
