"""Published rows: the data that each needs, and the status of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from denoising_vit.denoiser.published import PublishedRow, published_row, published_rows

#: Status of a step: already done, ready, or data are missing.
Status = Literal["done", "ready", "missing"]


@dataclass(frozen=True)
class Benchmark:
    """Evaluation data of the rows."""

    name: str
    task: str
    layout: str  # as named in results
    place: str  # path below the data folder
    needs: tuple[str, ...]  # required files and folders below this path
    source: str
    figures: Mapping[str, str]  # names of the published scores, by metric


VOC = Benchmark(
    name="VOC 2012",
    task="segmentation",
    layout="voc2012",
    place="VOCdevkit/VOC2012",
    needs=("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt"),
    source="VOCtrainval_11-May-2012.tar, http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    figures={"mIoU": "voc_miou", "mAcc": "voc_macc"},
)
ADE = Benchmark(
    name="ADE20K",
    task="segmentation",
    layout="ade20k",
    place="ADEChallengeData2016",
    needs=("images/training", "images/validation", "annotations/training", "annotations/validation"),
    source="ADEChallengeData2016.zip, http://data.csail.mit.edu/places/ADEchallenge/",
    figures={"mIoU": "ade_miou", "mAcc": "ade_macc"},
)
NYU = Benchmark(
    name="NYUv2 depth",
    task="depth",
    layout="nyu",
    place="nyu",
    needs=("nyu_train.txt", "nyu_test.txt"),
    source="https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html, as photos, 16-bit depth and lists of both",
    figures={"RMSE": "nyu_rmse", "AbsRel": "nyu_absrel", "a1": "nyu_a1"},
)


@dataclass(frozen=True)
class TrainingPhotos:
    """Training photos of denoisers and distilled models."""

    places: tuple[str, ...]  # folders below the data folder; the first is required, the others are optional
    source: str
    listed: str | None = None  # list of the photos to use in order, in the data folder; None uses all
    list_source: str = ""

    def lacking(self, data: Path) -> tuple[str, str] | None:
        """Missing data and their source; None if nothing is missing."""
        if not (data / self.places[0]).exists():
            return str(data / self.places[0]), self.source
        if self.listed is not None and not (data / self.listed).is_file():
            return f"the first photos of the list {data / self.listed}", self.list_source
        return None


VOC_PHOTOS = TrainingPhotos(
    ("VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2007/JPEGImages"),
    f"{VOC.source}, and VOCtrainval_06-Nov-2007.tar, http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
    listed="voc_train.txt",
    list_source="data/voc_train.txt of https://github.com/Jiawei-Yang/Denoising-ViT",
)
IMAGENET_PHOTOS = TrainingPhotos(("imagenet/train",), "ILSVRC2012_img_train.tar, https://image-net.org/download.php")


@dataclass(frozen=True)
class Variant:
    """The kind of features of a published variant, and the training photos of its denoiser and distilled model."""

    features: str
    denoiser: TrainingPhotos | None = None
    distilled: TrainingPhotos | None = None


#: Training of each of `VARIANTS`. Models were distilled on ImageNet-1k, whatever the denoiser was trained on.
VARIANTS_MADE: Mapping[str, Variant] = {
    "baseline": Variant("raw"),
    "voc_denoised": Variant("denoiser", VOC_PHOTOS),
    "voc_distilled": Variant("distilled", VOC_PHOTOS, IMAGENET_PHOTOS),
    "imgnet_denoised": Variant("denoiser", IMAGENET_PHOTOS),
    "imgnet_distilled": Variant("distilled", IMAGENET_PHOTOS, IMAGENET_PHOTOS),
}


@dataclass(frozen=True)
class Step:
    """One benchmark of one row."""

    benchmark: Benchmark
    status: Status
    why: str = ""  # missing data and their source


@dataclass(frozen=True)
class Row:
    """A published row, and one step per benchmark with published scores."""

    published: PublishedRow
    steps: tuple[Step, ...]

    @property
    def status(self) -> str:
        """Status of all steps, for tables."""
        return ", ".join(f"{step.benchmark.name} {step.status}" for step in self.steps)


def list_rows(data: Path, lines: Sequence[dict[str, Any]] = ()) -> list[Row]:
    """Every published row with the status of its steps."""
    return [_row(row, data, lines) for row in published_rows()]


def find_row(model: str, variant: str, data: Path, lines: Sequence[dict[str, Any]] = ()) -> Row:
    """One row with the status of its steps.

    Raises:
        EvaluationError: if nothing was published for this model and variant; the message lists the published ones.
    """
    return _row(published_row(model, variant), data, lines)


def _row(row: PublishedRow, data: Path, lines: Sequence[dict[str, Any]]) -> Row:
    benchmarks = [one for one in (VOC, ADE, NYU) if any(row.figures[key] is not None for key in one.figures.values())]
    return Row(row, tuple(_step(row, benchmark, data, lines) for benchmark in benchmarks))


def _step(row: PublishedRow, benchmark: Benchmark, data: Path, lines: Sequence[dict[str, Any]]) -> Step:
    measured = {"model": row.model, "variant": row.variant}
    good = (line for line in lines if line.get("published") == measured and not line.get("failed"))
    if any(line["settings"]["data"]["layout"] == benchmark.layout for line in good):
        return Step(benchmark, "done")
    where = data / benchmark.place
    if lacking := [name for name in benchmark.needs if not (where / name).exists()]:
        return Step(benchmark, "missing", f"{where} lacks {', '.join(lacking)}; source: {benchmark.source}")
    made = VARIANTS_MADE[row.variant]
    for what, photos in (("denoiser is trained", made.denoiser), ("model is distilled", made.distilled)):
        if photos is not None and (needed := photos.lacking(data)) is not None:
            return Step(benchmark, "missing", f"the {what} on {needed[0]}, which is missing; source: {needed[1]}")
    return Step(benchmark, "ready")
