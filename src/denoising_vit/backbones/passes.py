"""Forward passes: batches that fit into memory, and fast bfloat16 attention on CPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from denoising_vit.errors import BackboneError

if TYPE_CHECKING:
    from denoising_vit.backbones.base import Backbone

#: With fewer tokens, the fused kernel is as fast.
_LEAST_TOKENS = 256

#: Number of scores in memory at once, to fit the cache: one head of 1,370 tokens (3.8 MB), or several heads of fewer.
_MOST_SCORES = 1 << 21


class Passes:
    """Forward passes of one backbone, split to fit the memory of its device.

    Attributes:
        most: maximum batch size; None until a batch did not fit.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._largest = 0
        self.most: int | None = None

    @torch.no_grad()  # not inference mode: the caller may train on the results
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, h, w, C) float32 of normalised images (B, 3, H, W).

        Raises:
            BackboneError: if the device's memory is too small for a single image, or the model does not return a grid.
            SizeError: if H or W does not fit the patch grid.
        """
        self._largest = max(len(images), self._largest)
        while True:
            most = min(self.most or self._largest, self._largest)
            try:
                parts = [self._forward(part, most) for part in images.split(most)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except torch.OutOfMemoryError as error:
                if most == 1:
                    _, _, height, width = images.shape
                    raise BackboneError(
                        f"{self._backbone.name} on {self._backbone.device}: not enough memory for a single image of "
                        f"{height} x {width} pixels; use smaller views (--size), a smaller model, or another device"
                    ) from error
            # Outside the handler, because its traceback keeps the memory of the failed pass.
            self.most = most // 2
            if self._backbone.device.type == "cuda":
                torch.cuda.empty_cache()

    def _forward(self, images: Tensor, most: int) -> Tensor:
        """One pass; for a compiled backbone, a smaller last batch is padded to avoid a recompilation."""
        count = len(images)
        if self._backbone._compiled_call_impl is not None and count < most:
            images = torch.cat([images, images.new_zeros(most - count, *images.shape[1:])])
        return self._backbone(images)[:count]


def compiled(backbone: Backbone) -> Backbone:
    """The same backbone with its forward pass compiled, once per batch size."""
    _ = backbone.fingerprint  # computed now, because its image size would also be compiled
    backbone.compile(dynamic=False)
    return backbone


class BlockedAttention(TorchFunctionMode):
    """While active, replaces plain scaled dot product attention on CPU bfloat16 tensors, in any model.

    The scores of one head of 1,370 tokens (3.8 MB) stay in the cache, and products and softmax run at the full rate of
    the vendor's kernels; torch's fused CPU kernel reaches less than half of that in bfloat16. docs/decisions.md has the
    measured speed and accuracy. Attention that is masked, causal, grouped, cross, or needs gradients is left to torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._scratch: Tensor | None = None  # shared by all layers of a forward pass

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self._attend(*args, **kwargs or {}) if func is F.scaled_dot_product_attention else None
        return func(*args, **kwargs or {}) if found is None else found

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """Return the result, or None to leave it to torch; the signature is torch's."""
        plain = attn_mask is None and dropout_p == 0 and not is_causal and not enable_gqa
        if not plain or not _applies(query, key, value):
            return None
        needed = _scratch_shape(query)
        if self._scratch is None or self._scratch.shape != needed:
            self._scratch = query.new_empty(needed)
        return blocked_attention(query, key, value, scale=scale, scratch=self._scratch)


def blocked_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, scratch: Tensor | None = None
) -> Tensor:
    """``softmax(Q K^T scale) V`` for (B, heads, N, D) tensors; the result has the same shape.

    Scores are rounded to bfloat16 (the fused kernel keeps them in float32), so their magnitude matters: subtracting the
    mean key shifts all scores of a query by the same amount, which softmax ignores, and makes them smaller.
    """
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    key = _centred(key)
    images, heads, tokens, _ = query.shape
    scores, shares = (query.new_empty(_scratch_shape(query)) if scratch is None else scratch).unbind()
    # Heads are adjacent in memory, (B, N, heads, D), as the following projection needs them.
    result = query.new_empty(images, tokens, heads, value.shape[-1]).transpose(1, 2)
    for image in range(images):
        for first in range(0, heads, len(scores)):
            some = slice(first, min(first + len(scores), heads))
            part, share = scores[: some.stop - first], shares[: some.stop - first]
            torch.bmm(query[image, some], key[image, some].transpose(1, 2), out=part)
            torch.softmax(part, -1, out=share)
            result[image, some] = torch.bmm(share, value[image, some])
    return result


def _scratch_shape(query: Tensor) -> tuple[int, int, int, int]:
    """Shape of the buffer for scores and softmax of the heads that are computed at once."""
    _, heads, tokens, _ = query.shape
    return 2, min(max(_MOST_SCORES // tokens**2, 1), heads), tokens, tokens


def _centred(key: Tensor) -> Tensor:
    return key - key.mean(dim=-2, keepdim=True, dtype=torch.float32).to(key.dtype)


def _applies(query: Tensor, key: Tensor, value: Tensor) -> bool:
    here = all(tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 for tensor in (query, key, value))
    alike = query.ndim == 4 and query.shape == key.shape and query.shape[:3] == value.shape[:3]
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return here and alike and not learning and query.shape[-2] >= _LEAST_TOKENS
