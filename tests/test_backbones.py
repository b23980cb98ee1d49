"""Backbones from timm: grids, layers, strides, sizes, dtypes, and errors."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from timm.data.config import resolve_data_config
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from denoising_vit import SEEDS, Backbone, BackboneError, DenoisingVitError, SizeError, WeightsError, load_backbone
from denoising_vit.backbones.runtime import fast_dtype
from denoising_vit.backbones.timm_vit import TimmBackbone

TINY = "vit_tiny_patch16_224"
DINOV2 = "vit_small_patch14_dinov2.lvd142m"
REGISTERS = "vit_small_patch14_reg4_dinov2.lvd142m"

SEEDS_THAT_FIT_HERE = [name for name in SEEDS if "giant" not in name]
WIDTH = {"small": 384, "base": 768, "large": 1024, "huge": 1280}


def load(name: str, **options: Any) -> Backbone:
    return load_backbone(name, **{"weights": "random", "dtype": "float32", "device": "cpu", **options})


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def timm_model(backbone: Backbone) -> VisionTransformer:
    assert isinstance(backbone, TimmBackbone)
    return cast(VisionTransformer, backbone.model)


def patch_tokens(tokens: Tensor, grid: Sequence[int], prefix: int) -> Tensor:
    return tokens[:, prefix:].reshape(len(tokens), *grid, -1)


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return load(TINY)


@pytest.fixture(scope="module")
def dinov2() -> Backbone:
    return load(DINOV2)


@pytest.fixture(scope="module")
def dense() -> Backbone:
    """DINOv2 with patches that overlap by half."""
    return load(DINOV2, stride=7)


@pytest.fixture(scope="module")
def reference(tiny: Backbone) -> VisionTransformer:
    """The same weights in a model that timm built with its own defaults, for one fixed size."""
    model = timm.create_model(TINY, num_classes=0)
    model.load_state_dict(timm_model(tiny).state_dict())
    return cast(VisionTransformer, model.eval())


# The published models


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants instead of random weights, whose drawing takes most of the time of loading a large model."""

    def constant(tensor: Tensor, *_: object, **__: object) -> Tensor:
        return tensor.fill_(0.01)

    for draw in ("uniform_", "normal_", "erfinv_"):  # the last turns a uniform draw into a truncated normal one
        monkeypatch.setattr(torch.Tensor, draw, constant)


@pytest.mark.usefixtures("quick_start")
@pytest.mark.parametrize("name", SEEDS_THAT_FIT_HERE)
def test_seed_models_use_the_settings_of_their_timm_config(name: str) -> None:
    backbone = load(name)
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    expected = resolve_data_config(pretrained_cfg=config.to_dict())
    found = re.search(r"_patch(\d+)_", name)
    assert found is not None
    patch = int(found[1])
    size = {14: 518, 8: 512, 16: 512}[patch]

    assert (backbone.patch_size, backbone.stride, SEEDS[name].patch_size) == (patch, patch, patch)
    assert (backbone.default_size, SEEDS[name].size) == (size, size)
    assert (backbone.mean, backbone.std) == (tuple(expected["mean"]), tuple(expected["std"]))
    assert backbone.embed_dim == next(width for word, width in WIDTH.items() if word in name)
    assert backbone.name == name
    assert backbone.weights == "random"

    with torch.inference_mode():
        features, prefix = backbone.forward_with_prefix(picture(4 * patch, 5 * patch))
    assert features.shape == (1, 4, 5, backbone.embed_dim)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert prefix.shape == (1, 5 if "reg4" in name else 1, backbone.embed_dim)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_small_patch16_dinov3", 5),
        ("vit_base_patch16_siglip_224", 0),
        ("eva02_tiny_patch14_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
    ],
)
def test_other_timm_models_load_by_name(name: str, prefix: int) -> None:
    backbone = load(name)
    with torch.inference_mode():
        features, tokens = backbone.forward_with_prefix(picture(3 * backbone.patch_size, 5 * backbone.patch_size, 2))
    assert features.shape == (2, 3, 5, backbone.embed_dim)
    assert tokens.shape == (2, prefix, backbone.embed_dim)


