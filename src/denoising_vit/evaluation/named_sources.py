"""Sources of features by their names: how each is made when its turn comes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import JudgedData
from denoising_vit.evaluation.features import Shown
from denoising_vit.evaluation.fields import fitted_fields
from denoising_vit.evaluation.sources import ExtractorSource, FeatureSource
from denoising_vit.extractors import KINDS, Cleaners, Extractor
from denoising_vit.progress import Progress

#: Mean and deviation of images, where they are not to be the backbone's own.
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class NamedSources:
    """What sources are made from.

    Attributes:
        data: what is judged.
        backbone: whose features are judged.
        spec: the same in words.
        folder: for the fields of stage 1.
        exact: options of stage 1.
        cleaners: what cleans the features.
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
    cleaners: Cleaners
    extractors: Mapping[str, Extractor]
    watch: Progress
    normalisation: Normalisation | None = None
    crops: Mapping[str, Sequence[Shown]] | None = None
    beyond: bool = False

    def makers(self, names: Sequence[str]) -> dict[str, Callable[[], FeatureSource]]:
        """What makes each source, in order.

        Raises:
            EvaluationError: if a name is unknown, or an extractor has the name of a source that is always there.
        """
        makers: dict[str, Callable[[], FeatureSource]] = {
            kind.name: self._fields if kind.per_image else functools.partial(self._named, kind.name)
            for kind in KINDS.values()
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

    def _named(self, name: str) -> FeatureSource:
        return self._extractor(name, *self.cleaners.extractor(name, self.backbone))

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
                artifact=self.cleaners.artifact,
                crops=self.crops,
                on_fitted=fitted,
            )
        if self.beyond:
            source.identity = source.identity | {"of": "image"}
        return source
