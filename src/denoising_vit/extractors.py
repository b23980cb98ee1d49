"""Extractors by name: raw features of a backbone, or clean features in one forward pass.

Imports neither torch nor timm before an extractor is made: the command line reads its options from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from denoising_vit.errors import PlanError, WeightsError

if TYPE_CHECKING:
    from denoising_vit.backbones import Backbone
    from denoising_vit.denoiser.denoised_vit import DenoisedViT

ExtractorName = Literal["raw", "subtract", "denoiser", "distilled"]

#: All features that can be named: those of extractors, and exact, which stage 1 fits to each image.
FEATURES = ("raw", "subtract", "exact", "denoiser", "distilled")


@dataclass(frozen=True)
class Cleaners:
    """Where named extractors take what cleans features from.

    Attributes:
        artifact: G of the backbone, for subtract: a file of `dvit calibrate`; the one that comes with the package where
            none is given.
        denoiser: of the backbone, as `load_denoiser` takes it; the one that comes with the package where none is given.
        distilled: the weights that `dvit distill` wrote, for distilled.
    """

    artifact: str | None = None
    denoiser: str | None = None
    distilled: str | None = None

    def extractor(self, name: str, backbone: Backbone) -> tuple[Backbone | DenoisedViT, dict[str, str]]:
        """The extractor of that name, images (B, 3, H, W) -> features (B, h, w, C), and what identifies its cleaner.

        Raises:
            PlanError: if there is no such name.
            ArtifactError, DenoiserError: if the cleaner is that of another backbone, or none comes with the package.
            WeightsError: if weights are missing or those of another model.
            FormatError: if a file is missing, damaged or something else.
        """
        from denoising_vit.artifact import SHIPPED, artifact_digest, load_artifact
        from denoising_vit.denoiser import find_denoiser
        from denoising_vit.denoiser.denoised_vit import DenoisedViT

        if name == "raw":
            return backbone, {}
        if name == "subtract":
            artifact = load_artifact(self.artifact or SHIPPED, backbone)
            return DenoisedViT(backbone, artifact), {"artifact": str(artifact_digest(artifact.values))}
        if name == "denoiser":
            found = find_denoiser(self.denoiser, backbone)
            return DenoisedViT(backbone, found.denoiser), {"denoiser": found.digest}
        if name == "distilled":
            model, digest = load_distilled(self.distilled, backbone)
            return model, {"distilled": digest}
        raise PlanError(f"no extractor named {name!r}; there are {', '.join(get_args(ExtractorName))}")


def parse_names(names: str | Sequence[str], known: Sequence[str], of: str = "features") -> tuple[str, ...]:
    """Names, in order.

    Args:
        names: in one text, separated by commas, or one by one.
        known: the names there are.
        of: what they are the names of.

    Raises:
        PlanError: if one is unknown or comes twice, or there are none.
    """
    given = tuple(name.strip() for name in (names.split(",") if isinstance(names, str) else names))
    unknown = [name for name in given if name not in known]
    if unknown or not given or len(set(given)) < len(given):
        wrong = f"unknown: {', '.join(map(repr, unknown))}" if unknown else f"got {', '.join(given) or 'none'}"
        raise PlanError(f"{of} must be different ones of {', '.join(known)}, separated by commas; {wrong}")
    return given


def load_distilled(weights: str | Path | None, backbone: Backbone) -> tuple[Backbone, str]:
    """A backbone with its weights after stage 3, and the SHA-256 of their file.

    Raises:
        WeightsError: if no file is given, it is not there, or it holds weights of another model.
    """
    from denoising_vit.backbones.loading import with_weights
    from denoising_vit.files import file_digest

    if weights is None:
        raise WeightsError(
            "distilled features need the weights that dvit distill wrote: --distilled RUN/distilled.safetensors"
        )
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected the distilled.safetensors of a run of dvit distill")
    return with_weights(backbone, path), file_digest(path)