def test_an_eva_model_without_class_token_has_no_prefix() -> None:
    """A small version of timm's gigantic Perception Encoders (vit_pe_spatial_gigantic_patch14_448)."""
    model = timm.create_model(
        "eva02_tiny_patch14_224", class_token=False, global_pool="avg", depth=2, num_classes=0, dynamic_img_size=True
    ).eval()
    assert isinstance(model, Eva) and model.num_prefix_tokens == 0
    backbone = TimmBackbone(model, name="eva", stride=None, layer=-1, norm=True, weights="random")
    features, prefix = backbone.forward_with_prefix(picture(42, 70))
    assert features.shape == (1, 3, 5, 192)
    assert prefix.shape == (1, 0, 192)


# Tokens and layers


@pytest.mark.parametrize(("row", "column"), [(0, 4), (2, 3), (3, 0)])
def test_the_token_of_a_changed_patch_changes_most(row: int, column: int) -> None:
    backbone = load("test_vit", layer=0, norm=False)
    plain = torch.zeros(1, 3, 64, 80)
    changed = plain.clone()
    changed[..., 16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)] = 1.0
    difference = (backbone(changed) - backbone(plain)).norm(dim=-1)[0]
    assert divmod(int(difference.argmax()), 5) == (row, column)


def test_features_by_default_are_the_normed_patch_tokens_of_timm(tiny: Backbone, reference: VisionTransformer) -> None:
    image = picture(224, 224)
    tokens = reference.forward_features(image)
    features, prefix = tiny.forward_with_prefix(image)
    torch.testing.assert_close(features, patch_tokens(tokens, (14, 14), 1))
    torch.testing.assert_close(prefix, tokens[:, :1])
    torch.testing.assert_close(tiny(image), features, rtol=0, atol=0)
    assert (tiny.layer, tiny.norm) == (11, True)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("layer", [0, 5, 11])
def test_a_layer_is_the_output_of_that_block_of_timm(layer: int, norm: bool, reference: VisionTransformer) -> None:
    backbone = load(TINY, layer=layer, norm=norm)
    timm_model(backbone).load_state_dict(reference.state_dict())
    image = picture(224, 224)
    intermediates = reference.forward_intermediates(image, indices=[layer], norm=norm, intermediates_only=True)
    assert isinstance(intermediates, list)
    torch.testing.assert_close(backbone(image), intermediates[0].permute(0, 2, 3, 1))  # (B, C, h, w) -> (B, h, w, C)


@pytest.mark.parametrize(("negative", "same"), [(-1, 11), (-7, 5), (-12, 0)])
def test_negative_layers_count_from_the_end(negative: int, same: int) -> None:
    image = picture(48, 80)
    first, second = load(TINY, layer=negative), load(TINY, layer=same)
    assert first.layer == second.layer == same
    assert torch.equal(first(image), second(image))


@pytest.mark.parametrize("layer", [12, -13, 100])
def test_error_for_a_missing_layer_names_the_range(layer: int) -> None:
    with pytest.raises(BackboneError, match=rf"12 blocks: layer must be -12 to 11, got {layer}"):
        load(TINY, layer=layer)


@pytest.mark.parametrize(("name", "count"), [(DINOV2, 1), (REGISTERS, 5)])
def test_prefix_tokens_precede_the_patch_tokens(name: str, count: int) -> None:
    backbone = load(name)
    image = picture(56, 70)
    tokens = timm_model(backbone).forward_features(image)
    features, prefix = backbone.forward_with_prefix(image)
    assert prefix.shape == (1, count, 384)
    torch.testing.assert_close(prefix, tokens[:, :count])
    torch.testing.assert_close(features, patch_tokens(tokens, (4, 5), count))


# Strides and sizes


def test_grids_of_plain_and_of_overlapping_patches(dinov2: Backbone, dense: Backbone) -> None:
    assert dinov2.grid_size(518, 518) == (37, 37)
    assert dinov2.grid_size(14, 1400) == (1, 100)
    assert dense.grid_size(518, 518) == (73, 73)
    assert dense.grid_size(56, 70) == (7, 9)
    assert dense.stride == 7
    assert dense.default_size == 518


@pytest.mark.parametrize(("height", "width", "grid"), [(56, 70, (7, 9)), (35, 49, (4, 6)), (14, 21, (1, 2))])
def test_overlapping_patches_accept_sides_of_patch_plus_strides(
    dense: Backbone, height: int, width: int, grid: tuple[int, int]
) -> None:
    assert dense.grid_size(height, width) == grid
    features, prefix = dense.forward_with_prefix(picture(height, width))
    assert features.shape == (1, *grid, 384)
    assert prefix.shape == (1, 1, 384)


