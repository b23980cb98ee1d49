# The names of this room and where each is defined: read by type checkers, and by lazy_loader on first use.
from .comparing import discovery
from .images import BoxedImage
from .layouts import open_boxed
from .localising import Localised, localise
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
