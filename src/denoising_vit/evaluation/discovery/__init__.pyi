# The names of this package and where each is defined: read by type checkers, and by lazy_loader on first use.
from .layouts import BoxedData, BoxedImage, open_boxed
from .lost import Discovered, DiscoveryOptions, Localised, discovery, find_object, localise

__all__ = [
    "BoxedData",
    "BoxedImage",
    "Discovered",
    "DiscoveryOptions",
    "Localised",
    "discovery",
    "find_object",
    "localise",
    "open_boxed",
]
