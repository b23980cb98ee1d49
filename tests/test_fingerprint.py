"""Fingerprints match for the same weights in any precision, and for no other weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from denoising_vit import Backbone, load_backbone
from denoising_vit.backbones.bundled import BUNDLED_MODEL, bundled_available
from denoising_vit.backbones.recorded import SAME, Fingerprint, synthetic_image

needs_bundled = pytest.mark.skipif(not bundled_available(BUNDLED_MODEL), reason="needs the extra 'offline'")


def load(name: str = "test_vit", **options: Any) -> Backbone:
    return load_backbone(name, **{"weights": "random", "dtype": "float32", "device": "cpu", **options})


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Backbone]]:
    """Loads trained weights; features of random ones barely depend on single blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield lambda **options: load(BUNDLED_MODEL, weights="bundled", **options)


@pytest.fixture(scope="module")
def trained(dinov2: Callable[..., Backbone]) -> Fingerprint:
    return dinov2().fingerprint


# The same weights


@needs_bundled
def test_the_same_weights_in_float32_and_bfloat16_match(dinov2: Callable[..., Backbone], trained: Fingerprint) -> None:
    rounded = dinov2(dtype="bfloat16").fingerprint
    assert trained.matches(rounded) and rounded.matches(trained)
    assert SAME < trained.cosine(rounded) < 1  # measured: 0.99986


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch16_dinov3"])
def test_random_weights_in_float32_and_bfloat16_match(name: str) -> None:
    assert load(name).fingerprint.matches(load(name, dtype="bfloat16").fingerprint)


def test_two_loads_have_the_same_fingerprint() -> None:
    first, second = load().fingerprint, load().fingerprint
    assert first == second
    assert first.short == second.short
    assert hash(first) == hash(second)


@needs_bundled
def test_numerical_noise_still_matches(dinov2: Callable[..., Backbone], trained: Fingerprint) -> None:
    backbone = dinov2()
    perturb(backbone, 1e-5)
    assert trained.matches(backbone.fingerprint)
    assert trained.short == backbone.fingerprint.short


