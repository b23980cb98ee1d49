"""Several layers of a backbone from one forward pass."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import denoising_vit as dv
from denoising_vit import Backbone, BackboneError, DenoisedViT, Denoiser, SizeError
from denoising_vit.backbones.timm_vit import TimmBackbone

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "test_vit"  # 6 blocks, 64 channels, patch 16, class token
MEAN_POOLED = "test_vit2"  # 8 blocks, the final norm after the pooling
NO_PREFIX = "vit_medium_patch16_gap_240"


def load(name: str = TINY, **options: Any) -> Backbone:
    return dv.load_backbone(name, **{"weights": "random", "dtype": "float32", "device": "cpu", **options})


def picture(height: int = 48, width: int = 80, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def timm_model(backbone: Backbone) -> VisionTransformer:
    assert isinstance(backbone, TimmBackbone)
    return cast(VisionTransformer, backbone.model)


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return load()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", [TINY, MEAN_POOLED])
def test_each_layer_matches_a_backbone_of_that_layer(name: str, norm: bool) -> None:
    """Random weights have a fixed seed, so all of these are the same model."""
    backbone = load(name, norm=norm)
    found = backbone.forward_intermediates(picture(), [1, 4, 5])
    assert len(found.layers) == len(found.layer_prefixes) == 3
    for layer, features, prefix in zip([1, 4, 5], found.layers, found.layer_prefixes, strict=True):
        expected, expected_prefix = load(name, norm=norm, layer=layer).forward_with_prefix(picture())
        assert features.shape == (2, 3, 5, 64)
        assert torch.equal(features, expected)
        assert torch.equal(prefix, expected_prefix)


@pytest.mark.parametrize("layer", [-1, 2])
def test_features_and_prefix_are_those_of_the_backbone_layer(layer: int) -> None:
    backbone = load(layer=layer)
    features, prefix = backbone.forward_with_prefix(picture())
    found = backbone.forward_intermediates(picture(), [4, 0])  # after and before it
    assert torch.equal(found.features, features)
    assert torch.equal(found.prefix, prefix)
    assert torch.equal(backbone.forward_intermediates(picture(), [layer]).layers[0], features)


@pytest.mark.parametrize("layers", [[4, 1], [1, 4, 1], [-2, -5], range(4, 0, -3)], ids=str)
def test_layers_have_the_requested_order(tiny: Backbone, layers: list[int]) -> None:
    first, fourth = tiny.forward_intermediates(picture(), [1, 4]).layers
    expected = [first if layer % 6 == 1 else fourth for layer in layers]
    found = tiny.forward_intermediates(picture(), layers).layers
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert not torch.equal(first, fourth)


def test_empty_list_gives_no_layers(tiny: Backbone) -> None:
    found = tiny.forward_intermediates(picture(), [])
    assert found.layers == found.layer_prefixes == ()
    assert torch.equal(found.features, tiny(picture()))


def test_one_forward_pass_stops_after_the_last_needed_block() -> None:
    backbone = load(layer=1)
    passed: list[int] = []
    for number, block in enumerate(timm_model(backbone).blocks):
        block.register_forward_hook(lambda *_, number=number: passed.append(number))
    backbone.forward_intermediates(picture(), [3, 0])
    assert passed == [0, 1, 2, 3]


def test_overlapping_patches_have_their_own_grid() -> None:
    """A change of pixels that only the last patch has is largest at that patch in an early layer."""
    backbone = load(stride=8)
    image, changed = picture(40, 64), picture(40, 64)
    changed[..., -8:, -8:] += 5
    found = [backbone.forward_intermediates(shown, [0]) for shown in (image, changed)]
    assert found[0].layers[0].shape == found[0].features.shape == (2, 4, 7, 64)
    difference = (found[1].layers[0] - found[0].layers[0]).norm(dim=-1)[0]
    assert divmod(int(difference.argmax()), 7) == (3, 6)
    assert torch.equal(found[0].layers[0], load(stride=8, layer=0)(image))


def test_a_model_without_prefix_tokens_has_none_in_any_layer() -> None:
    found = load(NO_PREFIX).forward_intermediates(picture(), [0, 5])
    assert found.prefix.shape == (2, 0, 512)
    assert [prefix.shape for prefix in found.layer_prefixes] == [(2, 0, 512)] * 2
    assert [features.shape for features in found.layers] == [(2, 3, 5, 512)] * 2


def test_outputs_are_float32_for_a_bfloat16_backbone() -> None:
    found = load(dtype="bfloat16").forward_intermediates(picture(), [2])
    assert {part.dtype for part in (found.features, found.prefix, *found.layers, *found.layer_prefixes)} == {
        torch.float32
    }


def test_gradients_reach_the_image_through_a_layer(tiny: Backbone) -> None:
    image = picture().requires_grad_()
    tiny.forward_intermediates(image, [0]).layers[0].square().sum().backward()
    assert image.grad is not None and float(image.grad.abs().max()) > 0


@pytest.mark.parametrize("wrong", [6, -7, 100, 1.0, "1", True, None])
def test_a_block_that_does_not_exist_is_refused_with_the_range(tiny: Backbone, wrong: Any) -> None:
    with pytest.raises(BackboneError, match=rf"test_vit has 6 blocks: layers must be -6 to 5, got {wrong!r}"):
        tiny.forward_intermediates(picture(), [0, wrong])


@pytest.mark.parametrize("wrong", [4, None, "45"])
def test_layers_must_be_a_list(tiny: Backbone, wrong: Any) -> None:
    with pytest.raises(BackboneError, match=rf"list of block indices, got {wrong!r}.*layers=\[2, 3, 4, 5\]"):
        tiny.forward_intermediates(picture(), wrong)


def test_module_is_refused_with_advice() -> None:
    backbone = dv.load_backbone(nn.Conv2d(3, 64, 16, 16), patch_size=16, default_size=48)
    assert backbone.depth is None
    with pytest.raises(BackboneError, match=r"Conv2d is a module.*by its timm name"):
        backbone.forward_intermediates(picture(), [0])


def test_images_of_wrong_size_or_shape_are_refused(tiny: Backbone) -> None:
    with pytest.raises(SizeError, match="Nearest: 48 or 64"):
        tiny.forward_intermediates(picture(50, 80), [0])
    with pytest.raises(BackboneError, match=r"expected images of shape \(B, 3, H, W\)"):
        tiny.forward_intermediates(picture()[0], [0])


def test_denoised_vit_gives_clean_features_and_raw_layers(tiny: Backbone) -> None:
    torch.manual_seed(0)
    extractor = DenoisedViT(tiny, Denoiser(64, (3, 4)).eval(), positions=0.5)
    found, raw = (model.forward_intermediates(picture(), [4, 5]) for model in (extractor, tiny))
    assert torch.equal(found.features, extractor(picture()))
    assert not torch.allclose(found.features, raw.features, atol=0.1)
    assert torch.equal(found.prefix, raw.prefix)
    assert all(torch.equal(*pair) for pair in zip(found.layers, raw.layers, strict=True))
    assert all(torch.equal(*pair) for pair in zip(found.layer_prefixes, raw.layer_prefixes, strict=True))


def test_denoised_vit_needs_one_forward_pass() -> None:
    backbone = load()
    passes: list[int] = []
    timm_model(backbone).patch_embed.register_forward_hook(lambda *_: passes.append(1))
    DenoisedViT(backbone, Denoiser(64, (3, 4))).forward_intermediates(picture(), [0, 3, -1])
    assert len(passes) == 1
