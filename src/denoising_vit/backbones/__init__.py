"""Feature extractors: pretrained ViTs from timm, or any callable, behind one face."""

from denoising_vit.backbones.base import Backbone
from denoising_vit.backbones.fingerprint import Fingerprint
from denoising_vit.backbones.loading import load_backbone
from denoising_vit.backbones.seeds import SEEDS, Seed

__all__ = ["SEEDS", "Backbone", "Fingerprint", "Seed", "load_backbone"]
