# The names of this package and where each is defined: read by type checkers, and by lazy_loader on first use.
from .base import Backbone, Intermediates
from .catalog import SEEDS, BackboneSpec, Seed
from .loading import load_backbone
from .recorded import Fingerprint

__all__ = ["SEEDS", "Backbone", "BackboneSpec", "Fingerprint", "Intermediates", "Seed", "load_backbone"]
