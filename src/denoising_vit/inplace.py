"""clean() and restore(): a model that gives clean patch tokens through its own interface.

The model keeps its class name, parameters and ``state_dict``; a subclass made for it edits what its methods return. The
cleaner is held outside the table of submodules, so that checkpoints load and optimizers do not see it, and follows the
model to other devices.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from denoising_vit.artifact import SHIPPED, Artifact, load_artifact
from denoising_vit.backbones import Backbone, Intermediates
from denoising_vit.backbones.huggingface import HuggingFaceBackbone
from denoising_vit.backbones.huggingface_loading import is_model_of_transformers, wrap_huggingface
from denoising_vit.backbones.module import (
    Layout,
    ModuleBackbone,
    as_output,
    as_tokens,
    layout_of,
    tensor_in,
    with_tensor,
)
from denoising_vit.backbones.subclassing import Specialised, generalise, specialise
from denoising_vit.backbones.timm_vit import TimmBackbone, TimmViT, any_size, edit_intermediates, timm_name
from denoising_vit.denoiser import Denoiser, find_denoiser
from denoising_vit.denoiser.loading import find_shipped
from denoising_vit.errors import BackboneError, DenoisingVitWarning, PlanError
from denoising_vit.training_free import Registers, Subspace, find_registers, find_subspace
from denoising_vit.training_free import registers as registering
from denoising_vit.training_free.average import DEFAULT_PASSES, aligned_mean, moved, moves, require_passes
from denoising_vit.views.patch_grid import patch_count

M = TypeVar("M", bound=nn.Module)

#: Options of each method, besides those of the module's images.
_OPTIONS = {
    "auto": ("denoiser",),
    "subtract": ("artifact",),
    "denoiser": ("denoiser",),
    "project": ("subspace", "photos", "source", "rank", "artifact", "size"),
    "average": ("passes",),
    "registers": ("registers", "photos", "size"),
}

#: Options that say what a module's images and outputs are.
_MODULE = ("patch_size", "stride", "mean", "std", "default_size", "layout")


def clean(model: M, method: str = "auto", **options: Any) -> M:
    """Make a model give clean patch tokens, in place, through its own interface.

    Class token and registers stay as they are. Only the last block is cleaned: other layers of
    ``forward_intermediates``, ``hidden_states`` and the like pass through. Un-normalised tokens of the last block are
    cleaned through the final norm and mapped back at each token's own scale. Outputs pooled from patch tokens by a head
    behind them change with the tokens. Cleaning a model again replaces what was there; :func:`restore` undoes it.

    Args:
        model: a timm VisionTransformer, Eva or NaFlexVit, also inside ``features_only`` (``forward_features``,
            ``forward_intermediates``, ``get_intermediate_layers``); a ViT of transformers (``last_hidden_state`` and
            ``hidden_states[-1]``), also inside a larger model; a :class:`Backbone`; or, with ``patch_size``, any module
            that returns a grid or tokens.
        method: ``auto`` is ``denoiser`` if the package has one for these weights, else ``project``;
            ``subtract`` takes the artifact G away; ``denoiser`` maps tokens by a trained block; ``project`` removes
            positional directions; ``average`` averages moved passes; ``registers`` moves outlier tokens away.
        **options: of the method: ``artifact`` (subtract); ``denoiser``; ``subspace`` (object or file), or ``photos``,
            ``source``, ``rank``, ``artifact`` and ``size`` to find one (project); ``passes`` (average); ``registers``
            (object or file), or ``photos`` and ``size`` to find them. Of the images: ``mean`` and ``std`` (models of
            transformers, modules), ``patch_size``, ``stride``, ``default_size`` and ``layout`` (modules).

    Returns:
        The model.

    Raises:
        PlanError: if the method or an option is unknown, or something it needs is missing.
        BackboneError: if the model's tokens make no grid, or the method is not for this kind of model.
        ArtifactError, DenoiserError: if what cleans is for another backbone, or none comes with the package.
    """
    if method not in _OPTIONS:
        raise PlanError(f"unknown method {method!r}; choose from {', '.join(_OPTIONS)}")
    of_module = {name: options.pop(name) for name in _MODULE if name in options}
    if unknown := [name for name in options if name not in _OPTIONS[method]]:
        known = ", ".join((*_OPTIONS[method], *_MODULE))
        raise PlanError(f"method {method!r} has no option {', '.join(map(repr, unknown))}; choose from {known}")
    restore(model)
    with _evaluating(model), torch.no_grad():
        target, backbone, mixin = _target(model, of_module)
        if method == "registers":
            _install_registers(target, backbone, _registers(backbone, options))
            return model
        cleaner, passes = None, None
        if method == "average":
            passes = options.get("passes", DEFAULT_PASSES)
            require_passes(passes)
        elif method == "auto":
            method, cleaner = _automatic(backbone, options)
        else:
            cleaner = _cleaner(method, backbone, options)
        target.__dict__["_cleaning"] = _cleaning(method, cleaner, passes, backbone)
    specialise(target, mixin)
    if isinstance(target, Backbone):
        target._fingerprint = None
    return model


def restore(model: M) -> M:
    """Undo :func:`clean`, in place; a model that was not cleaned stays as it is."""
    for module in list(model.modules()):
        if isinstance(module, _Cleaned):
            generalise(module)
            del module.__dict__["_cleaning"]
        if "_registers" in module.__dict__:
            del module.__dict__["_registers"]
            registering.remove(module)
        if isinstance(module, Backbone):
            module._fingerprint = None
    return model


def _cleaner(method: str, backbone: Backbone, options: dict[str, Any]) -> nn.Module:
    """Module that cleans features (B, h, w, C) of a backbone."""
    if method == "subtract":
        artifact = _artifact(options.get("artifact", SHIPPED), backbone)
        artifact.require_of(backbone)
        return _Minus(artifact)
    if method == "denoiser":
        given = options.get("denoiser")
        if isinstance(given, Denoiser):
            given.require_of(backbone)
            return given
        return find_denoiser(given, backbone).denoiser
    found = options.pop("subspace", None)
    if found is None:
        if "artifact" in options:
            options["artifact"] = _artifact(options["artifact"], backbone)
        return find_subspace(backbone, options.pop("photos", None), **options)
    found = found if isinstance(found, Subspace) else Subspace.load(found)
    found.require_of(backbone)
    return found


def _artifact(given: Any, backbone: Backbone) -> Artifact:
    return given if isinstance(given, Artifact) else load_artifact(given, backbone)


def _registers(backbone: Backbone, options: dict[str, Any]) -> Registers:
    found = options.get("registers")
    if found is None and options.get("photos") is None:
        raise PlanError("registers are found on unlabelled photos: give photos=, or registers=")
    if found is None:
        return find_registers(backbone, **options)
    found = found if isinstance(found, Registers) else Registers.load(found)
    found.require_of(backbone)
    return found


def _automatic(backbone: Backbone, options: dict[str, Any]) -> tuple[str, nn.Module]:
    """The denoiser that is given or comes with the package, else the projection."""
    if options.get("denoiser") is None and find_shipped(backbone) is None:
        return "project", _cleaner("project", backbone, {})
    return "denoiser", _cleaner("denoiser", backbone, options)


def _target(model: nn.Module, of_module: dict[str, Any]) -> tuple[nn.Module, Backbone, type[_Cleaned]]:
    """The module whose outputs are edited, a backbone that shares its weights, and the mixin for its class."""
    inner = getattr(model, "model", None)  # of timm's features_only
    if isinstance(model, Backbone):
        _refuse(of_module, "a backbone")
        return model, model, _CleanBackbone
    if "patch_size" in of_module:
        return model, ModuleBackbone(model, **of_module), _CleanModule
    vit = model if isinstance(model, TimmViT) else inner
    if isinstance(vit, TimmViT):
        _refuse(of_module, "a model of timm")
        backbone = TimmBackbone(
            any_size(vit), name=timm_name(vit), stride=None, layer=-1, norm=True, weights="as given"
        )
        return vit, backbone, _CleanTimm
    if is_model_of_transformers(model):
        _refuse(
            {name: of_module[name] for name in ("stride", "layout") if name in of_module}, "a model of transformers"
        )
        backbone = wrap_huggingface(model, frozen=False, **of_module)
        return backbone.model, backbone, _CleanTransformers
    raise BackboneError(
        f"{type(model).__name__} is neither a ViT of timm (VisionTransformer, Eva, NaFlexVit) or transformers nor a "
        "Backbone; give the side of a patch in pixels to clean any other module: clean(module, patch_size=16)"
    )


def _refuse(given: dict[str, Any], what: str) -> None:
    if given:
        raise PlanError(f"{', '.join(given)} cannot be given for {what}, which brings its own")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _install_registers(target: nn.Module, backbone: Backbone, found: Registers) -> None:
    """Registers act inside the model; the model stays as it is where none are needed."""
    inside = target.model if isinstance(target, Backbone) else target
    if not isinstance(inside, TimmViT):
        raise BackboneError(f"test-time registers need a timm VisionTransformer, got {backbone.name}")
    if not found.neurons:
        warnings.warn(f"{backbone.name}: {found}", DenoisingVitWarning, stacklevel=4)
        return
    registering.install(inside, found.neurons)
    inside.__dict__["_registers"] = found
    if isinstance(target, Backbone):
        target._fingerprint = None


class _Minus(nn.Module):
    """Features minus G, resampled to their grid."""

    values: Tensor

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        self.register_buffer("values", artifact.values)
        self._size = artifact.size

    def forward(self, features: Tensor) -> Tensor:
        artifact = Artifact(self.values, self._size, {})
        return features - artifact.at((features.shape[1], features.shape[2]))


@dataclass
class _Cleaning:
    """What cleans the tokens of one model.

    Attributes:
        words: what was done, for ``repr``.
        cleaner: features (B, h, w, C) float32 -> clean ones; None for ``average``.
        passes: number of moved passes, for ``average``.
        stride: distance between patches in pixels.
        patch_size: side of a patch in pixels.
        prefix: number of prefix tokens.
        depth: number of blocks when it was made; None where unknown.
        norm: final norm, behind which features are cleaned; None if tokens come as they are cleaned.
        normed: True if the last hidden state of a model of transformers is behind the final norm.
        layout: output layout of a module.
    """

    words: str
    cleaner: nn.Module | None
    passes: int | None
    stride: int
    patch_size: int
    prefix: int = 0
    depth: int | None = None
    norm: nn.Module | None = None
    normed: bool = True
    layout: Layout = "auto"

    def grid(self, image: Tensor) -> tuple[int, int]:
        """(h, w) of the patch grid of images (B, 3, H, W)."""
        height, width = image.shape[2:]
        return (patch_count(height, self.patch_size, self.stride), patch_count(width, self.patch_size, self.stride))

    def features(self, first: Tensor, image: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
        """Clean features of raw ones (B, h, w, C); ``again`` gives raw features of a moved image."""
        if self.cleaner is not None:
            return self.cleaner(first.float())
        plan = moves(self.passes or DEFAULT_PASSES, (first.shape[1], first.shape[2]))
        others = [again(moved(image, move, self.stride)).float() for move in plan[1:]]
        return aligned_mean([first.float(), *others], plan)

    def tokens(
        self, first: Tensor, grid: tuple[int, int], image: Tensor, again: Callable[[Tensor], Tensor], normed: bool
    ) -> Tensor:
        """Clean patch tokens of raw ones (B, h w, C), in their dtype.

        Args:
            first: patch tokens of ``image``.
            grid: (h, w).
            image: normalised images (B, 3, H, W).
            again: raw patch tokens of another image.
            normed: True if tokens are behind the final norm.
        """
        if normed or self.norm is None or self.cleaner is None:
            clean = self.features(first.unflatten(1, grid), image, lambda other: again(other).unflatten(1, grid))
            return clean.flatten(1, 2).to(first.dtype)
        behind = self.norm(first).float()
        change = self.features(behind.unflatten(1, grid), image, again).flatten(1, 2) - behind
        return (first.float() + change * _scale(first.float(), self.norm)).to(first.dtype)

    def moved_by(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow the model to another device, in the precision it has."""
        if self.cleaner is not None:
            self.cleaner._apply(lambda tensor: tensor.to(fn(tensor).device))


