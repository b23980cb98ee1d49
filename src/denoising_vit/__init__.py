"""Artifact-free dense features from any Vision Transformer.

>>> import denoising_vit as dv
>>> backbone = dv.load_backbone("vit_small_patch14_dinov2.lvd142m")
>>> result = dv.denoise_image(backbone, "cat.jpg")
>>> result.semantic  # (h, w, C), clean
"""

import lazy_loader

# Importing torch and timm takes seconds; so `dvit --help`, and programs that do not need them, do not wait for it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
