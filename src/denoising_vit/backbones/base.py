"""Backbone: maps normalised images to features on a patch grid."""

from __future__ import annotations

import contextlib
import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from denoising_vit.backbones.passes import BlockedAttention
from denoising_vit.backbones.recorded import Fingerprint, state_digest
from denoising_vit.errors import BackboneError
from denoising_vit.views.patch_grid import check_side, nearest_sizes, patch_count
from denoising_vit.views.rendering import per_channel


class Intermediates(NamedTuple):
    """Features of several layers from one forward pass; float32.

    Attributes:
        features: the extractor's output, (B, h, w, C).
        prefix: class token and registers of the same layer, (B, P, C).
        layers: raw features after each requested block, in the requested order, (B, h, w, C) each.
        layer_prefixes: prefix tokens of these blocks, (B, P, C) each.
    """

    features: Tensor
    prefix: Tensor
    layers: tuple[Tensor, ...]
    layer_prefixes: tuple[Tensor, ...]


def block_numbers(layers: Sequence[int], depth: int | None, name: str) -> tuple[int, ...]:
    """Block indices counted from 0, in the given order, from indices that may be negative from the end.

    Raises:
        BackboneError: if the number of blocks is unknown, or an index is out of range.
    """
    if depth is None:
        raise BackboneError(
            f"{name} is a module with unknown blocks, so its intermediate layers are not available. "
            'Load a model by its timm name, load_backbone("NAME", weights=FILE), or wrap a module that returns '
            "the layer"
        )
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise BackboneError(
            f"layers must be a list of block indices, got {layers!r}; the last four of {name} are "
            f"layers={list(range(depth))[-4:]}"
        )
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool) or not -depth <= layer < depth:
            raise BackboneError(f"{name} has {depth} blocks: layers must be {-depth} to {depth - 1}, got {layer!r}")
    return tuple(layer % depth for layer in layers)


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Minimum of black and maximum of white over channels, in normalised images.
_ENDS = ((min, 0.0), (max, 1.0))

#: Tensors, and how often each was written.
Versions = list[tuple[Tensor, int]]

#: Tolerance of values outside the range of photos, as a multiple of its width; interpolation and noise stay far below.
_MARGIN = 10.0


