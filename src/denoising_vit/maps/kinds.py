"""The table of all kinds of maps. No heavy imports: option modules read the names from here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class MapKind(NamedTuple):
    """A kind of maps."""

    title: str  # heading of its pictures
    legend: str = ""  # meaning of its colours
    fields: tuple[str, ...] = ()  # attributes of a palette with its colours; empty if a palette does not draw it


SIMILARITY = "similarity"

#: All kinds, by name.
MAP_KINDS: Mapping[str, MapKind] = {
    "pca": MapKind("PCA", "Three principal components as red, green and blue.", ("basis",)),
    "kmeans": MapKind("k-means", "Each colour is one of six clusters of patches.", ("clusters",)),
    "norm": MapKind(
        "norm",
        "Length of the feature vectors: dark is short, bright is long. Single bright patches are outlier tokens.",
        ("norms",),
    ),
    "first": MapKind("1st component", "The strongest principal component, from dark to bright.", ("basis",)),
    "second": MapKind("2nd component", "The second principal component, from dark to bright.", ("basis",)),
    "third": MapKind("3rd component", "The third principal component, from dark to bright.", ("basis",)),
    "foreground-pca": MapKind(
        "foreground PCA",
        "Principal components of the foreground alone; the rest is black.",
        ("foreground", "foreground_basis"),
    ),
    "foreground": MapKind(
        "foreground", "White is foreground according to the first principal component.", ("foreground",)
    ),
    SIMILARITY: MapKind(
        "similarity to ○", "Cosine to the chosen patch: red is similar, white unrelated, blue opposite."
    ),
    "artifact": MapKind("G"),
    "artifact-norm": MapKind("|G|"),
    "residual": MapKind("residual norm"),
}

#: Kinds that a palette colours, and their headings.
TITLES: Mapping[str, str] = {name: kind.title for name, kind in MAP_KINDS.items() if kind.fields}
