"""An extractor as a module that can be traced for any batch size, height and width.

Position embeddings and G are resampled in the graph. Bicubic resampling is linear and separable, and its weights depend
only on the two sizes, so a graph can compute them from the image's shape with operations that every runtime supports;
most do not support ``interpolate`` with ``antialias``. Results equal torch's up to rounding.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.huggingface import HuggingFaceBackbone
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.views.patch_grid import patch_count
from denoising_vit.views.sampling import sinusoidal_positions

#: timm's layout of DINOv3's rotary embedding: rows before columns, each axis divided by its own length.
PLAIN_ROPE = ("ij", "separate")

#: Raw or clean features.
Extractor = Backbone | DenoisedViT

_PATCHING = threading.Lock()


class TraceableExtractor(nn.Module):
    """The computation of an exported graph: (B, 3, H, W) to features (B, h, w, C), and optionally prefix tokens.

    It uses a float32 copy of the extractor on the CPU. With ``pixels``, it takes images in [0, 1] and normalises them;
    with ``prefix``, it also outputs prefix tokens (B, P, C).
    """

    def __init__(self, extractor: Extractor, *, pixels: bool = False, prefix: bool = False) -> None:
        super().__init__()
        self._original = (extractor,)  # a tuple, so that it is not a submodule
        whole = _float_copy(extractor)
        clean = whole if isinstance(whole, DenoisedViT) else None
        self.backbone = whole if isinstance(whole, Backbone) else whole.backbone
        self.denoiser = clean and clean.denoiser
        self.subspace = clean and clean.subspace
        self.positions = clean.positions if clean else 0.0
        self.artifact: Tensor | None
        self.register_buffer("artifact", clean.artifact.values.float() if clean and clean.artifact else None)
        self.prefix = prefix
        self.mean: Tensor | None
        self.std: Tensor | None
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(3, 1, 1) if pixels else None)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(3, 1, 1) if pixels else None)
        _resample_in_graph(self.backbone, self.denoiser)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Features, and prefix tokens if requested."""
        tokens, prefix = self.backbone._tokens(self._normalised(image))
        patch, stride = self.backbone.patch_size, self.backbone.stride
        # Backbone.grid_size checks the size, which a graph cannot.
        h, w = (patch_count(side, patch, stride) for side in image.shape[2:])
        grid = h, w
        features = tokens.unflatten(1, grid)  # (B, h w, C) -> (B, h, w, C)
        if self.denoiser is not None:
            features = self.denoiser(features)
        if self.subspace is not None:
            features = self.subspace(features)
        if self.artifact is not None:
            artifact = resample(self.artifact, grid)
            features = features - (artifact - artifact.mean((0, 1)))
        if self.positions:
            places = sinusoidal_positions(grid, self.backbone.embed_dim, step=stride / patch)
            features = features + self.positions * places
        return (features, prefix) if self.prefix else features

    def _normalised(self, image: Tensor) -> Tensor:
        return image if self.mean is None or self.std is None else (image - self.mean) / self.std

    def reference(self) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """The float32 extractor itself on the CPU, with the same input and outputs."""
        plain = _float_copy(self._original[0])

        @torch.no_grad()
        def run(image: Tensor) -> tuple[Tensor, Tensor | None]:
            features, prefix = plain.forward_with_prefix(self._normalised(image))
            return features, prefix if self.prefix else None

        return run


def _float_copy(extractor: Extractor) -> Extractor:
    return copy.deepcopy(extractor).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)


def _resample_in_graph(backbone: Backbone, denoiser: Any) -> None:
    """Replace the resampling of positions, which branches on the size, in the copies of the models."""
    if denoiser is not None:
        own, grid = denoiser.pos_embed, denoiser.grid
        denoiser.position = lambda h, w: resample_positions(own, (h, w), old=grid, prefix=0)
    rope: Any = getattr(getattr(backbone, "model", None), "rope", None)
    if type(rope).__name__ == "RotaryEmbeddingDinoV3" and (rope.grid_indexing, rope.normalize_coords) == PLAIN_ROPE:
        rope._create_embed = lambda shape, no_aug=False: _rotary(rope, shape)  # timm's converts the shape to numbers
    embeddings: Any = getattr(backbone.model, "embeddings", None) if isinstance(backbone, HuggingFaceBackbone) else None
    if embeddings is None or not hasattr(embeddings, "interpolate_pos_encoding"):
        return
    kept = backbone.family.class_tokens if isinstance(backbone, HuggingFaceBackbone) else 0
    antialias = "registers" in type(embeddings).__name__.lower()  # other families of transformers do not

    def interpolated(_tokens: Tensor, height: int, width: int) -> Tensor:
        table = getattr(embeddings, "position_embeddings", None)
        positions = embeddings.position_embedding.weight[None] if table is None else table
        size = height // backbone.patch_size, width // backbone.patch_size
        return resample_positions(positions, size, prefix=kept, antialias=antialias)

    embeddings.interpolate_pos_encoding = interpolated


