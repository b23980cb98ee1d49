"""Clusters of patches matched to classes: by hand, against all assignments, against k-means, and as results."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from denoising_vit.errors import EvaluationError, PlanError
from denoising_vit.evaluation import clustering as module
from denoising_vit.evaluation.clustering import clustered, clustering, matched
from denoising_vit.evaluation.labelled import LabelledData
from denoising_vit.evaluation.options import ClusteringOptions
from denoising_vit.evaluation.scores import scores
from denoising_vit.evaluation.sources import FeatureSource
from tiny_correspondence import workbench
from tiny_labelled import PATCH, coloured, colours, source_of, speckled, tiny_backbone, write_labelled

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ClusteringOptions(clusters=(3,), seeds=(0,))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledData:
    return write_labelled(tmp_path_factory.mktemp("data"), coloured(1, 0), coloured(6, 1))


def test_classes_of_clusters_by_hand() -> None:
    """Clusters 0 and 1 are mostly class 0, cluster 2 mostly class 1; class 2 gets none by majority."""
    tables = np.array([[[4, 1, 0], [3, 0, 2], [0, 5, 1]], [[2, 0, 0], [1, 0, 1], [1, 1, 0]]], np.int32)
    found = matched(tables, "majority")
    assert found.hits.tolist() == [[7, 5, 0], [3, 1, 0]]
    assert found.truth.tolist() == [[7, 6, 3], [4, 1, 1]]
    assert found.predicted.tolist() == [[10, 6, 0], [4, 2, 0]]
    assert scores(found).miou == pytest.approx(100 * (10 / 15 + 6 / 9 + 0) / 3)
    # One per class: cluster 0 keeps class 0 (6 of 12), cluster 2 class 1 (6 of 9), and cluster 1 gets class 2 (3 of 8).
    hungarian = matched(tables, "hungarian")
    assert hungarian.hits.tolist() == [[4, 5, 2], [2, 1, 1]]
    assert scores(hungarian).miou == pytest.approx(100 * (6 / 12 + 6 / 9 + 3 / 8) / 3)


def test_hungarian_matching_is_the_best_of_all_assignments() -> None:
    tables = np.random.default_rng(0).integers(0, 50, (3, 5, 5)).astype(np.int32)
    total = tables.sum(0)
    best = max(
        np.mean([total[k, c] / (total[k].sum() + total[:, c].sum() - total[k, c]) for k, c in enumerate(order)])
        for order in itertools.permutations(range(5))
    )
    assert scores(matched(tables, "hungarian")).miou == pytest.approx(100 * best)
    with pytest.raises(EvaluationError, match="as many clusters as classes, got 4 and 5"):
        matched(tables[:, :4], "hungarian")


def test_classes_with_distinct_colours_are_clustered_perfectly(data: LabelledData) -> None:
    tables = clustered(source_of(colours), data, OPTIONS, 3, 0)
    assert scores(matched(tables, "majority")).miou == scores(matched(tables, "hungarian")).miou == 100
    assert tables.sum((1, 2)).tolist() == [48 * 48] * 6


def test_counts_match_plain_k_means(data: LabelledData) -> None:
    """Lloyd's iterations from the fitted clusters' means change nothing, and the counts are those of their pixels."""
    tables = clustered(source_of(speckled), data, OPTIONS, 4, 1)
    masks = [image.labels().numpy() for image in data.val.images]
    images = torch.stack([torch.from_numpy(image.pixels()).permute(2, 0, 1) for image in data.val.images]) / 255
    points = speckled(images).half().float().reshape(-1, 3).numpy()
    from sklearn.cluster import KMeans

    chosen = []
    generator = torch.Generator().manual_seed(1)
    for start in range(0, len(points), 36):
        chosen.append(points[start : start + 36][torch.randperm(36, generator=generator).numpy()])
    centres = KMeans(4, n_init=1, random_state=1).fit(np.concatenate(chosen)).cluster_centers_  # pyright: ignore[reportArgumentType]
    owners = ((points[:, None] - centres) ** 2).sum(-1).argmin(1).reshape(6, 6, 6)
    means = np.stack([points[owners.flatten() == k].mean(0) for k in range(4)])
    assert np.allclose(means, centres, atol=1e-4)
    pixels = owners.repeat(PATCH, 1).repeat(PATCH, 2)
    expected = [
        [[int(((own == k) & (mask == c)).sum()) for c in range(3)] for k in range(4)]
        for own, mask in zip(pixels, masks, strict=True)
    ]
    assert tables.tolist() == expected


def test_more_clusters_have_a_higher_majority_miou(data: LabelledData) -> None:
    few, many = (scores(matched(clustered(source_of(speckled), data, OPTIONS, k, 0), "majority")).miou for k in (3, 60))
    assert many > few + 5


def test_few_patches_are_drawn_from_every_image(data: LabelledData) -> None:
    with pytest.raises(EvaluationError, match="18 patches are fewer than 19 clusters"):
        clustered(source_of(), data, ClusteringOptions(patches=18), 19, 0)
    assert clustered(source_of(), data, ClusteringOptions(patches=18), 3, 0).sum() == 6 * 48 * 48


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (ClusteringOptions(clusters=()), "clusters must be one or more different numbers of at least 1, got"),
        (ClusteringOptions(clusters=(3, 3)), "clusters must be one or more different numbers"),
        (ClusteringOptions(seeds=(-1,)), "seeds must be one or more different numbers of at least 0, got"),
        (ClusteringOptions(patches=-1), "patches must be at least 0, got -1"),
    ],
)
def test_options_out_of_range_are_refused(options: ClusteringOptions, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        options.validate()


def test_lines_of_each_number_of_clusters_have_paired_intervals(
    tmp_path: Path, data: LabelledData, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[str, int, int]] = []

    def noted(source: FeatureSource, data: LabelledData, options: Any, clusters: int, seed: int, **how: Any) -> Any:
        runs.append((source.name, clusters, seed))
        return clustered(source, data, options, clusters, seed, **how)

    monkeypatch.setattr(module, "clustered", noted)
    options = ClusteringOptions(clusters=(3, 7), seeds=(0, 1))
    bench = workbench(tmp_path, data, {"clean": tiny_backbone()})
    lines = [line for line, _ in clustering(bench, ["raw", "clean"], options)]
    found = [(line["settings"]["clusters"], line["settings"]["matching"], line["features"]) for line in lines]
    ways = [(3, "majority"), (3, "hungarian"), (7, "majority")]
    assert found == [(*way, name) for way in ways for name in ("raw", "clean")]
    for raw, clean in zip(lines[::2], lines[1::2], strict=True):
        assert clean["failed"] is None and [seed["seed"] for seed in clean["seeds"]] == [0, 1]
        paired = clean["paired"]
        assert paired["difference"] == pytest.approx(clean["metrics"]["mIoU"] - raw["metrics"]["mIoU"])
        assert paired["low"] < paired["difference"] < paired["high"]
    assert len(runs) == len(set(runs)) == 8  # both matchings use the same clusters
    assert all(kept for _, kept in clustering(bench, ["raw", "clean"], options))
