"""Shared by the tests of exports: tiny timm models, whose weights all have an effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.layers.mlp import SwiGLUPacked
from torch import Tensor

from denoising_vit import Artifact, Backbone, Denoiser, load_backbone
from denoising_vit.backbones.recorded import describe
from denoising_vit.backbones.timm_vit import TimmBackbone, build_timm_model

MODEL = "vit_tiny_patch16_224"
PATCH, WIDTH = 16, 192


def backbone(name: str = MODEL, **options: Any) -> Backbone:
    values: dict[str, Any] = {"weights": "random", "dtype": "float32", "device": "cpu"}
    return load_backbone(name, **(values | options))


def shallow(name: str = MODEL, *, dtype: torch.dtype = torch.float32, **options: Any) -> Backbone:
    """The same with two blocks, whose graphs are made in a sixth of the time; timm cannot build it by its name."""
    values: dict[str, Any] = {"stride": None, "layer": -1, "norm": True, "weights": "random"}
    model = build_timm_model(name, pretrained=False, depth=2)
    return TimmBackbone(model, name=name, **(values | options)).to(dtype)


def dinov2(*, registers: int = 0, swiglu: bool = False, **more: Any) -> Backbone:
    """A DINOv2 of two blocks and 32 channels, with a position embedding of 4 x 4."""
    values: dict[str, Any] = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
    values |= {"init_values": 1.0, "num_classes": 0, "dynamic_img_size": True}
    if registers:
        values |= {"reg_tokens": registers, "no_embed_class": True}
    if swiglu:
        # As the giant: two thirds of four times the width, rounded up to a multiple of 8, in two halves.
        values |= {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 5.5}
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(**(values | more)).eval().requires_grad_(False)
    for value in model.parameters():
        value.add_(torch.randn_like(value) * 0.1)
    assert model.pos_embed is not None
    model.pos_embed.mul_(10)  # so that positions have an effect
    name = "vit_small_patch14_dinov2"
    made = TimmBackbone(model, name=name, stride=None, layer=-1, norm=True, weights="random")
    made.default_size = 56
    return made


def artifact(of: Backbone, grid: tuple[int, int] = (5, 6)) -> Artifact:
    values = torch.randn(*grid, of.embed_dim, generator=torch.Generator().manual_seed(1))
    size = (grid[0] * of.patch_size, grid[1] * of.patch_size)
    return Artifact(values - values.mean((0, 1)), size, describe(of), {"photos": ["holiday.jpg"], "views": 16})


def denoiser(of: Backbone, grid: tuple[int, int] = (5, 6)) -> Denoiser:
    torch.manual_seed(2)
    made = Denoiser(of.embed_dim, grid, trained_for=describe(of)).eval().requires_grad_(False)
    for value in made.parameters():
        value.add_(torch.randn_like(value) * 0.1)
    return made


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def distilled(path: Path, head: str | None) -> Path:
    """Weights of the tiny model in float16, as stage 3 writes them; a record in the metadata if one is given."""
    torch.manual_seed(3)
    state = {key: value.half() for key, value in timm.create_model(MODEL, num_classes=0).state_dict().items()}
    save_file(state, path, metadata={"denoising_vit": head} if head else None)
    return path
