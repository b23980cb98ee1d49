"""Feature extractors with one interface: pretrained ViTs from timm and transformers, or any callable."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