class Backbone(nn.Module, ABC):
    """A frozen ViT as an extractor: ``backbone(image)`` maps (B, 3, H, W) to features (B, h, w, C).

    Created by :func:`~denoising_vit.load_backbone`, which raises BackboneError for a patch size, stride or layer out of
    range.

    Attributes:
        name: name of the model.
        patch_size: side of a patch in pixels.
        stride: distance between neighbouring patches in pixels; below the patch size, patches overlap.
        embed_dim: C.
        mean: per-channel mean of the expected normalisation.
        std: per-channel standard deviation of the expected normalisation.
        default_size: default side of the square images in pixels.
        layer: index of the output block; None if unknown.
        norm: True if the model's final norm is applied.
        weights: origin of the weights, for records and messages.
        depth: number of blocks; None if unknown, as for a module.
    """

    def __init__(
        self,
        *,
        name: str,
        patch_size: int,
        stride: int,
        embed_dim: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        default_size: int,
        layer: int | None = None,
        norm: bool = True,
        weights: str = "as given",
        depth: int | None = None,
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise BackboneError(f"patch_size must be at least 1 pixel, got {patch_size}")
        if not 1 <= stride <= patch_size:
            raise BackboneError(f"stride must be 1 to the patch size ({patch_size}), got {stride}")
        if layer is not None and depth is not None and not -depth <= layer < depth:
            raise BackboneError(f"{name} has {depth} blocks: layer must be {-depth} to {depth - 1}, got {layer}")
        self.name = name
        self.patch_size = patch_size
        self.stride = stride
        self.embed_dim = embed_dim
        self.mean = mean
        self.std = std
        self.layer = layer if layer is None or depth is None else layer % depth
        self.norm = norm
        self.weights = weights
        self.depth = depth
        fitting = nearest_sizes(default_size, patch_size, stride)
        self.default_size = min(fitting, key=lambda side: abs(side - default_size))
        self.training = False
        self._fingerprint: Fingerprint | None = None
        self._fingerprinted: Versions | None = None  # its weights; None after they were moved, converted or copied
        self._digest: tuple[Versions, str] | None = None

    @abstractmethod
    def _tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, h w, C), row by row, and prefix tokens (B, P, C), for an image that fits the grid."""

    def _intermediate_tokens(self, image: Tensor, blocks: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """The result of :meth:`_tokens`, then the same tokens after each of these blocks."""
        raise NotImplementedError

    def at_layer(self, layer: int) -> Backbone:
        """The same weights with another layer as output; nothing is copied.

        Raises:
            BackboneError: if the blocks are unknown, as for a module, or the block does not exist.
        """
        (block,) = block_numbers((layer,), self.depth, self.name)
        other = copy.copy(self)
        other.layer, other._fingerprint, other._digest = block, None, self._digest
        return other

    def forward(self, image: Tensor) -> Tensor:
        """Features (B, h, w, C), float32, of normalised images (B, 3, H, W).

        Raises:
            SizeError: if H or W does not fit the patch grid.
            BackboneError: if the model does not return one token per patch.
        """
        return self.forward_with_prefix(image)[0]

    def forward_with_prefix(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, h, w, C) and prefix tokens, class token first and then registers (B, P, C), both float32."""
        self._check(image)
        with self._attention():
            tokens, prefix = self._tokens(image.to(self.device, self.dtype))
        return self._on_grid(tokens, image), prefix.float()

    def forward_intermediates(self, image: Tensor, layers: Sequence[int]) -> Intermediates:
        """Features, prefix tokens, and raw features after other blocks, from one forward pass; float32.

        The model's final norm is also applied to other blocks if ``norm`` is set, so that the entry for ``layer``
        equals the features.

        Args:
            image: normalised images (B, 3, H, W).
            layers: block indices, negative from the end; blocks after ``layer`` take additional time.

        Raises:
            BackboneError: if the blocks are unknown, as for a module, or a block does not exist.
            SizeError: if H or W does not fit the patch grid.
        """
        blocks = block_numbers(layers, self.depth, self.name)
        self._check(image)
        with self._attention():
            own, *others = self._intermediate_tokens(image.to(self.device, self.dtype), blocks)
        return Intermediates(
            features=self._on_grid(own[0], image),
            prefix=own[1].float(),
            layers=tuple(self._on_grid(tokens, image) for tokens, _ in others),
            layer_prefixes=tuple(prefix.float() for _, prefix in others),
        )

    def normalise(self, image: Tensor) -> Tensor:
        """Images (..., 3, H, W) in [0, 1], normalised."""
        mean, std = (per_channel(values, image.device) for values in (self.mean, self.std))
        return (image - mean) / std

    def _check(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] != 3:
            raise BackboneError(f"expected images of shape (B, 3, H, W), got {tuple(image.shape)}")
        self.grid_size(*image.shape[2:])  # check before the model runs
        if image.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_values(image)  # on other devices, this would force a synchronisation

    def check_values(self, image: Tensor) -> None:
        """Reject images (..., 3, H, W) with values far outside those of normalised photos.

        Raises:
            BackboneError: with the values and the expected range.
        """
        if not image.numel():
            return
        least, most = (float(value) for value in image.detach().aminmax())
        low, high = (pick((end - m) / s for m, s in zip(self.mean, self.std, strict=True)) for pick, end in _ENDS)
        if least < low - _MARGIN * (high - low) or most > high + _MARGIN * (high - low):
            raise BackboneError(
                f"expected normalised images, about {low:.1f} to {high:.1f} for {self.name}, got values from {least:g} "
                f"to {most:g}; scale pixels to 0 to 1, then subtract the mean {self.mean} and divide by the "
                f"standard deviation {self.std}"
            )

    def _on_grid(self, tokens: Tensor, image: Tensor) -> Tensor:
        """(B, h w, C) -> (B, h, w, C), float32, on the grid of the image."""
        h, w = self.grid_size(*image.shape[2:])
        if tuple(tokens.shape[:2]) != (len(image), h * w):
            raise BackboneError(
                f"{self.name} returned tokens of shape {tuple(tokens.shape)} for {len(image)} images of "
                f"{image.shape[2]} x {image.shape[3]}; expected {h} x {w} = {h * w} patch tokens each "
                f"(patch {self.patch_size}, stride {self.stride}). Check patch size and stride"
            )
        return tokens.float().unflatten(1, (h, w))

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the patch grid of an image of H x W pixels.

        Raises:
            SizeError: if a side does not fit; the message names the nearest valid sides.
        """
        for side in (height, width):
            check_side(side, self.patch_size, self.stride)
        return patch_count(height, self.patch_size, self.stride), patch_count(width, self.patch_size, self.stride)

    @property
    def device(self) -> torch.device:
        """Device of the weights; images are moved to it."""
        return next((tensor.device for tensor in self._weights()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights; features are float32 in any case."""
        return next((tensor.dtype for tensor in self._weights() if tensor.is_floating_point()), torch.float32)

    def _weights(self) -> Iterator[Tensor]:
        """Parameters and buffers; an iterator, because every forward pass needs only the first one."""
        return itertools.chain(self.parameters(), self.buffers())

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of weights, layer, norm and stride, independent of the weights' file."""
        now, before = self._versions(), self._fingerprinted
        if self._fingerprint is None or (before is not None and not _unchanged(before, now)):
            self._fingerprint = Fingerprint.of(self, self._fingerprint_size())
        self._fingerprinted = now
        return self._fingerprint

    @property
    def digest(self) -> str | None:
        """SHA-256 of the weights in their precision; None without weights, as for a function.

        It distinguishes successive checkpoints, which have nearly the same fingerprint.
        """
        if not self.state_dict():
            return None
        now, known = self._versions(), self._digest
        if known is None or not _unchanged(known[0], now):
            self._digest = known = now, state_digest(self)
        return known[1]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move or convert the weights, which changes the digest but not the fingerprint."""
        self._digest = self._fingerprinted = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """State for copies, whose tensors have versions of their own."""
        return self.__dict__ | {"_digest": None, "_fingerprinted": None}

    def _versions(self) -> Versions:
        return [(value, 0 if value.is_inference() else value._version) for value in self._weights()]

    def _fingerprint_size(self) -> int:
        return self.default_size

    def _attention(self) -> contextlib.AbstractContextManager[object]:
        """Blocked attention on a CPU in bfloat16, where it is about twice as fast as torch's kernel."""
        fast = self.device.type == "cpu" and self.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
        return BlockedAttention() if fast else contextlib.nullcontext()

    def extra_repr(self) -> str:
        """One line for ``repr``."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name}, patch {self.patch_size}, stride {self.stride}, C {self.embed_dim}, {dtype}, {self.weights}"
        )


def _unchanged(before: Versions, now: Versions) -> bool:
    """True if these are the same tensors in the same versions; writing to a tensor increments its version."""
    pairs = zip(before, now, strict=False)
    return len(before) == len(now) and all(old is new and was == version for (old, was), (new, version) in pairs)