def perturb(model: nn.Module, relative: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + relative * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(("name", "stride"), [("test_vit", 8), ("test_vit", 5), ("vit_small_patch14_dinov2", 4)])
def test_every_backbone_that_loads_has_a_fingerprint(name: str, stride: int) -> None:
    assert len(load(name, stride=stride).fingerprint.values) == 128


def test_a_module_has_a_fingerprint() -> None:
    torch.manual_seed(0)
    first, second = (load_backbone(nn.Conv2d(3, 6, 14, 14), patch_size=14, default_size=70) for _ in range(2))
    assert not first.fingerprint.matches(second.fingerprint)
    again = load_backbone(first.get_submodule("model"), patch_size=14, default_size=70)
    assert first.fingerprint.matches(again.fingerprint)


# Other weights


@needs_bundled
@pytest.mark.parametrize("options", [{"layer": 10}, {"layer": 0}, {"norm": False}, {"layer": 10, "norm": False}])
def test_another_layer_or_norm_does_not_match(
    options: dict[str, Any], dinov2: Callable[..., Backbone], trained: Fingerprint
) -> None:
    assert not trained.matches(dinov2(**options).fingerprint)


def test_another_model_does_not_match() -> None:
    prints = [load(name).fingerprint for name in ("test_vit", "test_vit2", "vit_tiny_patch16_224")]
    for index, first in enumerate(prints):
        assert all(first.matches(second) == (index == other) for other, second in enumerate(prints))


@needs_bundled
def test_random_weights_do_not_match_trained_ones(trained: Fingerprint) -> None:
    assert not trained.matches(load(BUNDLED_MODEL).fingerprint)


@needs_bundled
@pytest.mark.parametrize("block", [0, 6, 11])
def test_one_random_block_does_not_match(block: int, dinov2: Callable[..., Backbone], trained: Fingerprint) -> None:
    """For any block; the highest cosine measured is 0.79."""
    backbone = dinov2()
    torch.manual_seed(0)
    for module in backbone.get_submodule(f"model.blocks.{block}").modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    assert not trained.matches(backbone.fingerprint)
    assert trained.cosine(backbone.fingerprint) < 0.9


@needs_bundled
def test_a_large_perturbation_does_not_match(dinov2: Callable[..., Backbone], trained: Fingerprint) -> None:
    backbone = dinov2()
    perturb(backbone, 0.1)
    assert not trained.matches(backbone.fingerprint)


@needs_bundled
def test_positions_in_another_order_do_not_match(dinov2: Callable[..., Backbone], trained: Fingerprint) -> None:
    backbone = dinov2()
    positions = backbone.get_parameter("model.pos_embed")
    with torch.no_grad():
        positions[:, 1:] = positions[:, 1:].unflatten(1, (37, 37)).transpose(1, 2).flatten(1, 2).clone()
    assert not trained.matches(backbone.fingerprint)


# The values


def of(features: Tensor) -> Fingerprint:
    return Fingerprint.of(lambda image: features, 8)


def test_a_fingerprint_is_128_numbers_of_unit_length() -> None:
    values = load().fingerprint.values
    assert len(values) == 128
    assert np.linalg.norm(values) == pytest.approx(1, abs=1e-4)


def test_order_of_tokens_and_channels_matters() -> None:
    features = torch.randn(1, 7, 11, 13, generator=torch.Generator().manual_seed(0))
    plain = of(features)
    assert plain.matches(of(2 * features))
    for other in (features.flip(1), features.flip(2), features.roll(1, 3), -features, features.transpose(1, 2)):
        assert not plain.matches(of(other.contiguous()))


def test_features_beyond_the_projection_width_matter() -> None:
    features = torch.randn(1, 10, 10, 384, generator=torch.Generator().manual_seed(0))  # 2.3 times the width of 16,384
    other = features.clone()
    other[:, 9] = 0
    assert not of(features).matches(of(other))


def test_swapped_parts_of_a_long_feature_map_do_not_match() -> None:
    features = torch.randn(1, 2, 1, 1 << 14, generator=torch.Generator().manual_seed(0))  # twice the width
    assert not of(features).matches(of(features.flip(1)))


def test_a_fingerprint_survives_json() -> None:
    fingerprint = load().fingerprint
    again = Fingerprint(tuple(json.loads(json.dumps(fingerprint.values))))
    assert again == fingerprint
    assert again.matches(fingerprint)
    assert again.short == fingerprint.short


def test_the_short_form_is_eight_hexadecimal_digits() -> None:
    assert re.fullmatch(r"[0-9a-f]{8}", load().fingerprint.short)
    assert Fingerprint((0.0,) * 128).short == "00000000"
    assert Fingerprint((0.5, *(-0.5,) * 30, 0.5, *(0.5,) * 96)).short == "80000001"


def test_fingerprints_of_different_lengths_do_not_match() -> None:
    values = load().fingerprint.values
    assert not Fingerprint(values).matches(Fingerprint(values[:64]))
    assert not Fingerprint(()).matches(Fingerprint(values))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_zero_or_nan_features_match_nothing(value: float) -> None:
    empty = of(torch.full((1, 2, 3, 5), value))
    assert not empty.matches(empty)
    assert not empty.matches(of(torch.ones(1, 2, 3, 5)))


def test_synthetic_image_is_fixed_and_in_the_range_of_normalised_photos() -> None:
    image = synthetic_image(112)
    assert image.shape == (1, 3, 112, 112)
    assert image.dtype == torch.float32
    assert torch.equal(image, synthetic_image(112))
    assert 1.5 < float(image.abs().max()) <= 2
    assert all(float(channel.std()) > 0.5 for channel in image[0])
    corner = [np.sin(0) + np.cos(0)] * 3
    np.testing.assert_allclose(image[0, :, 0, 0].numpy(), corner, atol=1e-6)


def test_fingerprint_does_not_change_random_generators() -> None:
    backbone = load()
    torch.manual_seed(3)
    np.random.seed(3)
    expected = float(torch.rand(())), float(np.random.rand())
    torch.manual_seed(3)
    np.random.seed(3)
    assert backbone.fingerprint
    assert (float(torch.rand(())), float(np.random.rand())) == expected
