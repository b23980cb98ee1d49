"""Object discovery: whether the one box that features alone find in an image is around an object."""

from denoising_vit.evaluation.discovery.comparing import discovery
from denoising_vit.evaluation.discovery.images import BoxedImage
from denoising_vit.evaluation.discovery.layouts import open_boxed
from denoising_vit.evaluation.discovery.localising import DiscoveryOptions, Localised, localise
from denoising_vit.evaluation.discovery.lost import Discovered, find_object

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
