"""Backbones from modules and functions, and the outputs that these may return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from denoising_vit import Backbone, BackboneError, SizeError, denoise_image, load_backbone

PATCH, WIDTH = 14, 5
SHOWN = 56  # default_size: a grid of 4 x 4


class Patches(nn.Module):
    """Embeds patches, and returns them in the given form."""

    def __init__(self, form: str, *, prefix: int = 0, width: int = WIDTH, patch: int = PATCH) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.form, self.prefix = form, prefix

    def grid(self, image: Tensor) -> Tensor:
        return self.embed(image).permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)

    def forward(self, image: Tensor) -> Any:
        grid = self.grid(image)
        tokens = grid.flatten(1, 2)  # (B, h, w, C) -> (B, h w, C)
        extra = torch.arange(self.prefix).to(tokens)[None, :, None].expand(len(tokens), -1, tokens.shape[-1])
        all_tokens = torch.cat([extra, tokens], dim=1)
        match self.form:
            case "channels_last":
                return grid
            case "channels_first":
                return grid.permute(0, 3, 1, 2)
            case "tokens":
                return all_tokens
            case "facebook dict":
                return {"x_norm_clstoken": tokens[:, 0], "x_norm_patchtokens": tokens, "x_prenorm": None}
            case "transformers dict":
                return {"last_hidden_state": all_tokens, "pooler_output": tokens[:, 0]}
            case "transformers object":
                return Output(all_tokens)
            case "tuple":
                return all_tokens, tokens[:, 0]
            case "list":
                return [grid.permute(0, 3, 1, 2)]
        raise AssertionError(self.form)


class Output:
    def __init__(self, tokens: Tensor) -> None:
        self.last_hidden_state = tokens


def load(model: Callable[[Tensor], Any], **options: Any) -> Backbone:
    return load_backbone(model, **{"patch_size": PATCH, "default_size": SHOWN, **options})


def picture(height: int = 28, width: int = 42, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))


@pytest.mark.parametrize(
    ("form", "prefix"),
    [
        ("channels_last", 0),
        ("channels_first", 0),
        ("tokens", 0),
        ("tokens", 1),
        ("tokens", 5),
        ("facebook dict", 0),
        ("transformers dict", 1),
        ("transformers object", 1),
        ("transformers object", 5),
        ("tuple", 1),
        ("list", 0),
    ],
)
def test_every_output_form_of_a_module_gives_the_same_grid(form: str, prefix: int) -> None:
    module = Patches(form, prefix=prefix)
    backbone = load(module)
    features, tokens = backbone.forward_with_prefix(picture())
    assert features.shape == (2, 2, 3, WIDTH)
    assert torch.equal(features, module.grid(picture()))
    assert tokens.shape == (2, prefix, WIDTH)
    assert torch.equal(tokens[0, :, 0], torch.arange(prefix).float())
    assert (backbone.embed_dim, backbone.patch_size, backbone.stride, backbone.default_size) == (WIDTH, 14, 14, SHOWN)
    assert backbone.name == "Patches"


def test_function_works_like_a_module() -> None:
    module = Patches("channels_first")

    def my_features(image: Tensor) -> Tensor:
        return module(image)

    backbone = load(my_features)
    assert backbone.name == "my_features"
    assert torch.equal(backbone(picture()), module.grid(picture()))
    assert (backbone.device, backbone.dtype) == (torch.device("cpu"), torch.float32)


def test_ambiguous_grid_needs_a_layout() -> None:
    for form in ("channels_last", "channels_first"):
        module = Patches(form, width=4)  # (1, 4, 4, 4) at 56 x 56
        with pytest.raises(BackboneError, match=r"\(1, 4, 4, 4\).*layout='channels_last' or layout='channels_first'"):
            load(module)
        backbone = load(module, layout=form)
        assert torch.equal(backbone(picture(56, 56)), module.grid(picture(56, 56)))


def test_unknown_layout_is_rejected() -> None:
    with pytest.raises(BackboneError, match="layout"):
        load(Patches("tokens"), layout="nchw")


@pytest.mark.parametrize("form", ["channels_last", "channels_first", "tokens", "facebook dict"])
@pytest.mark.parametrize("patch", [7, 28])
def test_wrong_patch_size_is_rejected(form: str, patch: int) -> None:
    with pytest.raises(BackboneError, match=r"Patches returned .*Check patch size and stride"):
        load(Patches(form), patch_size=patch)


def test_patch_size_slightly_too_large_is_not_read_as_prefix_tokens() -> None:
    with pytest.raises(BackboneError, match="patch size"):
        load(Patches("tokens", prefix=1), patch_size=16, default_size=512)


@pytest.mark.parametrize("output", [None, [], {}, {"features": torch.ones(1)}, 3.0, "text"])
def test_output_without_a_feature_tensor_is_rejected(output: Any) -> None:
    def odd(image: Tensor) -> Any:
        return output

    with pytest.raises(BackboneError, match=f"odd returned {type(output).__name__}; expected a tensor"):
        load(odd)


def test_pooled_features_are_rejected() -> None:
    with pytest.raises(BackboneError, match=r"returned \(1, 3\); expected \(B, 4, 4, C\)"):
        load(lambda image: image.mean(dim=(2, 3)))


def test_output_with_fewer_images_than_the_input_is_rejected() -> None:
    module = Patches("tokens")
    with pytest.raises(BackboneError, match="for 2 images"):
        load(lambda image: module(image[:1]))(picture())


def test_module_without_a_patch_size_is_rejected() -> None:
    with pytest.raises(BackboneError, match="needs a patch size"):
        load_backbone(Patches("tokens"))


@pytest.mark.parametrize("patch", [0, -14])
def test_patch_size_below_one_is_rejected(patch: int) -> None:
    with pytest.raises(BackboneError, match="patch"):
        load_backbone(Patches("tokens"), patch_size=patch)


@pytest.mark.parametrize("option", [{"weights": "random"}, {"layer": 3}, {"norm": False}])
def test_options_for_timm_names_are_rejected_for_a_module(option: dict[str, Any]) -> None:
    with pytest.raises(BackboneError, match=next(iter(option))):
        load(Patches("tokens"), **option)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [(56, 56), (57, 56), (62, 56), (64, 70), (69, 70), (517, 518), (519, 518), (1, 14), (None, 518)],
)
def test_default_size_is_rounded_to_the_nearest_valid_size(given: int | None, nearest: int) -> None:
    backbone = load(Patches("channels_last"), default_size=given, layout="channels_last")
    assert backbone.default_size == nearest
    assert backbone.grid_size(nearest, nearest) == (nearest // 14, nearest // 14)


def test_overlapping_patches_of_a_module() -> None:
    convolution = nn.Conv2d(3, WIDTH, 14, 7)
    backbone = load(convolution, stride=7)
    assert backbone(picture(35, 49)).shape == (2, 4, 6, WIDTH)
    with pytest.raises(SizeError, match="Nearest: 56 or 63"):
        backbone(picture(60, 56))


def test_given_normalisation_is_kept() -> None:
    backbone = load(Patches("tokens"), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_module_keeps_its_dtype_and_device(dtype: torch.dtype) -> None:
    module = Patches("tokens").to(dtype)
    backbone = load(module)
    assert (backbone.dtype, backbone.device) == (dtype, torch.device("cpu"))
    assert module.embed.weight.dtype == dtype
    assert backbone(picture()).dtype == torch.float32


def test_module_computes_in_the_given_dtype() -> None:
    backbone = load(Patches("tokens"), dtype="bfloat16")
    assert backbone.dtype == torch.bfloat16
    assert backbone(picture()).dtype == torch.float32


def test_a_module_in_training_mode_gives_the_same_features_twice() -> None:
    backbone = load(nn.Sequential(Patches("tokens"), nn.Dropout(0.5)).train())
    assert torch.equal(backbone(picture()), backbone(picture()))


def test_loading_does_not_change_the_running_statistics_of_a_module() -> None:
    norm = nn.BatchNorm2d(WIDTH)
    load(nn.Sequential(Patches("channels_first"), norm).train())
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 0


def test_parameters_of_a_module_are_frozen() -> None:
    assert not any(parameter.requires_grad for parameter in load(Patches("tokens")).parameters())


def test_gradients_reach_the_image_through_a_module() -> None:
    image = picture().requires_grad_()
    load(Patches("transformers object", prefix=1))(image).sum().backward()
    assert image.grad is not None and (image.grad != 0).any(dim=1).all()


class CachesPositions(Patches):
    """Caches a tensor that depends only on the grid, like many implementations of rotary embeddings."""

    scale: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:
        grid = self.grid(image)
        if self.scale is None or len(self.scale) != grid.shape[1]:
            self.scale = torch.linspace(1, 2, grid.shape[1])[:, None, None]
        return grid * self.scale


def test_gradients_reach_the_image_through_a_module_with_a_cache() -> None:
    backbone = load(CachesPositions("channels_last"))
    image = picture(SHOWN, SHOWN).requires_grad_()
    backbone(image).sum().backward()
    assert image.grad is not None


def test_function_gets_images_in_the_given_dtype() -> None:
    seen: list[torch.dtype] = []

    def grid(image: Tensor) -> Tensor:
        seen.append(image.dtype)
        return image[:, :, ::14, ::14].permute(0, 2, 3, 1)

    backbone = load_backbone(grid, patch_size=14, dtype="bfloat16", device="cpu", default_size=56)
    assert backbone(torch.zeros(1, 3, 28, 28)).dtype == torch.float32
    assert backbone.dtype == seen[-1] == torch.bfloat16


# --- images that are not normalised ---


@pytest.mark.parametrize("mean", [(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)])
def test_pixels_from_0_to_255_are_rejected_as_normalised_images(mean: tuple[float, ...]) -> None:
    backbone = load(Patches("channels_last"), mean=mean, std=(0.225, 0.225, 0.225))
    pixels = torch.rand(1, 3, SHOWN, SHOWN) * 255
    with pytest.raises(
        BackboneError, match=r"expected normalised images, about -2.* got values from .* scale pixels to 0"
    ):
        backbone(pixels)
    with pytest.raises(BackboneError, match="expected normalised images"):
        denoise_image(backbone, pixels, views=8)
    normalised = (pixels / 255 - torch.tensor(mean)[:, None, None]) / 0.225
    assert backbone(normalised).shape == (1, 4, 4, WIDTH)
    assert backbone(normalised + torch.randn_like(normalised)).isfinite().all()


def test_module_that_expects_pixels_from_0_to_255_gets_them() -> None:
    backbone = load(Patches("channels_last"), mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    assert backbone(torch.full((1, 3, SHOWN, SHOWN), 255.0)).shape == (1, 4, 4, WIDTH)
