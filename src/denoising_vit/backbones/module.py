"""Backbones from any module or function that maps images to a grid or to tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from denoising_vit.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone
from denoising_vit.errors import BackboneError
from denoising_vit.views.patch_grid import nearest_sizes

Layout = Literal["auto", "channels_last", "channels_first", "tokens"]

#: Maximum number of prefix tokens (class token and registers); more mean a wrong patch size.
_MOST_PREFIX_TOKENS = 32


class ModuleBackbone(Backbone):
    """A user's module or function as a backbone. A module should be in evaluation mode.

    Args:
        model: maps normalised images (B, 3, H, W) to (B, h, w, C), (B, C, h, w), or tokens (B, prefix + h w, C); or
            returns these as ``last_hidden_state``, under ``x_norm_patchtokens``, or first in a tuple or list.
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels; defaults to the patch size.
        mean: mean of the normalisation; defaults to ImageNet's.
        std: standard deviation of the normalisation; defaults to ImageNet's.
        default_size: side of the images; defaults to the largest multiple of the patch size up to 518.
        layout: output layout, if its shape is ambiguous.
        name: name for messages and records; defaults to the class or function name.
        device: device of a function's images; for a module, that of its parameters.
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
        self.layout: Layout = layout
        # A function's device and dtype are unknown; this tensor moves and converts with the backbone.
        self.register_buffer("_place", torch.zeros((), device=device), persistent=False)
        self.model = model  # registers a module, so that its device and dtype are known
        self.prefix_tokens: int | None = None
        with torch.no_grad():
            features, prefix = self.forward_with_prefix(torch.zeros(1, 3, self.default_size, self.default_size))
            self.embed_dim, self.prefix_tokens = features.shape[-1], prefix.shape[1]
            if self.prefix_tokens:
                self._probe_half()

    def _probe_half(self) -> None:
        """Check that the number of prefix tokens is the same at half the size; a wrong patch size changes it."""
        side = nearest_sizes(self.default_size // 2, self.patch_size, self.stride)[0]
        try:
            self.forward(torch.zeros(1, 3, side, side))
        except BackboneError:
            raise
        except Exception:  # the model may support one size only and raise anything
            return

    def _tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = tensor_in(self.model(image), self.name)
        h, w = self.grid_size(*image.shape[2:])
        tokens = as_tokens(found, self.layout, (h, w), self.name)
        prefix = tokens.shape[1] - h * w
        expected = range(_MOST_PREFIX_TOKENS + 1) if self.prefix_tokens is None else (self.prefix_tokens,)
        if prefix not in expected:  # a wrong patch size gives far too many or too few
            return tokens, tokens[:, :0]  # rejected by the caller with a message
        return tokens[:, prefix:], tokens[:, :prefix]


def as_tokens(output: Tensor, layout: Layout, grid: tuple[int, int], name: str) -> Tensor:
    """(B, h, w, C), (B, C, h, w) or tokens -> tokens (B, prefix + h w, C)."""
    match layout if layout != "auto" else layout_of(output, *grid, name):
        case "channels_last":
            return output.flatten(1, 2)  # (B, h, w, C) -> (B, h w, C)
        case "channels_first":
            return output.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h w, C)
        case _:
            return output


def as_output(tokens: Tensor, layout: Layout, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, prefix + h w, C) in a layout; the inverse of :func:`as_tokens`."""
    if layout == "tokens":
        return tokens
    features = tokens.unflatten(1, grid)  # (B, h w, C) -> (B, h, w, C)
    return features if layout == "channels_last" else features.permute(0, 3, 1, 2)


def tensor_in(output: Any, name: str) -> Tensor:
    """The features in a model's output.

    Raises:
        BackboneError: if there is no tensor.
    """
    key = _key(output)
    found = getattr(output, "last_hidden_state", output) if key is None else output[key]
    if not isinstance(found, Tensor):
        raise BackboneError(f"{name} returned {type(found).__name__}; expected a tensor of features")
    return found


def with_tensor(output: Any, features: Tensor) -> Any:
    """A model's output, with other features at the place where :func:`tensor_in` finds them."""
    key = _key(output)
    if key is None:
        if not hasattr(output, "last_hidden_state"):
            return features
        changed = copy.copy(output)
        changed.last_hidden_state = features
        return changed
    if isinstance(output, tuple | list):
        changed = (features, *output[1:])
        if isinstance(output, list):
            return list(changed)
        return type(output)(*changed) if hasattr(output, "_fields") else changed
    changed = copy.copy(output)
    changed[key] = features
    return changed


def _key(output: Any) -> str | int | None:
    """Key or index of the features in a model's output; None if there is none."""
    if isinstance(output, dict):
        return next((key for key in ("x_norm_patchtokens", "last_hidden_state") if key in output), None)
    return 0 if isinstance(output, tuple | list) and output else None


def layout_of(output: Tensor, h: int, w: int, name: str) -> Layout:
    """Layout of an output, from its shape.

    Raises:
        BackboneError: if the shape matches no layout, or two.
    """
    if output.ndim == 3:
        return "tokens"
    last = output.ndim == 4 and tuple(output.shape[1:3]) == (h, w)
    first = output.ndim == 4 and tuple(output.shape[2:]) == (h, w)
    if last and first:
        raise BackboneError(
            f"{name} returned {tuple(output.shape)}, which may be (B, h, w, C) or (B, C, h, w); specify "
            "layout='channels_last' or layout='channels_first'"
        )
    if not last and not first:
        raise BackboneError(
            f"{name} returned {tuple(output.shape)}; expected (B, {h}, {w}, C), (B, C, {h}, {w}) or tokens "
            f"(B, prefix + {h * w}, C). Check patch size and stride"
        )
    return "channels_last" if last else "channels_first"