def test_a_stride_of_the_patch_size_changes_nothing(dinov2: Backbone) -> None:
    image = picture(56, 70)
    assert torch.equal(load(DINOV2, stride=14)(image), dinov2(image))


def test_overlapping_patches_are_embedded_like_their_crops(dinov2: Backbone, dense: Backbone) -> None:
    image = picture(35, 49)
    embedded = timm_model(dense).patch_embed(image)
    for row, column in ((0, 0), (1, 4), (3, 5)):
        crop = image[..., 7 * row : 7 * row + 14, 7 * column : 7 * column + 14]
        torch.testing.assert_close(embedded[:, row, column], timm_model(dinov2).patch_embed(crop)[:, 0, 0])


def test_overlapping_patches_get_the_position_embedding_of_their_own_grid(dense: Backbone) -> None:
    image, model = picture(35, 49), timm_model(dense)
    assert model.pos_embed is not None and model.cls_token is not None
    patches = model.patch_embed(image).flatten(1, 2)  # (B, h, w, C) -> (B, h w, C)
    positions = resample_abs_pos_embed(model.pos_embed, [4, 6])
    tokens = torch.cat([model.cls_token, patches], dim=1) + positions
    expected = patch_tokens(model.norm(model.blocks(tokens)), (4, 6), 1)
    torch.testing.assert_close(dense(image), expected)


@pytest.mark.parametrize("stride", [0, -1, -14, 15, 100])
def test_a_stride_out_of_range_is_refused(stride: int) -> None:
    with pytest.raises(BackboneError, match=rf"stride must be 1 to the patch size \(14\), got {stride}"):
        load(DINOV2, stride=stride)


@pytest.mark.parametrize(
    ("height", "width", "wrong", "nearest"),
    [(57, 56, 57, "56 or 70"), (56, 69, 69, "56 or 70"), (13, 14, 13, "14"), (517, 518, 517, "504 or 518")],
)
def test_error_for_a_side_off_the_grid_names_the_nearest_sides(
    dinov2: Backbone, height: int, width: int, wrong: int, nearest: str
) -> None:
    message = rf"side of {wrong} pixels .* multiple of 14 .*Nearest: {nearest}$"
    with pytest.raises(SizeError, match=message):
        dinov2.grid_size(height, width)
    with pytest.raises(SizeError, match=message):
        dinov2(picture(height, width))


def test_side_between_two_strides_is_refused(dense: Backbone) -> None:
    with pytest.raises(SizeError, match=r"14 \+ k \* 7 pixels .*Nearest: 56 or 63$") as caught:
        dense(picture(60, 56))
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, DenoisingVitError)


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 4, 64, 64), (3, 64, 64), (1, 64, 64, 3)])
def test_anything_but_rgb_images_is_refused(tiny: Backbone, shape: tuple[int, ...]) -> None:
    with pytest.raises(BackboneError, match=re.escape(f"(B, 3, H, W), got {shape}")):
        tiny(torch.zeros(shape))


# Refused names and options


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "vit_relpos_small_patch16_224"])
def test_timm_model_other_than_a_plain_vit_is_refused(name: str) -> None:
    with pytest.raises(BackboneError, match=name):
        load(name)


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_small_r26_s32_224"])
def test_hybrid_of_resnet_and_vit_is_refused(name: str) -> None:
    """Its patch size counts pixels of a feature map, not of the image."""
    with pytest.raises(BackboneError, match=name):
        load(name)


@pytest.mark.parametrize("name", ["nonsense", "vit_small_patch15_dinov2", "facebook/dinov2-small", TINY + ".nonsense"])
def test_unknown_model_is_named_in_the_error(name: str) -> None:
    with pytest.raises(BackboneError, match=re.escape(name)):
        load(name)


def test_error_for_an_unknown_model_suggests_similar_names() -> None:
    with pytest.raises(BackboneError, match=r"similar: .*vit_small_patch14_dinov2"):
        load("vit_small_patch14_dino2")


