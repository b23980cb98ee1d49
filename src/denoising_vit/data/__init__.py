"""Images on disk or in an object store, and what of them cannot be used and why."""

from denoising_vit.data.choosing import named_photos, spread
from denoising_vit.data.finding import find_photos
from denoising_vit.data.items import Item, Skipped
from denoising_vit.data.reading import Dataset
from denoising_vit.data.sources import open_dataset

__all__ = ["Dataset", "Item", "Skipped", "find_photos", "named_photos", "open_dataset", "spread"]
