"""The table of kinds of features, and extractors by name.

A new kind of features needs an entry of :data:`KINDS` and a function that creates its extractor. Every verb, the page
and the export read this table. Importing it does not import torch, so that `dvit VERB --help` is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro

from denoising_vit.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

    from denoising_vit.artifact import KnownArtifact
    from denoising_vit.backbones import Backbone
    from denoising_vit.denoiser.loading import GivenDenoiser
    from denoising_vit.training_free import Registers, Subspace

    GivenArtifact: TypeAlias = KnownArtifact
    GivenSubspace: TypeAlias = Subspace | str | Path
    GivenRegisters: TypeAlias = Registers | str | Path
else:
    GivenArtifact = GivenDenoiser = GivenSubspace = GivenRegisters = str  # types for the command line

#: extractor(image (B, 3, H, W)) -> features (B, h, w, C).
Extractor = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Cleaners:
    """The cleaners to use, by kind.

    Attributes:
        artifact: artifact G of the backbone: a file of `dvit calibrate`, or `shipped` for the one in the package. By
            default, subtract uses the shipped one, and exact fits one in each image.
        denoiser: denoiser of the backbone: a file, voc_denoised or imgnet_denoised for the published ones. Defaults to
            the one in the package.
        distilled: weights of the backbone after stage 3: `distilled.safetensors` of a run of `dvit distill`, a
            published file, or `shipped` for those in the package. Defaults to those in the package.
        subspace: positional directions for project: a file of `dvit prepare` or `Subspace.save`. Defaults to the 16
            strongest directions of a black image.
        registers: register neurons for registers: a file of `dvit prepare` or `Registers.save`.
    """

    artifact: GivenArtifact | None = None
    denoiser: GivenDenoiser | None = None
    distilled: str | None = None
    subspace: GivenSubspace | None = None
    registers: GivenRegisters | None = None

    def extractor(self, name: str, backbone: Backbone) -> tuple[Extractor, dict[str, str]]:
        """The extractor of a kind of features, and the record that identifies its cleaner.

        Raises:
            PlanError: if the name is unknown, or the features are fitted to each image (`exact`).
            ArtifactError, DenoiserError: if the cleaner belongs to another backbone, or the package has none.
            WeightsError: if weights are missing or for another model.
            FormatError: if a file is missing, damaged or of another type.
        """
        kind = KINDS.get(name)
        if kind is None or kind.make is None:
            known = [other.name for other in KINDS.values() if not other.per_image]
            raise PlanError(f"unknown extractor {name!r}; choose from {', '.join(known)}")
        return kind.make(backbone, self)

    def preferred(self, backbone: Backbone) -> str:
        """The kind of features to use by default.

        Those of the given cleaner, where an artifact means `exact`; else the best in the package for these weights,
        layer and stride, as judged by labels in docs/decisions.md: `distilled`, then `denoiser`; else `exact`.

        Raises:
            PlanError: if several cleaners are given, apart from an artifact.
            FormatError: if a file in the package is damaged.
        """
        from denoising_vit.backbones.loading import can_add_difference, find_distilled
        from denoising_vit.denoiser.loading import find_shipped

        own = {kind.name: kind.uses for kind in KINDS.values() if kind.uses and kind.uses != "artifact"}
        given = [name for name, uses in own.items() if getattr(self, uses) is not None]
        if len(given) > 1:
            raise PlanError(f"cleaners of several kinds of features are given ({', '.join(given)}); choose one of them")
        if given:
            return given[0]
        if self.artifact is not None:
            return "exact"
        if find_distilled(backbone) is not None and can_add_difference(backbone):
            return "distilled"
        return "exact" if find_shipped(backbone) is None else "denoiser"


#: A field of :class:`Cleaners` that a command does not use; its subclass hides the flag with ``name: Unused = None``.
Unused = Annotated[None, tyro.conf.Fixed, tyro.conf.Suppress]


@dataclass(frozen=True)
class FeatureKind:
    """A kind of features."""

    name: str  #: as in ``--features``
    summary: str  #: short description for ``--help``
    #: Creates the extractor, and the record that identifies its cleaner. None for features that stage 1 fits to each
    #: image: these are read from fields, and no extractor computes them.
    make: Callable[[Backbone, Cleaners], tuple[Extractor, dict[str, str]]] | None
    #: The field of :class:`Cleaners` that it uses, if any. If that is not given, it may use one from the package, or
    #: find one.
    uses: Literal["artifact", "denoiser", "distilled", "subspace", "registers"] | None = None
    cleans: bool = True  #: False for raw features
    one_pass: bool = True  #: True if an image takes one forward pass

    @property
    def per_image(self) -> bool:
        """True if the features are fitted to each image instead of extracted in one pass."""
        return self.make is None


def _raw(backbone: Backbone, _cleaners: Cleaners) -> tuple[Extractor, dict[str, str]]:
    return backbone, {}


def _subtract(backbone: Backbone, cleaners: Cleaners) -> tuple[Extractor, dict[str, str]]:
    from denoising_vit.artifact import NONE, SHIPPED, Artifact, artifact_digest, load_artifact
    from denoising_vit.denoiser.denoised_vit import DenoisedViT

    artifact = SHIPPED if cleaners.artifact is None else cleaners.artifact
    if isinstance(artifact, str | Path) and artifact != NONE:
        artifact = load_artifact(artifact, backbone)
    if not isinstance(artifact, Artifact):
        raise PlanError("subtract needs an artifact as a file or an Artifact; give one, or omit subtract")
    return DenoisedViT(backbone, artifact), {"artifact": str(artifact_digest(artifact.values))}


def _denoiser(backbone: Backbone, cleaners: Cleaners) -> tuple[Extractor, dict[str, str]]:
    from denoising_vit.denoiser import find_denoiser
    from denoising_vit.denoiser.denoised_vit import DenoisedViT

    found = find_denoiser(cleaners.denoiser, backbone)
    return DenoisedViT(backbone, found.denoiser), {"denoiser": found.digest}


def _distilled(backbone: Backbone, cleaners: Cleaners) -> tuple[Extractor, dict[str, str]]:
    from denoising_vit.backbones.loading import distilled_backbone
    from denoising_vit.files import file_digest

    extractor, path = distilled_backbone(backbone, cleaners.distilled)
    return extractor, {"distilled": file_digest(path)}


def _project(backbone: Backbone, cleaners: Cleaners) -> tuple[Extractor, dict[str, str]]:
    from denoising_vit.denoiser.denoised_vit import DenoisedViT
    from denoising_vit.training_free import Subspace, find_subspace

    given = cleaners.subspace
    subspace = find_subspace(backbone) if given is None else given
    subspace = subspace if isinstance(subspace, Subspace) else Subspace.load(subspace)
    return DenoisedViT(backbone, subspace), {"subspace": subspace.digest}


def _average(backbone: Backbone, _cleaners: Cleaners) -> tuple[Extractor, dict[str, str]]:
    from denoising_vit.training_free import AveragedViT

    extractor = AveragedViT(backbone)
    return extractor, {"passes": str(extractor.passes)}


def _registers(backbone: Backbone, cleaners: Cleaners) -> tuple[Extractor, dict[str, str]]:
    from denoising_vit.training_free import Registers, with_registers

    if cleaners.registers is None:
        raise PlanError(
            "registers needs the register neurons of the backbone: find them on a few photos with dvit prepare or "
            "find_registers(backbone, photos).save(FILE), and give --registers FILE"
        )
    given = cleaners.registers
    registers = given if isinstance(given, Registers) else Registers.load(given)
    return with_registers(backbone, registers), {"registers": registers.digest}


#: All kinds of features, by name.
KINDS: dict[str, FeatureKind] = {
    kind.name: kind
    for kind in (
        FeatureKind("raw", "the backbone's own", _raw, cleans=False),
        FeatureKind("subtract", "minus the artifact G, one pass", _subtract, uses="artifact"),
        FeatureKind("exact", "stage 1, fitted to each image", None, uses="artifact", one_pass=False),
        FeatureKind("denoiser", "stage 2, one pass", _denoiser, uses="denoiser"),
        FeatureKind("distilled", "stage 3, a ViT trained to give clean features", _distilled, uses="distilled"),
        FeatureKind("project", "without positional directions, no training, one pass", _project, uses="subspace"),
        FeatureKind("average", "mean of 5 shifted and mirrored passes, no training", _average, one_pass=False),
        FeatureKind("registers", "test-time registers of --registers, no training", _registers, uses="registers"),
    )
}


def features_help(kinds: Iterable[FeatureKind] | None = None) -> str:
    """Names and summaries of kinds of features, for ``--help``; defaults to all kinds."""
    return ", ".join(f"{kind.name} ({kind.summary})" for kind in (KINDS.values() if kinds is None else kinds))


def features_arg(more: str = "") -> Any:
    """Annotation with the help of ``--features``."""
    return tyro.conf.arg(help=f"names separated by commas: {features_help()}. {more}".strip())


def parse_names(names: str | Sequence[str], known: Iterable[str], of: str = "features") -> tuple[str, ...]:
    """Parse names, given as a sequence or separated by commas, keeping their order; ``of`` is what they name.

    Raises:
        PlanError: if a name is unknown or repeated, or there is none.
    """
    given = tuple(name.strip() for name in (names.split(",") if isinstance(names, str) else names))
    choices = f"choose from {', '.join(known)}"
    if unknown := [name for name in given if name not in known]:
        raise PlanError(f"unknown {of}: {', '.join(map(repr, unknown))}; {choices}")
    if not given or len(set(given)) < len(given):
        got = ", ".join(given) or "none"
        raise PlanError(f"expected one or more different {of}, separated by commas, got {got}; {choices}")
    return given
