"""Sources of features by their names: how each is made when its turn comes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from denoising_vit.artifact import SHIPPED, artifact_digest, load_artifact
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.loading import with_weights
from denoising_vit.denoised import DenoisedViT
from denoising_vit.denoiser import find_denoiser
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.fields import fitted_fields
from denoising_vit.evaluation.judged import JudgedData
from denoising_vit.evaluation.seeing import Shown
from denoising_vit.evaluation.sources import Extractor, ExtractorSource, FeatureSource
from denoising_vit.evaluation.watching import Watch
from denoising_vit.options import DenoiseOptions
from denoising_vit.tensor_files import file_digest

#: Names of the sources that are always there.
SOURCES = ("raw", "subtract", "exact", "denoiser", "distilled")

#: Mean and deviation of images, where they are not to be the backbone's own.
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


def parse_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of sources, in order.

    Args:
        names: in one text, separated by commas, or one by one.

    Raises:
        EvaluationError: if one is unknown or comes twice, or there are none.
    """
    given = tuple(name.strip() for name in (names.split(",") if isinstance(names, str) else names))
    unknown = [name for name in given if name not in SOURCES]
    if unknown or not given or len(set(given)) < len(given):
        wrong = f"unknown: {', '.join(map(repr, unknown))}" if unknown else f"got {', '.join(given) or 'none'}"
        raise EvaluationError(f"features must be different ones of {', '.join(SOURCES)}, separated by commas; {wrong}")
    return given


@dataclass(frozen=True, eq=False)
class NamedSources:
    """What sources are made from.

    Attributes:
        data: what is judged.
        backbone: whose features are judged.
        spec: the same in words.
        folder: for the fields of stage 1.
        exact: options of stage 1.
        artifact: G of the backbone where one is given: a file, or ``shipped``.
        denoiser: of the backbone, as `load_denoiser` takes it; the one that comes with the package where none is given.
        distilled: file of the backbone's weights after stage 3, where such features are judged.
        extractors: further sources by name.
        watch: shows progress.
        normalisation: of images, ImageNet's for every model; None for the backbone's own.
        crops: by split, what is shown of each image, where stage 1 is to fit each crop as an image of its own.
        beyond: whether crops are judged and stage 1 has seen the images beyond them.
    """

    data: JudgedData
    backbone: Backbone
    spec: BackboneSpec
    folder: Path
    exact: DenoiseOptions
    artifact: str | None
    denoiser: str | None
    distilled: str | None
    extractors: Mapping[str, Extractor]
    watch: Watch
    normalisation: Normalisation | None = None
    crops: Mapping[str, Sequence[Shown]] | None = None
    beyond: bool = False

    def makers(self, names: Sequence[str]) -> dict[str, Callable[[], FeatureSource]]:
        """What makes each source, in order.

        Raises:
            EvaluationError: if a name is unknown, or an extractor has the name of a source that is always there.
        """
        makers: dict[str, Callable[[], FeatureSource]] = {
            "raw": functools.partial(self._extractor, "raw", self.backbone, {}),
            "subtract": self._subtract,
            "exact": self._fields,
            "denoiser": self._denoiser,
            "distilled": self._distilled,
        }
        if taken := makers.keys() & self.extractors.keys():
            raise EvaluationError(f"extractors need names of their own; {', '.join(sorted(taken))} is there already")
        for name, extractor in self.extractors.items():
            makers[name] = functools.partial(self._extractor, name, extractor, {"extractor": name})
        if unknown := [name for name in names if name not in makers]:
            raise EvaluationError(f"no features named {', '.join(unknown)}; there are {', '.join(makers)}")
        return {name: makers[name] for name in names}

    def _extractor(self, name: str, extractor: Extractor, identity: dict[str, Any]) -> FeatureSource:
        shown = {} if self.normalisation is None else {"normalisation": "imagenet"}
        return ExtractorSource(name, self.backbone, extractor, identity | shown, self.normalisation)

    def _subtract(self) -> FeatureSource:
        artifact = load_artifact(self.artifact or SHIPPED, self.backbone)
        clean = DenoisedViT(self.backbone, artifact)
        return self._extractor("subtract", clean, {"artifact": artifact_digest(artifact.values)})

    def _denoiser(self) -> FeatureSource:
        found = find_denoiser(self.denoiser, self.backbone)
        clean = DenoisedViT(self.backbone, found.denoiser)
        return self._extractor("denoiser", clean, {"denoiser": found.digest})

    def _distilled(self) -> FeatureSource:
        model, digest = load_distilled(self.distilled, self.backbone)
        return self._extractor("distilled", model, {"distilled": digest})

    def _fields(self) -> FeatureSource:
        if self.exact.method != "exact":
            raise EvaluationError(f"stage 1 of a data set is done by the exact method, got {self.exact.method!r}")
        with contextlib.ExitStack() as shown:
            advance: dict[str, Callable[[], None]] = {}

            def fitted(split: str, done: int, total: int) -> None:
                first = split not in advance
                if first:
                    shown.close()  # one bar at a time
                    advance[split] = shown.enter_context(self.watch(f"exact: {split} images fitted", total))
                for _ in range(done if first else 1):
                    advance[split]()

            source = fitted_fields(
                "exact",
                self.data,
                self.folder,
                self.backbone,
                self.spec,
                replace(self.exact, held_out=0),  # nobody looks at held-out views
                artifact=self.artifact,
                crops=self.crops,
                on_fitted=fitted,
            )
        if self.beyond:
            source.identity = source.identity | {"of": "image"}
        return source


def load_distilled(weights: str | Path | None, backbone: Backbone) -> tuple[Backbone, str]:
    """A backbone with its weights after stage 3, and the SHA-256 of their file.

    Raises:
        EvaluationError: if no file is given, or it is not there.
        WeightsError: if it holds weights of another model.
    """
    if weights is None:
        raise EvaluationError(
            "distilled features need the weights that dvit distill wrote: --distilled RUN/distilled.safetensors"
        )
    path = Path(weights).expanduser()
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file; expected the distilled.safetensors of a run of dvit distill")
    return with_weights(backbone, path), file_digest(path)
