"""How much of a known artifact each method removes: planted on a real backbone, not known to the methods.

    PYTHONPATH=recipes python benchmarks/planted.py PHOTOS [--share 0.1 0.2] [--labelled DIR] [--out DIR]

A fixed pattern (checkerboard, stripes and a ramp, each along its own direction) with a share of the features'
variance is added to the output for every image, and tokens of the flattest patches get a very large norm. What is left
of the pattern is its squared coefficient in a method's output for the planted features, relative to the
features without it, averaged over photos; what is left of the outliers is the squared distance to unplanted features
at their patches, relative to that of raw ones. Stage 2 is trained on planted features by the recipe of the shipped
denoiser, on photos other than those it is evaluated on. With labelled images (`recipes/labelled.py`), methods are also
scored by nearest neighbours, next to the unplanted backbone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import probes
import torch
import tyro
from measuring import hardware, some_photos, table, write
from scenes import Scene
from stage_two import Training, apply, blank_features, train
from targets import fit, indices, plans
from torch import Tensor, nn
from torch.nn import functional

import denoising_vit as dv
from denoising_vit.artifact import Artifact
from denoising_vit.backbones import Backbone, BackboneSpec

#: Share of tokens that are outliers, and their norm relative to the median.
OUTLIERS, NORM = 0.015, 5.0


Method = Callable[[np.ndarray], Tensor]


class Planted(nn.Module):
    """A backbone with a known pattern and outlier tokens: (B, 3, H, W) -> (B, C, h, w)."""

    def __init__(self, backbone: Backbone, share: float, outliers: bool, variance: float) -> None:
        super().__init__()
        self.backbone, self.outliers = backbone, outliers
        self.amplitude = (share * variance * backbone.embed_dim) ** 0.5
        chance = torch.Generator().manual_seed(0)
        self.directions = functional.normalize(torch.randn(4, backbone.embed_dim, generator=chance), dim=-1)

    def pattern(self, h: int, w: int) -> Tensor:
        """The pattern added to the features of every image, (h, w, C), with mean zero over positions."""
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        board = ((rows + columns) % 2).float()
        stripes = (columns // 2 % 2).float()
        ramp = rows / (h - 1) + columns / (w - 1)
        parts = torch.stack([board, stripes, ramp])
        parts = parts - parts.mean((1, 2), keepdim=True)
        parts = parts / parts.square().mean((1, 2), keepdim=True).sqrt()
        return self.amplitude / 3**0.5 * torch.einsum("khw,kc->hwc", parts, self.directions[:3])

    def flat(self, image: Tensor) -> Tensor:
        """Whether a patch is among the flattest, (B, h, w)."""
        patch = self.backbone.patch_size
        mean, square = (functional.avg_pool2d(part, patch).mean(1) for part in (image.float(), image.float().square()))
        contrast = (square - mean.square()).flatten(1)
        bound = contrast.quantile(OUTLIERS, dim=1, keepdim=True)
        return (contrast <= bound).unflatten(1, square.shape[1:])

    def forward(self, image: Tensor) -> Tensor:
        """Features with both artifacts."""
        features = self.backbone(image)
        if self.outliers:
            norm = features.norm(dim=-1).median()
            features = torch.where(self.flat(image)[..., None], NORM * norm * self.directions[3], features)
        return (features + self.pattern(*features.shape[1:3])).permute(0, 3, 1, 2)


def main(
    folder: tyro.conf.Positional[Path],
    /,
    share: tuple[float, ...] = (0.1, 0.2),
    photos: int = 8,
    calibration: int = 24,
    training: int = 96,
    size: int = 336,
    steps: int = 400,
    labelled: Path | None = None,
    most: int = 60,
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    out: Annotated[Path | None, tyro.conf.arg(name="out")] = None,
) -> None:
    """Plants artifacts and measures what is left of them.

    Args:
        folder: photographs.
        share: energy of the pattern relative to the variance of the features.
        photos: number of photos that methods are evaluated on.
        calibration: number of photos that G is calibrated on.
        training: number of photos that the denoiser is trained on.
        size: height and width of views in pixels.
        steps: optimizer steps of the denoiser; 0 leaves stage 2 out.
        labelled: folder of `recipes/labelled.py`, for nearest neighbours.
        most: number of images per labelled set.
        model: the backbone.
        out: folder for the record.
    """
    clean = model.load()
    data = some_photos(folder, photos + max(calibration, training))
    pixels = [data.read(index) for index in range(len(data))]
    judged, others = pixels[:photos], pixels[photos:]
    spread = torch.stack([dv.denoise_image(clean, photo, method="subtract", size=size).raw for photo in judged])
    variance = float(spread.flatten(0, 2).var(0).mean())
    found: dict[str, Any] = {"hardware": hardware(), "backbone": clean.extra_repr(), "size": size, "rows": []}
    sets: dict[str, probes.Labelled] = {}
    if labelled is not None:
        sets = probes.load(labelled, clean.grid_size(size, size), torch.device("cpu"), most)
    for amount, outliers in [*((amount, False) for amount in share), (share[0], True)]:
        planted = Planted(clean, amount, outliers, variance)
        wrapped = dv.load_backbone(
            planted,
            patch_size=clean.patch_size,
            mean=(clean.mean[0], clean.mean[1], clean.mean[2]),
            std=(clean.std[0], clean.std[1], clean.std[2]),
            default_size=size,
        )
        calibrated = dv.calibrate(wrapped, others[:calibration], views=16, size=size)
        denoiser = denoiser_of(wrapped, others[:training], calibrated, size, steps) if steps else None
        plain: dict[str, Method] = {"unplanted raw": lambda photo: once(clean, photo, size).raw} if sets else {}
        for name, method in (plain | methods(wrapped, calibrated, denoiser)).items():
            row = {"share": amount, "outliers": outliers, "method": name, **left(planted, method, judged, size)}
            row["neighbours"] = neighbours(sets, method)
            print(row, flush=True)
            found["rows"].append(row)
            write(out, "planted", found, markdown(found["rows"]))


def methods(backbone: Backbone, known: Artifact, denoiser: nn.Module | None) -> dict[str, Method]:
    """Functions that give clean features (h, w, C) of a photo, by method."""

    def exact(photo: np.ndarray, views: int, artifact: Artifact | None) -> Tensor:
        return dv.denoise_image(backbone, photo, views=views, held_out=0, artifact=artifact).semantic

    found: dict[str, Method] = {
        "raw": lambda photo: once(backbone, photo).raw,
        "raw minus G": lambda photo: once(backbone, photo, artifact=known).semantic,
        "stage 1, 64 crops": lambda photo: exact(photo, 64, None),
        "stage 1, 16 crops, G known": lambda photo: exact(photo, 16, known),
    }
    if denoiser is not None:
        found["stage 2"] = lambda photo: denoiser(once(backbone, photo).raw[None])[0]
    return found


def once(backbone: Backbone, photo: np.ndarray, size: int | None = None, artifact: Any = "none") -> dv.Decomposition:
    """One forward pass over the whole photo, minus an artifact."""
    return dv.denoise_image(backbone, photo, method="subtract", size=size, artifact=artifact)


@torch.no_grad()
def neighbours(sets: dict[str, probes.Labelled], method: Method) -> dict[str, float]:
    """MIoU in percent of nearest neighbours, by set; none without labelled images."""
    found = {}
    for name, part in sets.items():
        if name in probes.SCORED:
            features = torch.stack([method(image.permute(1, 2, 0).numpy()) for image in part.images])
            clean = functional.normalize(features.float(), dim=-1)
            found[name] = probes.neighbours(part, clean, probes.SCORED[name])
    return found


def denoiser_of(backbone: Backbone, photos: list[np.ndarray], known: Artifact, size: int, steps: int) -> nn.Module:
    """Stage 2 by the recipe of the shipped denoiser, at a small size: targets with a known G."""
    tensors = [torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous() for photo in photos]
    scenes = [Scene(n, (0, 0, image.shape[2], image.shape[1]), n % 2 == 1) for n, image in enumerate(tensors)]
    made = plans(backbone, (size, size), 12, (0.4, 1.0), 2)
    pairs = fit(backbone, tensors, scenes, made, known.at(backbone.grid_size(size, size)), 8)
    chosen, _ = indices(pairs, np.array([-1]))
    blanks = blank_features(backbone, (size, size), 48, 1, 8)
    options = Training(steps=steps, batch=8, blank=0.25, average=0.98, subtract=True)
    shown = (size, size)
    trained = train(backbone, {shown: pairs}, {shown: chosen}, {shown: blanks}, options, lambda step, loss: None)
    return _Applied(trained)


class _Applied(nn.Module):
    """A denoiser as the recipe applies it, (N, h, w, C) float32."""

    def __init__(self, denoiser: dv.Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, raw: Tensor) -> Tensor:
        """Clean features."""
        return apply(self.denoiser, raw.half()).float()


@torch.no_grad()
def left(planted: Planted, method: Method, photos: list[np.ndarray], size: int) -> dict[str, float]:
    """Fractions of the pattern's and the outliers' energy that are left, and the cosine to unplanted raw features."""
    drift, cosine, beyond, planted_energy = 0.0, 0.0, 0.0, 0.0
    for photo in photos:
        plain = dv.denoise_image(planted.backbone, photo, method="subtract", size=size)
        made = method(photo)
        pattern = planted.pattern(*made.shape[:2])
        change = made - plain.raw
        drift += float((change * pattern).sum() / pattern.square().sum()) / len(photos)
        cosine += float(functional.cosine_similarity(made, plain.raw, dim=-1).mean()) / len(photos)
        if planted.outliers:
            norm = plain.raw.norm(dim=-1).median()
            where = planted.flat(shown(planted.backbone, photo, size))[0]
            centred = change - change[~where].mean(0)
            beyond += float(centred[where].square().sum())
            planted_energy += float((NORM * norm * planted.directions[3] - plain.raw[where]).square().sum())
    figures = {"pattern_left": drift**2, "cosine": cosine}
    return figures | ({"outliers_left": beyond / planted_energy} if planted.outliers else {})


def shown(backbone: Backbone, photo: np.ndarray, size: int) -> Tensor:
    """The whole photo as input of the backbone, (1, 3, H, W)."""
    from denoising_vit.views.plan import ViewPlan
    from denoising_vit.views.rendering import ViewRenderer, to_image

    plan = ViewPlan.make(1, size=(size, size), patch_size=backbone.patch_size)
    return ViewRenderer(to_image(photo), plan, backbone.mean, backbone.std)(slice(0, 1))


def markdown(rows: list[dict[str, Any]]) -> str:
    """One row per artifact and method."""
    head = [
        "pattern, share of variance",
        "outliers",
        "features",
        "pattern left",
        "outliers left",
        "cosine to unplanted",
    ]
    return table(
        [*head, *(f"{name} neighbours, mIoU" for name in rows[0]["neighbours"])],
        [
            [
                f"{row['share']:.0%}",
                "1.5 %" if row["outliers"] else "-",
                row["method"],
                f"{row['pattern_left']:.3%}",
                f"{row['outliers_left']:.3f}" if "outliers_left" in row else "-",
                f"{row['cosine']:.3f}",
                *(f"{score:.1f}" for score in row["neighbours"].values()),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    tyro.cli(main)