def _scale(tokens: Tensor, norm: nn.Module) -> Tensor:
    """Deviation of each token over the norm's weight, (B, N, C): undoes the norm's scale; 0 where the weight is."""
    centred = tokens - tokens.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else tokens
    eps = getattr(norm, "eps", None) or 1e-6
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    weight = getattr(norm, "weight", None)
    if weight is None:
        return deviation.expand_as(tokens)
    weight = weight.float()
    return deviation * torch.where(weight.abs() > 1e-6, 1 / weight, torch.zeros_like(weight))


def _cleaning(method: str, cleaner: nn.Module | None, passes: int | None, backbone: Backbone) -> _Cleaning:
    """How to clean the tokens of the model in a backbone; the backbone itself is not kept."""
    if cleaner is not None:  # the caller's own stays as it is
        cleaner = copy.deepcopy(cleaner).to(backbone.device).eval().requires_grad_(False)
    what = {
        "subtract": "minus the artifact G",
        "denoiser": "through a denoiser",
        "project": f"without {getattr(cleaner, 'rank', '')} positional directions",
        "average": f"mean of {passes} moved passes",
    }
    words = f"cleaned patch tokens: {what.get(method, method)} (denoising_vit.restore undoes it)"
    made = _Cleaning(words, cleaner, passes, backbone.stride, backbone.patch_size, depth=backbone.depth)
    if isinstance(backbone, ModuleBackbone):
        made.layout, made.prefix = backbone.layout, backbone.prefix_tokens or 0
    elif isinstance(backbone, TimmBackbone):
        norm = backbone.model.fc_norm if isinstance(backbone.model.norm, nn.Identity) else backbone.model.norm
        made.norm = None if isinstance(norm, nn.Identity) else norm
        made.prefix = backbone.model.num_prefix_tokens
    elif isinstance(backbone, HuggingFaceBackbone):
        made.norm = backbone.model.get_submodule(backbone.family.norm)
        made.prefix, made.normed = backbone.family.prefix_tokens(backbone.model.config), backbone.family.normed
    return made