@pytest.mark.parametrize("dtype", ["nonsense", "double", "", torch.int8])
def test_unsupported_dtype_is_refused(dtype: Any) -> None:
    with pytest.raises(BackboneError, match="dtype must be one of auto, float32, bfloat16, float16"):
        load("test_vit", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "cuda:99"])
def test_unavailable_device_is_refused(device: str) -> None:
    with pytest.raises(BackboneError, match=f"device '{device}' is not available"):
        load("test_vit", device=device)


@pytest.mark.parametrize(
    ("option", "value"),
    [("patch_size", 16), ("mean", (0, 0, 0)), ("std", (1, 1, 1)), ("default_size", 224), ("layout", "tokens")],
)
def test_options_for_modules_are_refused_for_a_timm_name(option: str, value: object) -> None:
    with pytest.raises(BackboneError, match=option):
        load("test_vit", **{option: value})


def test_error_for_unknown_weights_lists_the_choices() -> None:
    with pytest.raises(WeightsError, match=r"bundeld.*(auto|hub|bundled|random)"):
        load("test_vit", weights="bundeld")


# Dtypes, randomness, gradients


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [("auto", None), ("bfloat16", torch.bfloat16), ("float32", torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_features_are_float32_for_every_compute_dtype(dtype: Any, computed: torch.dtype | None) -> None:
    backbone = load("test_vit", dtype=dtype)
    expected = fast_dtype(torch.device("cpu")) if computed is None else computed
    assert backbone.dtype == expected
    assert all(parameter.dtype == expected for parameter in backbone.parameters())
    features, prefix = backbone.forward_with_prefix(picture(48, 80))
    assert (features.dtype, prefix.dtype) == (torch.float32, torch.float32)


def test_loading_does_not_change_the_global_random_state() -> None:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    expected = torch.rand(4), random.random(), np.random.rand()
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    load("test_vit")
    assert torch.equal(torch.rand(4), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_loading_does_not_change_the_random_state_of_the_gpu() -> None:
    torch.cuda.manual_seed_all(7)
    before = torch.cuda.get_rng_state()
    load("test_vit")
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_random_weights_are_the_same_each_time() -> None:
    torch.manual_seed(1)
    first = load("test_vit").state_dict()
    torch.manual_seed(2)
    second = load("test_vit").state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_gradients_reach_the_image_and_no_parameter(tiny: Backbone) -> None:
    image = picture(48, 80).requires_grad_()
    features = tiny(image)
    (features * picture(1, features.numel() // 3).reshape(features.shape)).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert (image.grad.abs().amax(dim=1) > 0).all()
    assert not any(parameter.requires_grad for parameter in tiny.parameters())
    assert all(parameter.grad is None for parameter in tiny.parameters())


def test_a_loaded_backbone_is_in_evaluation_mode(tiny: Backbone) -> None:
    """All modules: code that saves ``training``, evaluates, and restores it would otherwise switch dropout on."""
    assert not any(module.training for module in tiny.modules())


def test_gradients_in_bfloat16_with_many_tokens_are_those_of_float32() -> None:
    """256 patches: enough for fast attention to be used if no gradients are needed."""
    target = picture(256, 256).requires_grad_()
    gradients = []
    for dtype in ("float32", "bfloat16"):
        features = load("test_vit", dtype=dtype)(target)
        gradients.append(torch.autograd.grad(features[..., ::2].sum(), target)[0].flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_repr_names_model_grid_and_weights(tiny: Backbone) -> None:
    text = repr(tiny)
    assert all(part in text for part in (TINY, "patch 16", "stride 16", "C 192", "float32", "random"))
    assert math.prod(tiny.grid_size(32, 48)) == 6


def test_mean_pooling_model_gets_its_final_norm() -> None:
    """Its ``norm`` is empty; the norm after the pooling is applied to every token."""
    name = "eva02_tiny_patch14_224.mim_in22k"
    image = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    normed, plain = (
        load_backbone(name, weights="random", dtype="float32", device="cpu", norm=on) for on in (True, False)
    )
    with torch.no_grad():
        features = normed(image)
        assert torch.allclose(features.mean(-1), torch.zeros(1, 4, 4), atol=1e-5)
        assert torch.allclose(features.var(-1, unbiased=False), torch.ones(1, 4, 4), atol=1e-2)
        assert not torch.allclose(plain(image).var(-1, unbiased=False), torch.ones(1, 4, 4), atol=1e-2)
