"""Object discovery: one box per image, found from features alone, compared with annotated objects."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
