# The public names and where each is: read by type checkers, and by lazy_loader when a name is first used.
from .artifact import Artifact, load_artifact
from .backbones import SEEDS, Backbone, load_backbone
from .cleaning.clean import clean, restore
from .decomposition.calibration import calibrate
from .decomposition.options import CalibrationOptions, DenoiseOptions, NeuralFieldOptions
from .decomposition.result import Decomposition
from .denoise import denoise_image
from .denoiser import Denoiser, load_denoiser
from .denoiser.denoised_vit import DenoisedViT
from .diagnosis.diagnose import diagnose
from .diagnosis.options import DiagnoseOptions
from .distilled.weights import DistilledWeights
from .errors import (
    ArtifactError,
    BackboneError,
    DenoiserError,
    DenoisingVitError,
    ExportError,
    FitError,
    FormatError,
    HubError,
    PhotoError,
    PlanError,
    SizeError,
    WeightsError,
)
from .export.checkpoints import load_extractor
from .export.exporting import export_extractor
from .export.options import ExportOptions
from .export.verification import verify_export
from .tiling.features import tiled_features
from .training_free import Registers, Subspace, find_registers, find_subspace
from .views.options import CropOptions
from .views.plan import ViewPlan

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
    "DistilledWeights",
    "ExportError",
    "ExportOptions",
    "FitError",
    "FormatError",
    "HubError",
    "NeuralFieldOptions",
    "PhotoError",
    "PlanError",
    "Registers",
    "SizeError",
    "Subspace",
    "ViewPlan",
    "WeightsError",
    "calibrate",
    "clean",
    "denoise_image",
    "diagnose",
    "export_extractor",
    "find_registers",
    "find_subspace",
    "load_artifact",
    "load_backbone",
    "load_denoiser",
    "load_extractor",
    "restore",
    "tiled_features",
    "verify_export",
]
