"""Pictures of features: PCA, k-means, norm, similarity and more, each in colours that everything compared shares.

One basis, one range, one set of clusters: two maps that look alike are alike, and a difference of colour is a
difference of features.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