class _Cleaned(Specialised):
    """Mixin of every cleaned module."""

    _cleaning: _Cleaning

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        moved_module = super()._apply(fn, recurse)  # pyright: ignore[reportAttributeAccessIssue]
        self._cleaning.moved_by(fn)
        return moved_module

    def extra_repr(self) -> str:
        before = super().extra_repr()  # pyright: ignore[reportAttributeAccessIssue]
        return "\n".join(filter(None, (before, self._cleaning.words)))


class _CleanTimm(_Cleaned):
    """A timm ViT with clean patch tokens behind its last block."""

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = super().forward_features  # pyright: ignore[reportAttributeAccessIssue]
        return self._all_tokens(run(x, *args, **kwargs), x, lambda image: run(image, *args, **kwargs))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Any = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        run = super().forward_intermediates  # pyright: ignore[reportAttributeAccessIssue]
        features = super().forward_features  # pyright: ignore[reportAttributeAccessIssue]
        found = run(x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, *args, **kwargs)
        cleaning, blocks = self._cleaning, len(self.blocks)  # pyright: ignore[reportAttributeAccessIssue]
        taken, most = feature_take_indices(blocks, indices)
        if blocks != cleaning.depth or (stop_early and most < blocks - 1):
            return found  # it ended before the last block
        last = sorted(taken).index(blocks - 1) if blocks - 1 in taken else None
        grid = cleaning.grid(x)

        def again(image: Tensor) -> Tensor:
            return run(image, [blocks - 1], False, norm, False, "NLC", True)[0]

        def patches(tokens: Tensor, number: int) -> Tensor:
            if number != last:
                return tokens
            square = output_fmt == "NCHW"
            tokens = tokens.flatten(2).transpose(1, 2) if square else tokens  # (B, C, h, w) -> (B, h w, C)
            clean = cleaning.tokens(tokens, grid, x, again, normed=norm and self._normed())
            return clean.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() if square else clean

        return edit_intermediates(found, patches, lambda tokens: self._all_tokens(tokens, x, features))

    def _all_tokens(self, tokens: Tensor, image: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
        """Prefix and patch tokens (B, P + h w, C), patch tokens cleaned; not if the last blocks were pruned."""
        cleaning = self._cleaning
        if len(self.blocks) != cleaning.depth:  # pyright: ignore[reportAttributeAccessIssue]
            return tokens
        prefix, patches = tokens[:, : cleaning.prefix], tokens[:, cleaning.prefix :]
        clean = cleaning.tokens(
            patches, cleaning.grid(image), image, lambda other: again(other)[:, cleaning.prefix :], self._normed()
        )
        return torch.cat([prefix, clean], dim=1)

    def _normed(self) -> bool:
        """True if the model normalises before any pooling; a pruned model no longer does."""
        return not isinstance(self.norm, nn.Identity)  # pyright: ignore[reportAttributeAccessIssue]


class _CleanTransformers(_Cleaned):
    """A ViT of transformers with clean patch tokens in ``last_hidden_state`` and ``hidden_states[-1]``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = super().forward  # pyright: ignore[reportAttributeAccessIssue]
        image = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        found = run(*args, **kwargs)
        cleaning = self._cleaning

        others = {name: value for name, value in kwargs.items() if name != "pixel_values"}

        def again(moved_image: Tensor) -> Tensor:
            return tensor_in(run(pixel_values=moved_image, **others), "the model")

        def cleaned(tokens: Tensor, normed: bool, rerun: Callable[[Tensor], Tensor]) -> Tensor:
            prefix, patches = tokens[:, : cleaning.prefix], tokens[:, cleaning.prefix :]
            clean = cleaning.tokens(
                patches, cleaning.grid(image), image, lambda other: rerun(other)[:, cleaning.prefix :], normed
            )
            return torch.cat([prefix, clean], dim=1)

        last = tensor_in(found, "the model")
        clean = cleaned(last, cleaning.normed, again)
        changed = with_tensor(found, clean)
        states, where = _hidden_states(found)
        if states is None:
            return changed

        def again_before_the_norm(moved_image: Tensor) -> Tensor:
            more = _hidden_states(run(pixel_values=moved_image, **others))[0]
            assert more is not None  # as in the first pass
            return more[-1]

        end = clean if states[-1] is last else cleaned(states[-1], False, again_before_the_norm)
        states = (*states[:-1], end)
        if isinstance(where, int):
            return (*changed[:where], states, *changed[where + 1 :])
        changed[where] = states
        return changed


def _hidden_states(output: Any) -> tuple[tuple[Tensor, ...] | None, int | str]:
    """The hidden states in what a model of transformers returned, and their index or name."""
    if isinstance(output, dict):
        return output.get("hidden_states"), "hidden_states"
    shape = output[0].shape
    for number, part in enumerate(output):
        if isinstance(part, tuple) and part and part[-1].shape == shape:
            return part, number
    return None, 0


class _CleanModule(_Cleaned):
    """Any module whose output is a grid or tokens."""

    def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = super().forward  # pyright: ignore[reportAttributeAccessIssue]
        cleaning, name = self._cleaning, type(self).__name__
        grid = cleaning.grid(image)

        def tokens_of(output: Any) -> tuple[Tensor, Layout]:
            found = tensor_in(output, name)
            layout = layout_of(found, *grid, name) if cleaning.layout == "auto" else cleaning.layout
            return as_tokens(found, layout, grid, name), layout

        output = run(image, *args, **kwargs)
        tokens, layout = tokens_of(output)
        clean = cleaning.tokens(
            tokens[:, cleaning.prefix :],
            grid,
            image,
            lambda other: tokens_of(run(other, *args, **kwargs))[0][:, cleaning.prefix :],
            normed=True,
        )
        return with_tensor(output, as_output(torch.cat([tokens[:, : cleaning.prefix], clean], dim=1), layout, grid))


class _CleanBackbone(_Cleaned):
    """A :class:`Backbone` whose features are clean."""

    def forward_with_prefix(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features, prefix = super().forward_with_prefix(image)  # pyright: ignore[reportAttributeAccessIssue]
        return self._clean(features, image), prefix

    def forward_intermediates(self, image: Tensor, layers: Sequence[int]) -> Intermediates:
        found = super().forward_intermediates(image, layers)  # pyright: ignore[reportAttributeAccessIssue]
        return found._replace(features=self._clean(found.features, image))

    def at_layer(self, layer: int) -> Backbone:
        other = super().at_layer(layer)  # pyright: ignore[reportAttributeAccessIssue]
        generalise(other)  # the cleaner is that of one layer
        return other

    def _clean(self, features: Tensor, image: Tensor) -> Tensor:
        run = super().forward_with_prefix  # pyright: ignore[reportAttributeAccessIssue]
        return self._cleaning.features(features, image, lambda other: run(other)[0])
