"""Pictures of features (PCA, k-means, norm, similarity and more) in colours shared by all compared maps."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
