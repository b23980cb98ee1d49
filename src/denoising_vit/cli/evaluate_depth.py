"""``dvit evaluate depth``: depth estimation with a linear probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.comparison import EvaluateOptions, compare_sources
from denoising_vit.evaluation import depth as evaluation
from denoising_vit.evaluation.options import FieldOptions

if TYPE_CHECKING:
    from denoising_vit.evaluation.workbench import Line, Workbench


def depth(
    judged: tyro.conf.OmitArgPrefixes[EvaluateOptions],
    depth_scale: float = 1000.0,
    blocks: int = 5,
    training: tyro.conf.OmitArgPrefixes[evaluation.DepthOptions] = evaluation.DepthOptions(),  # noqa: B008, frozen
    exact: FieldOptions = FieldOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Depth estimation with a linear probe on frozen features and class token, evaluated at every pixel.

    Data: NYUv2 as published (nyu_train.txt, nyu_test.txt), or rgb/ and depth/ with 16-bit PNGs of the same names, in
    the folder itself or in train/ and val/.

    Args:
        judged: features, data and results.
        depth_scale: units of the depth maps in a metre; 1000 for millimetres.
        blocks: for data without splits, number of blocks of consecutive photos to evaluate in turn.
        training: options of the probe.
        exact: options of stage 1, for exact features.
        model: the backbone and its options.
        json: print the lines of results instead of a table.
    """
    training.protocol()

    def opened(progress: Callable[[], None]) -> evaluation.DepthData:
        return evaluation.open_depth(
            judged.data, scale=depth_scale, images=judged.images, blocks=blocks, progress=progress
        )

    def compare(bench: Workbench, names: Sequence[str]) -> Iterator[Line]:
        return evaluation.depth(bench, names, training)

    return compare_sources(judged, exact, model, opened, compare, as_json=json)
