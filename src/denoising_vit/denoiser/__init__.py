"""The one-pass denoiser (stage 2): the module, its files, and the published checkpoints."""

from denoising_vit.denoiser.files import read_denoiser, write_denoiser
from denoising_vit.denoiser.loading import (
    FoundDenoiser,
    GivenDenoiser,
    denoiser_digest,
    find_denoiser,
    find_shipped,
    load_denoiser,
    source_name,
)
from denoising_vit.denoiser.module import Denoiser
from denoising_vit.denoiser.published.checkpoints import HUB_ID, fetch_published, published_file, published_variants

__all__ = [
    "HUB_ID",
    "Denoiser",
    "FoundDenoiser",
    "GivenDenoiser",
    "denoiser_digest",
    "fetch_published",
    "find_denoiser",
    "find_shipped",
    "load_denoiser",
    "published_file",
    "published_variants",
    "read_denoiser",
    "source_name",
    "write_denoiser",
]
