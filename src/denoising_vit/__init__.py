"""Artifact-free dense features from any Vision Transformer.

>>> import denoising_vit as dv
>>> backbone = dv.load_backbone("vit_small_patch14_dinov2.lvd142m")
>>> result = dv.denoise_image(backbone, "cat.jpg")
>>> result.semantic  # (h, w, C), clean
"""

from denoising_vit.artifact import Artifact, load_artifact
from denoising_vit.backbones import SEEDS, Backbone, load_backbone
from denoising_vit.calibration import CalibrationOptions, calibrate
from denoising_vit.decomposition import Decomposition
from denoising_vit.decomposition.neural_field import NeuralFieldOptions
from denoising_vit.denoise import denoise_image
from denoising_vit.denoised import DenoisedViT
from denoising_vit.denoiser import Denoiser, load_denoiser
from denoising_vit.diagnosis import DiagnoseOptions, diagnose
from denoising_vit.errors import (
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
from denoising_vit.export import ExportOptions, export_extractor, load_extractor, verify_export
from denoising_vit.options import DenoiseOptions
from denoising_vit.views import CropOptions, ViewPlan

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
