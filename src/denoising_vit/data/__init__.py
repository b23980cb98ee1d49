"""Images on disk or in an object store, and why entries were skipped."""

from denoising_vit.data.dataset import Dataset, Item, Skipped, named_photos, spread
from denoising_vit.data.listing import find_photos
from denoising_vit.data.sources import open_dataset

__all__ = ["Dataset", "Item", "Skipped", "find_photos", "named_photos", "open_dataset", "spread"]
