"""Object discovery: whether the one box that features alone find in an image is around an object."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
