"""The one-pass denoiser (stage 2): the module, its files, and the published checkpoints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
