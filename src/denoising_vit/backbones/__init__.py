"""Feature extractors: pretrained ViTs from timm, or any callable, behind one face."""

from denoising_vit.backbones.base import Backbone, Intermediates
from denoising_vit.backbones.catalog import SEEDS, Seed
from denoising_vit.backbones.fingerprint import Fingerprint
from denoising_vit.backbones.loading import BackboneSpec, load_backbone

__all__ = ["SEEDS", "Backbone", "BackboneSpec", "Fingerprint", "Intermediates", "Seed", "load_backbone"]
