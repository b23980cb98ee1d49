# The names of this package and where each is defined: read by type checkers, and by lazy_loader on first use.
from .loading import (
    FoundDenoiser,
    GivenDenoiser,
    denoiser_digest,
    find_denoiser,
    find_shipped,
    load_denoiser,
    source_name,
)
from .module import Denoiser, read_denoiser, write_denoiser
from .published import HUB_ID, fetch_published, published_file, published_variants

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
