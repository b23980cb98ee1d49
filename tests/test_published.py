"""Published figures: the transcribed file, and errors for unknown models and variants."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files

import pytest

from denoising_vit.backbones.catalog import SEEDS
from denoising_vit.denoiser.published import FIGURES, VARIANTS, published_row, published_rows
from denoising_vit.errors import EvaluationError


def figures(model: str, variant: str) -> list[float | None]:
    return [published_row(model, variant).figures[key] for key in FIGURES]


def test_the_file_names_its_source_first() -> None:
    text = files("denoising_vit.denoiser.published").joinpath("figures.csv").read_text(encoding="utf-8")
    assert text.startswith(
        "# Yang et al., Denoising Vision Transformers, ECCV 2024 (arXiv 2401.02957), and the tables released with its"
        " code\n"
    )


@pytest.mark.parametrize(
    ("model", "variant", "expected"),
    [
        ("vit_small_patch14_dinov2.lvd142m", "baseline", [81.78, 88.44, 44.05, 55.53, 0.4340, 0.1331, 84.49]),
        ("vit_base_patch14_dinov2.lvd142m", "imgnet_denoised", [85.17, 91.55, 48.68, 60.60, 0.3832, 0.1152, 88.50]),
        ("vit_base_patch14_dinov2.lvd142m", "imgnet_distilled", [85.33, 91.48, 48.85, 60.47, 0.3704, 0.1115, 89.74]),
        ("vit_large_patch14_reg4_dinov2.lvd142m", "voc_denoised", [84.37, 91.42, 49.19, 62.21, 0.3852, 0.1141, 88.45]),
        ("vit_base_patch16_224.mae", "voc_distilled", [51.91, 64.67, 23.73, 31.88, 0.6733, 0.2282, 65.33]),
        ("eva02_base_patch16_clip_224.merged2b", "baseline", [71.49, 82.69, 37.89, 50.31, None, None, None]),
        ("eva02_base_patch16_clip_224.merged2b", "voc_denoised", [73.76, 84.50, 37.99, 50.40, 0.6196, 0.1904, 69.86]),
    ],
)
def test_figures_are_as_published(model: str, variant: str, expected: list[float | None]) -> None:
    assert figures(model, variant) == expected


def test_column_sums_and_missing_values_are_unchanged() -> None:
    sums = [round(sum(row.figures[key] or 0 for row in published_rows()), 4) for key in FIGURES]
    assert sums == [2590.13, 2890.36, 1381.68, 1767.22, 15.9215, 4.8737, 2549.57]
    missing = Counter((row.model, row.variant) for row in published_rows() if None in row.figures.values())
    assert missing == Counter(("eva02_base_patch16_clip_224.merged2b", name) for name in ("baseline", "voc_distilled"))


def test_every_variant_has_as_many_models_as_published() -> None:
    assert Counter(row.variant for row in published_rows()) == dict(zip(VARIANTS, (12, 12, 8, 1, 1), strict=True))
    assert len({(row.model, row.variant) for row in published_rows()}) == 34


def test_models_are_the_seed_models_of_the_paper() -> None:
    assert {row.model for row in published_rows()} == {name for name, seed in SEEDS.items() if seed.in_paper}


def test_figures_are_in_the_range_of_their_units() -> None:
    for row in published_rows():
        assert tuple(row.figures) == FIGURES
        for key, value in row.figures.items():
            low, high = {"nyu_rmse": (0.3, 0.7), "nyu_absrel": (0.1, 0.3)}.get(key, (20, 100))
            assert value is None or low < value < high, (row.model, row.variant, key)


def test_rows_are_shared_and_cannot_be_changed() -> None:
    assert published_rows() is published_rows()
    with pytest.raises(TypeError):
        published_rows()[0].figures["voc_miou"] = 100.0  # type: ignore[index]


def test_error_for_an_unknown_variant_lists_those_of_the_model() -> None:
    with pytest.raises(EvaluationError, match=r"dino with published scores \(baseline, voc_denoised, voc_distilled\)"):
        published_row("vit_base_patch16_224.dino", "imgnet_denoised")


def test_error_for_an_unknown_model_suggests_similar_ones() -> None:
    with pytest.raises(EvaluationError, match=r"got 'vit_base_patch16_224\.dyno'; did you mean vit_base_patch16_224\."):
        published_row("vit_base_patch16_224.dyno", "baseline")
    with pytest.raises(EvaluationError, match=r"got '\?'; published models: vit_small_patch14_dinov2\.lvd142m, "):
        published_row("?", "baseline")
