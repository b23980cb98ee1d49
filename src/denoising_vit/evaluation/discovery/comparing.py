"""Object discovery by several sources of features, each against the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import JudgedData, SplitData
from denoising_vit.evaluation.discovery.images import BoxedImage
from denoising_vit.evaluation.discovery.layouts import DAVIS
from denoising_vit.evaluation.discovery.localising import Localised, localise
from denoising_vit.evaluation.discovery.options import DiscoveryOptions
from denoising_vit.evaluation.workbench import Line, Workbench


def discovery(bench: Workbench, names: Sequence[str], options: DiscoveryOptions) -> Iterator[Line]:
    """Object discovery by each source, the first one being what others are held against.

    Intervals of differences are over sequences, whose frames are nearly alike.

    Args:
        bench: with images that have boxes, and what sources are made from.
        names: of the sources.
        options: how objects are found.

    Yields:
        Lines of results, as :meth:`Workbench.compare` does.

    Raises:
        PlanError: if an option is out of range.
        SizeError: if the size does not fit the patch grid.
        EvaluationError: if the data have no boxes, or a name is unknown.
    """
    options.validate()
    data = _boxed(bench.data)

    yield from bench.measure(
        names,
        lambda source, advance: localise(source, data, options, cache=bench.cache, progress=advance),
        options,
        task="discovery",
        looks="images",
        count=len(data.val.images),
        outcome=Localised,
        over="sequences" if data.layout == DAVIS else "images",
    )


def _boxed(data: JudgedData) -> SplitData[BoxedImage]:
    if not isinstance(data, SplitData) or not all(isinstance(image, BoxedImage) for image in data.val.images):
        raise EvaluationError(f"{data.name}: expected photos with boxes around their objects, got {data.layout}")
    return data
