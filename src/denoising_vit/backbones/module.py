"""Backbones from anything that maps images to a grid or to tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from denoising_vit.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from denoising_vit.errors import BackboneError
from denoising_vit.views.patch_grid import nearest_sizes

Layout = Literal["auto", "channels_last", "channels_first", "tokens"]

#: Class token and registers; more than this many are taken for a wrong patch size.
_MOST_PREFIX_TOKENS = 32


class ModuleBackbone(Backbone):
    """A user's own module or function as a backbone.

    Args:
        model: maps normalised images (B, 3, H, W) to (B, h, w, C), (B, C, h, w), or tokens (B, prefix + h w, C); or
            returns these as ``last_hidden_state``, under ``x_norm_patchtokens``, or first in a tuple or list.
        patch_size: side of a patch in pixels.
        stride: distance between patches; the patch size by default.
        mean: normalisation that images get; ImageNet's by default.
        std: likewise.
        default_size: side of the images it is shown; the multiple of the patch size up to 518 by default.
        layout: what the output is, where its shape does not tell.
        name: what to call it; its class or function name by default.
        device: where a function wants its images; a module's parameters tell.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        *,
        patch_size: int,
        stride: int | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        default_size: int | None = None,
        layout: Layout = "auto",
        name: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        if layout not in get_args(Layout):
            raise BackboneError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
        super().__init__(
            name=name or getattr(model, "__name__", type(model).__name__),
            patch_size=patch_size,
            stride=patch_size if stride is None else stride,
            embed_dim=0,
            mean=mean,
            std=std,
            default_size=default_size or 518 // max(patch_size, 1) * patch_size,
        )
        self.layout = layout
        # What a function computes on and in cannot be read off it; this moves and converts with the backbone.
        self.register_buffer("_place", torch.zeros((), device=device), persistent=False)
        if isinstance(model, nn.Module):
            model.eval().requires_grad_(False)  # frozen, and before the probe: dropout and batch norm must not act
        self.model = model  # a module is registered by this, so that its device and dtype are seen
        self.prefix_tokens: int | None = None
        with torch.no_grad():
            features, prefix = self.forward_with_prefix(torch.zeros(1, 3, self.default_size, self.default_size))
            self.embed_dim, self.prefix_tokens = features.shape[-1], prefix.shape[1]
            if self.prefix_tokens:
                self._probe_half()

    def _probe_half(self) -> None:
        """Tokens beside those of patches are as many at any size; where the patch size is wrong they are not."""
        side = nearest_sizes(self.default_size // 2, self.patch_size, self.stride)[0]
        try:
            self.forward(torch.zeros(1, 3, side, side))
        except BackboneError:
            raise
        except Exception:  # a model of one size only, which raises whatever it likes
            return

    def _tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = _tensor_in(self.model(image), self.name)
        h, w = self.grid_size(*image.shape[2:])
        match self.layout if self.layout != "auto" else _layout(found, h, w, self.name):
            case "channels_last":
                tokens = found.flatten(1, 2)  # (B, h, w, C) -> (B, h w, C)
            case "channels_first":
                tokens = found.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h w, C)
            case _:
                tokens = found
        prefix = tokens.shape[1] - h * w
        expected = range(_MOST_PREFIX_TOKENS + 1) if self.prefix_tokens is None else (self.prefix_tokens,)
        if prefix not in expected:  # a wrong patch size leaves far too many, or too few
            return tokens, tokens[:, :0]  # refused by the caller, with what was expected
        return tokens[:, prefix:], tokens[:, :prefix]


def _tensor_in(output: Any, name: str) -> Tensor:
    if isinstance(output, dict):
        output = output.get("x_norm_patchtokens", output.get("last_hidden_state", output))
    output = getattr(output, "last_hidden_state", output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise BackboneError(f"{name} returned {type(output).__name__}; expected a tensor of features")
    return output


def _layout(output: Tensor, h: int, w: int, name: str) -> Layout:
    if output.ndim == 3:
        return "tokens"
    last = output.ndim == 4 and tuple(output.shape[1:3]) == (h, w)
    first = output.ndim == 4 and tuple(output.shape[2:]) == (h, w)
    if last and first:
        raise BackboneError(
            f"{name} returned {tuple(output.shape)}, which may be (B, h, w, C) or (B, C, h, w): say which with "
            "layout='channels_last' or layout='channels_first'"
        )
    if not last and not first:
        raise BackboneError(
            f"{name} returned {tuple(output.shape)}; expected (B, {h}, {w}, C), (B, C, {h}, {w}) or tokens "
            f"(B, prefix + {h * w}, C). Are patch size and stride right?"
        )
    return "channels_last" if last else "channels_first"
