"""clean() and restore(): a model whose own interface returns clean patch tokens.

The model keeps its class name, parameters and ``state_dict``: its class is replaced by a subclass that edits the
outputs. The cleaner is not registered as a submodule, so that checkpoints load and optimizers do not see it, but it
moves with the model to other devices.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.huggingface_loading import is_model_of_transformers, wrap_huggingface
from denoising_vit.backbones.loading import distilled_path, means_own, with_weights
from denoising_vit.backbones.module import ModuleBackbone
from denoising_vit.backbones.subclassing import generalise, specialise
from denoising_vit.backbones.timm_vit import TimmBackbone, TimmViT, any_size, timm_name
from denoising_vit.cleaning.models import CleanBackbone, Cleaned, CleanModule, CleanTimm, CleanTransformers
from denoising_vit.cleaning.tokens import cleaning_of
from denoising_vit.errors import BackboneError, DenoisingVitWarning, PlanError
from denoising_vit.training_free import Registers, find_registers
from denoising_vit.training_free import registers as registering

M = TypeVar("M", bound=nn.Module)

#: Options of each method, besides those that describe a module's images.
_OPTIONS = {
    "auto": ("denoiser",),
    "subtract": ("artifact",),
    "denoiser": ("denoiser",),
    "project": ("subspace", "photos", "source", "rank", "artifact", "size"),
    "average": ("passes",),
    "registers": ("registers", "photos", "size"),
    "distilled": ("distilled",),
}

#: Attribute of a model with distilled weights: its own weights, by name, where they differ.
_OWN = "_own_weights"

#: Attribute of a backbone with distilled weights: the origin of its own weights.
_ORIGIN = "_own_origin"

#: Options that describe a module's images and outputs.
_MODULE = ("patch_size", "stride", "mean", "std", "default_size", "layout")


def clean(model: M, method: str = "auto", **options: Any) -> M:
    """Make a model return clean patch tokens, in place, through its own interface.

    Class token and registers are unchanged, except that ``registers`` and ``distilled`` act inside the model and change
    them slightly. Only the last block is cleaned; other layers, such as those of ``forward_intermediates`` and
    ``hidden_states``, are unchanged. Un-normalised tokens of the last block are cleaned through the final norm and
    mapped back to each token's own scale. Outputs that a head pools from patch tokens change with the tokens. Cleaning
    a model again replaces the earlier cleaner; :func:`restore` undoes it.

    Args:
        model: a timm VisionTransformer, Eva or NaFlexVit, also inside ``features_only`` (``forward_features``,
            ``forward_intermediates``, ``get_intermediate_layers``); a ViT of transformers (``last_hidden_state`` and
            ``hidden_states[-1]``), also inside a larger model; a :class:`Backbone`; or, with ``patch_size``, any module
            that returns a grid or tokens.
        method: ``auto`` is ``denoiser`` if the package has one for these weights, else ``project``; neither changes the
            model's weights. ``subtract`` subtracts the artifact G; ``denoiser`` applies a trained block to tokens;
            ``project`` removes positional directions; ``average`` averages passes over shifted and mirrored images;
            ``registers`` moves outliers into an added token; ``distilled`` replaces the weights of a whole timm model
            by those of stage 3, at no extra cost.
        **options: options of the method: ``artifact`` (subtract); ``denoiser``; ``subspace`` (object or file), or
            ``photos``, ``source``, ``rank``, ``artifact`` and ``size`` to find one (project); ``passes`` (average);
            ``registers`` (object or file), or ``photos`` and ``size`` to find them; ``distilled`` (file, by default the
            package's). Options of the images: ``mean`` and ``std`` (models of transformers, modules), ``patch_size``,
            ``stride``, ``default_size`` and ``layout`` (modules).

    Returns:
        The model.

    Raises:
        PlanError: if the method or an option is unknown, or a required option is missing.
        BackboneError: if the model's tokens do not form a grid, or the method does not support this kind of model.
        ArtifactError, DenoiserError, WeightsError: if the cleaner belongs to another backbone, or the package has none.
    """
    if method not in _OPTIONS:
        raise PlanError(f"unknown method {method!r}; choose from {', '.join(_OPTIONS)}")
    options = {name: value for name, value in options.items() if value is not None}
    of_module = {name: options.pop(name) for name in _MODULE if name in options}
    if unknown := [name for name in options if name not in _OPTIONS[method]]:
        known = ", ".join((*_OPTIONS[method], *_MODULE))
        raise PlanError(f"method {method!r} has no option {', '.join(map(repr, unknown))}; choose from {known}")
    ready = {"project": "subspace", "registers": "registers"}.get(method)
    if ready in options and len(options) > 1:
        unused = ", ".join(name for name in options if name != ready)
        raise PlanError(f"{ready} is given, so {unused} would have no effect; omit one of them")
    with _evaluating(model), torch.no_grad(), _restored(model):
        target, backbone, mixin = _target(model, of_module)
        if method == "registers":
            _install_registers(target, backbone, _registers(backbone, options))
        elif method == "distilled":
            _install_weights(target, backbone, options.get("distilled"))
        else:
            target.__dict__["_cleaning"] = cleaning_of(method, backbone, options)
            specialise(target, mixin)
        if isinstance(target, Backbone):
            target._fingerprint = None
    return model


def restore(model: M) -> M:
    """Undo :func:`clean`, in place; a model that was not cleaned is unchanged.

    After ``distilled``, the weights are those from before, even if they were trained since.
    """
    for module in list(model.modules()):
        if isinstance(module, Cleaned):
            generalise(module)
            del module.__dict__["_cleaning"]
        if "_registers" in module.__dict__:
            del module.__dict__["_registers"]
            registering.remove(module)
        _write(module, module.__dict__.pop(_OWN, {}))
        if isinstance(module, Backbone):
            module._fingerprint = None
            module.weights = vars(module).pop(_ORIGIN, module.weights)
    return model


def _registers(backbone: Backbone, options: dict[str, Any]) -> Registers:
    found = options.get("registers")
    if found is None and options.get("photos") is None:
        raise PlanError("registers are found on unlabelled photos; give photos= or registers=")
    if found is None:
        return find_registers(backbone, **options)
    found = found if isinstance(found, Registers) else Registers.load(found)
    found.require_of(backbone)
    return found


def _target(model: nn.Module, of_module: dict[str, Any]) -> tuple[nn.Module, Backbone, type[Cleaned]]:
    """The module whose outputs are edited, a backbone that shares its weights, and the mixin for its class."""
    inner = getattr(model, "model", None)  # of timm's features_only
    if isinstance(model, Backbone):
        _refuse(of_module, "a backbone")
        return model, model, CleanBackbone
    if "patch_size" in of_module:
        return model, ModuleBackbone(model, **of_module), CleanModule
    vit = model if isinstance(model, TimmViT) else inner
    if isinstance(vit, TimmViT):
        _refuse(of_module, "a timm model")
        backbone = TimmBackbone(
            any_size(vit), name=timm_name(vit), stride=None, layer=-1, norm=True, weights="as given"
        )
        return vit, backbone, CleanTimm
    if is_model_of_transformers(model):
        _refuse({name: of_module[name] for name in ("stride", "layout") if name in of_module}, "a transformers model")
        backbone = wrap_huggingface(model, frozen=False, **of_module)
        return backbone.model, backbone, CleanTransformers
    raise BackboneError(
        f"{type(model).__name__} is neither a ViT of timm (VisionTransformer, Eva, NaFlexVit) or transformers nor a "
        "Backbone; to clean another module, give its patch size in pixels: clean(module, patch_size=16)"
    )


def _refuse(given: dict[str, Any], what: str) -> None:
    if given:
        raise PlanError(f"{', '.join(given)} cannot be given for {what}, which has its own")


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """The model without its earlier cleaner inside the block; the cleaner is put back if the block fails."""
    before = [(module, type(module), dict(vars(module)), dict(module._forward_pre_hooks)) for module in model.modules()]
    distilled = [(module, _installed(module)) for module in model.modules()]
    restore(model)
    try:
        yield
    except BaseException:
        for module, kind, held, hooks in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(held)
            module._forward_pre_hooks.update(hooks)
        for module, values in distilled:
            _write(module, values)
        raise


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
    """Install the registers; warn and change nothing if there are none."""
    inside = target.model if isinstance(target, Backbone) else target
    if not isinstance(inside, TimmViT):
        raise BackboneError(f"test-time registers need a timm VisionTransformer, got {backbone.name}")
    if not found.neurons:
        warnings.warn(f"{backbone.name}: {found}", DenoisingVitWarning, stacklevel=3)
        return
    registering.install(inside, found.neurons)
    inside.__dict__["_registers"] = found


def _install_weights(target: nn.Module, backbone: Backbone, given: str | Path | None) -> None:
    """Replace the weights of a timm model, in place, by distilled ones from a file, or by the package's."""
    if not isinstance(backbone, TimmBackbone):
        raise BackboneError(f"distilled weights need a ViT of timm, got {backbone.name}")
    module = target.model if isinstance(target, TimmBackbone) else target
    distilled = with_weights(backbone, distilled_path(backbone, given, how="distilled=FILE"))
    assert isinstance(distilled, TimmBackbone)
    own = module.state_dict()
    changed = {name: value for name, value in distilled.model.state_dict().items() if not torch.equal(value, own[name])}
    # Names may share a tensor, so all values are kept before any is written.
    module.__dict__[_OWN] = {name: own[name].clone() for name in changed}
    _write(module, changed)
    if isinstance(target, Backbone):
        vars(target)[_ORIGIN] = target.weights
        target.weights = "distilled" if given is None or means_own(given) else str(given)


def _installed(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the distilled weights of a module, by name; empty if it has none."""
    present = module.state_dict() if _OWN in module.__dict__ else {}
    return {name: present[name].clone() for name in module.__dict__.get(_OWN, ()) if name in present}


@torch.no_grad()
def _write(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Write weights by name, in place; names that the module no longer has in this shape are skipped."""
    present = module.state_dict() if values else {}
    for name, value in values.items():
        if name in present and present[name].shape == value.shape:
            present[name].copy_(value)
