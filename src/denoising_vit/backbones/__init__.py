"""Feature extractors: pretrained ViTs from timm, or any callable, behind one face."""

from denoising_vit.backbones.base import Backbone
from denoising_vit.backbones.fingerprint import Fingerprint
from denoising_vit.backbones.intermediates import Intermediates
from denoising_vit.backbones.loading import load_backbone
from denoising_vit.backbones.seeds import SEEDS, Seed
from denoising_vit.backbones.spec import BackboneSpec

__all__ = ["SEEDS", "Backbone", "BackboneSpec", "Fingerprint", "Intermediates", "Seed", "load_backbone"]
