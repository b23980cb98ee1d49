"""Depth estimation with a linear probe, by the published protocol or a quick one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
