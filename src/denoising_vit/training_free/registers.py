"""Test-time registers: move outlier tokens out of the patch grid; no training.

Jiang et al., Vision Transformers Don't Need Trained Registers (NeurIPS 2025): a few MLP neurons write the high-norm
tokens. A token of zeros is appended to the sequence; at these neurons it gets the strongest activation of all tokens,
and every other token gets zero. Outliers then appear in the added token, which is dropped from the output.

Differences from the paper: neurons are ranked by their contribution (activation times the norm of the neuron's output
weights) instead of by activation alone, and their number is the smallest power of two that removes the outliers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import describe
from denoising_vit.backbones.subclassing import Specialised, generalise, shallow, specialise
from denoising_vit.backbones.timm_vit import TimmBackbone, edit_intermediates
from denoising_vit.errors import BackboneError, FormatError
from denoising_vit.hub.pretrained import Pretrained
from denoising_vit.training_free import common

KIND = "denoising-vit/registers"

#: A token is an outlier if its norm is above twice the median, and over 5 robust deviations above it on a log scale.
_TIMES, _DEVIATIONS = 2.0, 5.0

#: Fraction of outlier tokens below which the model counts as free of outliers.
_LEAST_SHARE = 5e-4

#: Stop adding neurons when at most the first fraction of the outliers remains; give up when more than the second one
#: remains with any number of neurons.
_ENOUGH, _USELESS = 0.05, 0.5

_MOST_NEURONS = 128


@dataclass(frozen=True)
class Registers(Pretrained):
    """Neurons that write the outlier tokens of a backbone; created by :func:`find_registers`.

    Attributes:
        neurons: (block, neuron) pairs, strongest first; empty if the backbone has no outliers.
        backbone: record of the backbone that they belong to.
        info: fraction of outlier tokens before and after, and number of photos; JSON values.
    """

    FORMAT = KIND

    neurons: tuple[tuple[int, int], ...]
    backbone: dict[str, Any] = field(repr=False)
    info: dict[str, Any] = field(default_factory=dict)

    def require_of(self, backbone: Backbone) -> None:
        """Reject another backbone.

        Raises:
            ArtifactError: naming both.
        """
        common.require_same(self.backbone, backbone, "these register neurons were")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file for :meth:`load`."""
        values = torch.tensor(self.neurons, dtype=torch.int64).view(-1, 2)
        common.write(Path(path), KIND, values, self.backbone, self.info)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            FormatError: if the file is missing, damaged, or of another type.
        """
        values, backbone, info = common.read(Path(path), KIND, "registers")
        if values.shape[1] != 2 or (values < 0).any():
            raise FormatError(f"{path}: damaged: expected pairs of block and neuron, got {tuple(values.shape)}")
        return cls(tuple((int(block), int(neuron)) for block, neuron in values), backbone, info)

    @property
    def digest(self) -> str:
        """SHA-256 of the neurons."""
        return hashlib.sha256(repr(self.neurons).encode()).hexdigest()

    def __str__(self) -> str:
        if not self.neurons:
            return f"no registers: {self.info.get('reason', 'no outlier tokens')}"
        return f"{len(self.neurons)} register neurons in {len({block for block, _ in self.neurons})} blocks"


def with_registers(backbone: Backbone, registers: Registers) -> Backbone:
    """The backbone with a test-time register; it shares all weights. Without neurons, the unchanged backbone.

    Raises:
        ArtifactError: if the registers belong to another backbone.
        BackboneError: if the model is not a timm VisionTransformer.
    """
    registers.require_of(backbone)
    if not registers.neurons:
        return backbone
    return _with_neurons(backbone, registers.neurons)


@torch.no_grad()
def find_registers(
    backbone: Backbone, photos: Iterable[Any], *, size: tuple[int, int] | None = None, most: int = 32
) -> Registers:
    """Find the neurons that cause the outlier tokens of a timm VisionTransformer.

    Args:
        backbone: the extractor.
        photos: a few unlabelled photos: paths, PIL images or (H, W, 3) uint8 arrays.
        size: (H, W) in pixels; defaults to the backbone's default size.
        most: maximum number of photos; only the first ones are used.

    Returns:
        The registers; without neurons, and with a reason in ``info``, if the model has no outliers, or no neurons
        cause them.

    Raises:
        BackboneError: if the model is not a timm VisionTransformer.
        PhotoError: if a photo cannot be read.
    """
    model = _vision_transformer(backbone)
    size = size or (backbone.default_size, backbone.default_size)
    images = common.photo_images(photos, backbone, size, most)
    norms = torch.stack([_block_norms(model, image) for image in images])  # (N, depth, tokens)
    layer = backbone.layer if backbone.layer is not None else -1
    limits = [_limit(norms[:, block]) for block in range(norms.shape[1])]
    outliers = norms[:, layer] > limits[layer]  # (N, tokens)
    info: dict[str, Any] = {"photos": len(images), "before": float(outliers.float().mean()), "limit": limits[layer]}
    if info["before"] < _LEAST_SHARE:
        reason = f"{info['before']:.2%} of the patch tokens are outliers, too few to need a register"
        return Registers((), describe(backbone), info | {"reason": reason})
    # The first block after which most of them are outliers; later blocks cannot have caused them.
    top = next(
        (block for block in range(layer + 1) if (norms[:, block] > limits[block])[outliers].float().mean() > 0.5), layer
    )
    ranked = _ranked_neurons(model, images, outliers, top)
    tried: dict[int, float] = {}
    count = 1
    while count <= min(_MOST_NEURONS, len(ranked)):
        changed = _vision_transformer(_with_neurons(backbone, ranked[:count]))
        left = torch.stack([_block_norms(changed, image)[layer] for image in images]) > limits[layer]
        tried[count] = float(left.float().mean()) / info["before"]
        if tried[count] <= _ENOUGH:
            break
        count *= 2
    best = min(tried, key=lambda number: tried[number])
    info |= {"after": tried[best] * info["before"], "top": top}
    if tried[best] > _USELESS:
        reason = f"no small set of neurons causes the outliers: {tried[best]:.0%} of them remain without {best}"
        return Registers((), describe(backbone), info | {"reason": reason})
    return Registers(ranked[:best], describe(backbone), info)


def install(model: nn.Module, neurons: Sequence[tuple[int, int]]) -> None:
    """Add a test-time register to a timm VisionTransformer, in place; :func:`remove` undoes it."""
    for block, chosen in _by_block(neurons).items():
        _output_layer(model, block).register_forward_pre_hook(_Shift(chosen))
    specialise(model, _WithRegister)


def remove(model: nn.Module) -> None:
    """Remove a test-time register from a model, in place."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _Shift)]:
            del module._forward_pre_hooks[key]
    generalise(model)