def _rotary(rope: Any, shape: Sequence[int]) -> Tensor:
    """DINOv3's rotary embedding as in timm, (h w, 2 D), for a shape that may be symbolic."""
    centres = [
        2 * ((torch.arange(side, dtype=torch.float32) + 0.5 + rope.grid_offset) / torch.ones(()).mul(side)) - 1
        for side in shape
    ]
    places = torch.stack(torch.meshgrid(centres, indexing="ij"), dim=-1).flatten(0, 1)  # (h, w, 2) -> (h w, 2)
    return torch.cat(rope._get_pos_embed_from_coords(places), dim=-1)


def resample(grid: Tensor, size: tuple[int, int], *, antialias: bool = True) -> Tensor:
    """A grid (h, w, C) at another size, as ``interpolate(mode="bicubic", align_corners=False)``; exact at its size."""
    down, across = (
        bicubic_matrix(int(grid.shape[axis]), size[axis], antialias=antialias, like=grid) for axis in range(2)
    )
    rows = torch.einsum("ip,pqc->iqc", down, grid)  # (h, w, C) -> (new h, w, C)
    return torch.einsum("jq,iqc->ijc", across, rows)  # -> (new h, new w, C)


def bicubic_matrix(old: int, new: int, *, antialias: bool, like: Tensor) -> Tensor:
    """Weights (new, old) of bicubic resampling along one axis, as in torch; ``new`` may be symbolic.

    With antialiasing, the kernel (Keys, a = -1/2) widens with the reduction, and is truncated at the border and
    normalised. Without it, a = -3/4 and the border is repeated.
    """
    places = torch.arange(new, dtype=torch.float32, device=like.device) + 0.5
    scale = old / torch.full((), 1.0, device=like.device).mul(new)  # a tensor: a number would be fixed in the graph
    centres = (places * scale)[:, None]  # (new, 1), in cells of the old grid
    if antialias:
        cells = torch.arange(old, dtype=torch.float32, device=like.device) + 0.5
        weights = _keys((cells - centres) / scale.clamp(min=1), -0.5)
        return weights / weights.sum(1, keepdim=True)
    # Two cells beyond each border repeat the border cell.
    cells = torch.arange(-2, old + 2, dtype=torch.float32, device=like.device) + 0.5
    weights = _keys(cells - centres, -0.75)  # (new, old + 4)
    first, last = weights[:, :3].sum(1, keepdim=True), weights[:, -3:].sum(1, keepdim=True)
    if old == 1:
        return weights.sum(1, keepdim=True)
    return torch.cat([first, weights[:, 3:-3], last], dim=1)


def _keys(distance: Tensor, a: float) -> Tensor:
    """The cubic convolution kernel, zero at distances of 2 or more."""
    distance = distance.abs()
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))


def resample_positions(
    positions: Tensor, size: tuple[int, int], *, old: Sequence[int] | None = None, prefix: int, antialias: bool = True
) -> Tensor:
    """A position embedding (1, prefix + h w, C) for another grid; entries of prefix tokens are kept."""
    kept, places = positions[:, :prefix], positions[:, prefix:]
    side = math.isqrt(places.shape[1])
    h, w = old or (side, side)
    grid = places[0].float().unflatten(0, (h, w))  # (1, h w, C) -> (h, w, C)
    made = resample(grid, size, antialias=antialias).flatten(0, 1)[None].to(places.dtype)  # -> (1, new h new w, C)
    return torch.cat([kept, made], dim=1) if prefix else made


@contextlib.contextmanager
def timm_resamples_in_graph() -> Iterator[None]:
    """Make timm's models resample their position embeddings by :func:`resample_positions` in a block."""
    from timm.models import eva, vision_transformer

    def ours(
        posemb: Tensor,
        new_size: Sequence[int],
        old_size: Sequence[int] | None = None,
        num_prefix_tokens: int = 1,
        **_: Any,
    ) -> Tensor:
        return resample_positions(posemb, (new_size[0], new_size[1]), old=old_size, prefix=num_prefix_tokens)

    modules: tuple[Any, ...] = (eva, vision_transformer)
    with _PATCHING:
        before = [module.resample_abs_pos_embed for module in modules]
        for module in modules:
            module.resample_abs_pos_embed = ours
        try:
            yield
        finally:
            for module, function in zip(modules, before, strict=True):
                module.resample_abs_pos_embed = function
