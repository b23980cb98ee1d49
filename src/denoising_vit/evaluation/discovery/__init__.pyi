# The names of this room and where each is defined: read by type checkers, and by lazy_loader on first use.
from .evaluate import Localised, discovery, localise
from .layouts import BoxedImage, open_boxed
from .lost import Discovered, find_object
from .options import DiscoveryOptions

__all__ = [
    "BoxedImage",
    "Discovered",
    "DiscoveryOptions",
    "Localised",
    "discovery",
    "find_object",
    "localise",
    "open_boxed",
]
