# The public names and where each is: read by type checkers, and by lazy_loader when a name is first used.
from .artifact import Artifact, load_artifact
from .backbones import SEEDS, Backbone, load_backbone
from .decomposition import Decomposition
from .decomposition.calibration import CalibrationOptions, calibrate
from .decomposition.neural_field import NeuralFieldOptions
from .decomposition.options import DenoiseOptions
from .denoise import denoise_image
from .denoiser import Denoiser, load_denoiser
from .diagnosis import DiagnoseOptions, diagnose
from .errors import (
    ArtifactError,
    BackboneError,
    DenoiserError,
    DenoisingVitError,
    ExportError,
    FitError,
    FormatError,
    PhotoError,
    PlanError,
    SizeError,
    WeightsError,
)
from .export import ExportOptions, export_extractor, load_extractor, verify_export
from .extractors import DenoisedViT
from .views.plan import CropOptions, ViewPlan

__all__ = [
    "SEEDS",
    "Artifact",
    "ArtifactError",
    "Backbone",
    "BackboneError",
    "CalibrationOptions",
    "CropOptions",
    "Decomposition",
    "DenoiseOptions",
    "DenoisedViT",
    "Denoiser",
    "DenoiserError",
    "DenoisingVitError",
    "DiagnoseOptions",
    "ExportError",
    "ExportOptions",
    "FitError",
    "FormatError",
    "NeuralFieldOptions",
    "PhotoError",
    "PlanError",
    "SizeError",
    "ViewPlan",
    "WeightsError",
    "calibrate",
    "denoise_image",
    "diagnose",
    "export_extractor",
    "load_artifact",
    "load_backbone",
    "load_denoiser",
    "load_extractor",
    "verify_export",
]