def has_registers(extractor: Any) -> bool:
    """True for a backbone with a test-time register, also inside a cleaned extractor."""
    backbone = getattr(extractor, "backbone", extractor)
    return isinstance(getattr(backbone, "model", None), _WithRegister)


class _Shift:
    """Pre-hook of an MLP's second layer: strongest activations move to the last token, others become zero."""

    def __init__(self, neurons: Sequence[int]) -> None:
        self.neurons = list(neurons)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]  # (B, tokens + 1, hidden)
        index = torch.tensor(self.neurons, device=hidden.device)
        here = hidden.index_select(-1, index)
        strongest = here.abs().argmax(1, keepdim=True)  # (B, 1, k)
        peak = here.gather(1, strongest)
        shifted = torch.cat([torch.zeros_like(here[:, :-1]), peak], dim=1)
        return (hidden.index_copy(-1, index, shifted), *inputs[1:])


class _WithRegister(Specialised):
    """A timm VisionTransformer with one more token, which is dropped from all outputs."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        tokens = super()._pos_embed(x)  # pyright: ignore[reportAttributeAccessIssue]
        return torch.cat([tokens, torch.zeros_like(tokens[:, :1])], dim=1)

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward_features(x, *args, **kwargs)[:, :-1]  # pyright: ignore[reportAttributeAccessIssue]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Any = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        run = super().forward_intermediates  # pyright: ignore[reportAttributeAccessIssue]
        # Flat tokens, because timm cannot reshape one more token than the grid has.
        found = run(x, indices, return_prefix_tokens, norm, stop_early, "NLC", *args, **kwargs)
        grid = self.patch_embed.dynamic_feat_size(x.shape[2:])  # pyright: ignore[reportAttributeAccessIssue]

        def patches(tokens: Tensor, _number: int) -> Tensor:
            tokens = tokens[:, :-1]
            if output_fmt == "NLC":
                return tokens
            return tokens.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()  # (B, h w, C) -> (B, C, h, w)

        return edit_intermediates(found, patches, lambda tokens: tokens[:, :-1])


def _with_neurons(backbone: Backbone, neurons: Sequence[tuple[int, int]]) -> Backbone:
    """A backbone that shares the weights; only the modules on the path to the changed layers are copies."""
    model = shallow(_vision_transformer(backbone))
    model.blocks = shallow(model.blocks)
    for block in _by_block(neurons):
        own: Any = shallow(model.blocks[block])
        own.mlp = shallow(own.mlp)
        own.mlp.fc2 = shallow(own.mlp.fc2)
        model.blocks[block] = own
    install(model, neurons)
    other = shallow(backbone)
    other._fingerprint = None
    other.model = model
    return other


def _by_block(neurons: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for block, neuron in neurons:
        found.setdefault(block, []).append(neuron)
    return found


def _vision_transformer(backbone: Backbone) -> VisionTransformer:
    model = getattr(backbone, "model", None)
    if not isinstance(backbone, TimmBackbone) or not isinstance(model, VisionTransformer):
        raise BackboneError(
            f"test-time registers need a timm VisionTransformer, got {backbone.name} "
            f"({type(model or backbone).__name__}); use project or average"
        )
    for block in range(len(model.blocks)):
        _output_layer(model, block)
    return model


def _output_layer(model: Any, block: int) -> nn.Linear:
    layer = getattr(getattr(model.blocks[block], "mlp", None), "fc2", None)
    if not isinstance(layer, nn.Linear):
        raise BackboneError(f"block {block} has no MLP with a second linear layer (mlp.fc2), which registers need")
    return layer


def _block_norms(model: VisionTransformer, image: Tensor) -> Tensor:
    """Norms of the patch tokens of one image after every block, before the final norm: (depth, tokens)."""
    weight = model.patch_embed.proj.weight
    found: Any = model.forward_intermediates(
        image.to(weight.device, weight.dtype), norm=False, output_fmt="NLC", intermediates_only=True
    )
    return torch.stack([tokens[0].float().norm(dim=-1).cpu() for tokens in found])


def _limit(norms: Tensor) -> float:
    """Norm above which a token is an outlier."""
    logs = norms.flatten().clamp(min=1e-12).log()
    middle = logs.median()
    deviation = 1.4826 * (logs - middle).abs().median()
    return float((middle + torch.clamp(_DEVIATIONS * deviation, min=torch.tensor(_TIMES).log())).exp())


def _ranked_neurons(
    model: VisionTransformer, images: Sequence[Tensor], outliers: Tensor, top: int
) -> tuple[tuple[int, int], ...]:
    """Neurons of blocks 0 to ``top``, ranked by how much more they write at outliers than elsewhere."""
    prefix = model.num_prefix_tokens
    sums = [torch.zeros(2, _output_layer(model, block).weight.shape[1]) for block in range(top + 1)]
    seen: dict[int, Tensor] = {}  # activations of the neurons of each block, (1, tokens, hidden)

    def collect(block: int) -> Callable[[nn.Module, Any], None]:
        return lambda _module, inputs: seen.update({block: inputs[0]})

    with ExitStack() as hooks:
        for block in range(top + 1):
            hooks.enter_context(_output_layer(model, block).register_forward_pre_hook(collect(block)))
        for image, mask in zip(images, outliers, strict=True):
            _block_norms(model, image)
            for block, hidden in seen.items():
                patches = hidden[0, prefix:].float().cpu()  # (tokens, hidden)
                sums[block] += torch.stack([patches[mask].sum(0), patches[~mask].sum(0)])
    counts = torch.tensor([max(int(outliers.sum()), 1), max(int((~outliers).sum()), 1)])
    scores = []
    for block, total in enumerate(sums):
        at, elsewhere = total / counts[:, None]
        gamma: Any = getattr(getattr(model.blocks[block], "ls2", None), "gamma", torch.ones(()))
        written = (_output_layer(model, block).weight.float() * gamma.float().reshape(-1, 1)).norm(dim=0).cpu()
        scores.append((at - elsewhere).abs() * written)
    order = torch.cat(scores).argsort(descending=True)[:_MOST_NEURONS].tolist()
    neurons = [(block, neuron) for block, score in enumerate(scores) for neuron in range(len(score))]
    return tuple(neurons[number] for number in order)
