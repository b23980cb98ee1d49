"""Kinds of maps. No heavy imports: option modules read the names from here."""

from __future__ import annotations

from collections.abc import Mapping

#: Kinds of maps that a palette colours, and their headings.
TITLES: Mapping[str, str] = {
    "pca": "PCA",
    "kmeans": "k-means",
    "norm": "norm",
    "first": "1st component",
    "second": "2nd component",
    "third": "3rd component",
    "foreground-pca": "foreground PCA",
    "foreground": "foreground",
}
