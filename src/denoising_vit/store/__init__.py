"""The feature store: denoised features of whole data sets in zarr v3, written and resumed shard by shard."""

from denoising_vit.store.leases import Lease
from denoising_vit.store.manifest import FORMAT, FORMAT_VERSION, Manifest
from denoising_vit.store.passes import Problem, ShardSampler, StoreDataset
from denoising_vit.store.reading import MissingImageError, StoredFeatures
from denoising_vit.store.store import FeatureStore
from denoising_vit.store.writing import ShardWriter

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "FeatureStore",
    "Lease",
    "Manifest",
    "MissingImageError",
    "Problem",
    "ShardSampler",
    "ShardWriter",
    "StoreDataset",
    "StoredFeatures",
]
