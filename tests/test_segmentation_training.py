"""Training and evaluation of linear probes: losses by hand, resumed training, and features of known quality."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import denoising_vit as dv
from denoising_vit.backbones import Backbone
from denoising_vit.errors import EvaluationError, FitError
from denoising_vit.evaluation import probing
from denoising_vit.evaluation.data import EvaluationImage
from denoising_vit.evaluation.features import FeatureCache
from denoising_vit.evaluation.labelled import LabelledData, LabelledImage, open_labelled
from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.patches import centre_pads
from denoising_vit.evaluation.probing import Curve
from denoising_vit.evaluation.scores import Counts, scores
from denoising_vit.evaluation.segmentation import PAPER, QUICK, Protocol, Trained, linear_segmentation
from denoising_vit.evaluation.segmentation.evaluate import LinearProbe, evaluate_probe, windows
from denoising_vit.evaluation.segmentation.samples import KeptFeatures, RandomCrops
from denoising_vit.evaluation.sources import ExtractorSource
from denoising_vit.views.crops import Crop

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CLASSES = 4
COLOURS = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200), (190, 190, 70)])
PATCH = 4

#: The published protocol, smaller and shorter.
TINY = replace(
    PAPER, steps=40, warmup=2, batch=4, learning_rate=0.02, short_side=28, long_side=112, crop=28, window=28,
    window_stride=19,
)  # fmt: skip
FAST = replace(QUICK, steps=60, warmup=2, batch=4, learning_rate=0.02)

Pair = tuple[np.ndarray, np.ndarray]


# --- Data


def stripes(chance: np.random.Generator, height: int, width: int, side: int = 8) -> np.ndarray:
    """A mask of vertical stripes of random classes; neighbours may have the same class."""
    return np.repeat(chance.integers(CLASSES, size=(1, -(-width // side))), side, 1)[:, :width].repeat(height, 0)


def blocks(chance: np.random.Generator, height: int, width: int, side: int = 8) -> np.ndarray:
    classes = chance.integers(CLASSES, size=(-(-height // side), -(-width // side)))
    return classes.repeat(side, 0).repeat(side, 1)[:height, :width]


def photo_of(mask: np.ndarray, chance: np.random.Generator, noise: float = 12) -> np.ndarray:
    """A photo whose colours show the classes, with noise."""
    return (COLOURS[mask % CLASSES] + chance.normal(0, noise, (*mask.shape, 3))).clip(0, 255).astype(np.uint8)


def data_at(root: Path, train_pairs: Sequence[Pair], val_pairs: Sequence[Pair], classes: int = CLASSES) -> LabelledData:
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("".join(f"class {number}\n" for number in range(classes)))
    for split, pairs in (("train", train_pairs), ("val", val_pairs)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number, (photo, mask) in enumerate(pairs):
            Image.fromarray(photo).save(root / split / "images" / f"{number:03}.png")
            Image.fromarray(mask.astype(np.uint8)).save(root / split / "masks" / f"{number:03}.png")
    return open_labelled(root)


def pairs(count: int, sizes: Sequence[tuple[int, int]], seed: int, make: Any = stripes) -> list[Pair]:
    chance = np.random.default_rng(seed)
    masks = [make(chance, *sizes[number % len(sizes)]) for number in range(count)]
    return [(photo_of(mask, chance), mask) for mask in masks]


@pytest.fixture
def even(tmp_path: Path) -> LabelledData:
    """Stripes on images of 32 x 48 pixels."""
    return data_at(tmp_path / "even", pairs(6, [(32, 48)], 0), pairs(4, [(32, 48)], 1))


@pytest.fixture
def mixed(tmp_path: Path) -> LabelledData:
    """Images of several sizes, most of them off the patch grid; a corner of each has no labels."""
    sizes = [(33, 50), (47, 31), (28, 28), (29, 90)]
    train_pairs, val_pairs = pairs(5, sizes, 2), pairs(4, sizes, 3)
    for _, mask in (*train_pairs, *val_pairs):
        mask[:5, :9] = 255
    return data_at(tmp_path / "mixed", train_pairs, val_pairs)


# --- Models


def pooled(image: Tensor, patch: int = PATCH, stride: int | None = None) -> Tensor:
    """The mean colour of each patch: (B, 3, H, W) -> (B, h, w, 3)."""
    return F.avg_pool2d(image, patch, stride or patch).permute(0, 2, 3, 1)


def one_hot(image: Tensor) -> Tensor:
    """The class whose colour is nearest to that of each patch, one-hot."""
    colours = torch.from_numpy(COLOURS).float() / 255
    return (
        F.one_hot(torch.cdist(pooled(image).flatten(1, 2), colours).argmin(-1), CLASSES)
        .float()
        .unflatten(1, (image.shape[2] // PATCH, image.shape[3] // PATCH))
    )


def noisy(image: Tensor) -> Tensor:
    """The same colours with noise that any change of the image changes."""
    colours = pooled(image)
    return colours + 2 * (torch.frac(colours * 1e4) - 0.5)


def places(image: Tensor) -> Tensor:
    """Positions of patches, from -1 to 1, independent of the content."""
    h, w = image.shape[2] // PATCH, image.shape[3] // PATCH
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return torch.stack([y, x, y * x], -1).expand(len(image), h, w, 3)


def broken(image: Tensor) -> Tensor:
    return pooled(image) / 0 * 0


def backbone(function: Callable[[Tensor], Tensor] = pooled, patch: int = PATCH, stride: int | None = None) -> Backbone:
    return dv.load_backbone(
        function, patch_size=patch, stride=stride, default_size=5 * patch, mean=(0, 0, 0), std=(1, 1, 1),
        layout="channels_last", device="cpu",
    )  # fmt: skip


def source_of(
    function: Callable[[Tensor], Tensor] = pooled, patch: int = PATCH, stride: int | None = None
) -> ExtractorSource:
    return ExtractorSource(function.__name__, backbone(function, patch, stride))


def grid_of(patch: int, stride: int) -> Callable[[Tensor], Tensor]:
    def colours(image: Tensor) -> Tensor:
        return pooled(image, patch, stride)

    return colours


class Recording(LinearProbe):
    """A probe that records its inputs."""

    def __init__(self, channels: int, classes: int, seed: int) -> None:
        super().__init__(channels, classes, seed)
        self.seen: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        self.seen.append(features.detach().clone())
        return super().forward(features)


class Witness(ExtractorSource):
    """A source that records the requested images and crops, and what it returns."""

    def __init__(self, function: Callable[[Tensor], Tensor], patch: int = PATCH, stride: int | None = None) -> None:
        super().__init__("witness", backbone(function, patch, stride))
        self.asked: list[tuple[EvaluationImage, Crop, Tensor]] = []
        self.lock = threading.Lock()

    def inputs(self, image: EvaluationImage, crop: Crop, colour: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        made = super().inputs(image, crop, colour)
        with self.lock:
            self.asked.append((image, crop, made))
        return made


class Noise:
    """Samples of random tokens with random classes, determined by the step."""

    channels = 5

    def __init__(self) -> None:
        self.steps: list[int] = []

    def loss(self, probe: LinearProbe, step: int) -> Tensor:
        self.steps.append(step)
        generator = torch.Generator().manual_seed(step)
        features = torch.randn(30, self.channels, generator=generator)
        return F.cross_entropy(probe(features), torch.randint(3, (30,), generator=generator))


def first_weight(probe: LinearProbe) -> float:
    return float(probe.classify.weight.detach()[0, 0])


class Stop(Exception):
    pass


def stop_after(steps: int) -> Callable[[], None]:
    left = [steps]

    def progress() -> None:
        left[0] -= 1
        if not left[0]:
            raise Stop

    return progress


def moved_probe(channels: int, classes: int = CLASSES) -> LinearProbe:
    """A probe with large weights, whose scores differ clearly."""
    probe = LinearProbe(channels, classes, seed=5)
    with torch.no_grad():
        probe.classify.weight.mul_(200)
    return probe


def evaluate(
    function: Callable[[Tensor], Tensor],
    data: LabelledData,
    protocol: Protocol = FAST,
    seeds: Sequence[int] = (0,),
    progress: Callable[[], None] = lambda: None,
    **others: Any,
) -> list[Trained]:
    """Train and evaluate; progress is called after each step."""

    @contextlib.contextmanager
    def watch(what: str, _total: int | None) -> Iterator[Callable[[], None]]:
        yield progress if what.endswith("steps") else lambda: None

    return list(linear_segmentation(source_of(function), data, protocol, seeds, progress=watch, **others))


def same(ours: Counts, theirs: Counts) -> bool:
    return all(np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in ("hits", "truth", "predicted"))


def states_equal(ours: nn.Module, theirs: nn.Module) -> bool:
    state = theirs.state_dict()
    return all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


def majority(data: LabelledData) -> float:
    """Percentage of validation pixels with the most common class."""
    return 100 * max(data.val.pixels) / sum(data.val.pixels)


# --- Samples


def test_kept_features_loss_is_pixel_cross_entropy_with_constant_patches(tmp_path: Path) -> None:
    made = pairs(3, [(16, 24), (20, 12)], 4, blocks)
    for number, (_, mask) in enumerate(made):
        mask[: 3 + number, 2:9] = 255
    data = data_at(tmp_path / "data", made, made[:1])
    source = source_of()
    samples = KeptFeatures.take(source, data.train, replace(QUICK, batch=3))
    probe = moved_probe(3)
    found = float(samples.loss(probe, 0).detach())

    features = [
        pooled(source.inputs(image, Crop.whole((image.height, image.width)))[None])[0] for image in data.train.images
    ]
    tokens = torch.cat([one.flatten(0, 1) for one in features])
    predicted = F.batch_norm(tokens, None, None, training=True) @ probe.classify.weight.T + probe.classify.bias
    total, count = 0.0, 0
    for image, part in zip(
        data.train.images, predicted.split([one.shape[0] * one.shape[1] for one in features]), strict=True
    ):
        wide = part.view(image.height // PATCH, image.width // PATCH, CLASSES)
        wide = wide.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        labels = image.labels()
        assert (labels == NO_LABEL).any()
        total += float(
            F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum").detach()
        )
        count += labels.numel()
    assert found == pytest.approx(total / count, rel=2e-3)  # features are kept in half precision
    labelled = sum(int((image.labels() != NO_LABEL).sum()) for image in data.train.images)
    assert found != pytest.approx(total / labelled, rel=2e-2)


def test_kept_features_loss_ignores_unlabelled_pixels(tmp_path: Path) -> None:
    photo, mask = pairs(1, [(16, 16)], 4)[0]
    data = data_at(tmp_path / "data", [(photo, np.where(mask >= 0, 255, 0))], [(photo, mask)])
    loss = KeptFeatures.take(source_of(), data.train, QUICK).loss(moved_probe(3), 0)
    assert float(loss.detach()) == 0


def numbered(images: int, seed: int, batch: int) -> KeptFeatures:
    """Images of 2 x 2 patches whose only feature is the index of the image."""
    features = [torch.full((2, 2, 1), float(number)) for number in range(images)]
    counts = [torch.ones(2, 2, 4, dtype=torch.int64) for _ in range(images)]
    return KeptFeatures(features, counts, batch, CPU, seed)


def order_of(samples: KeptFeatures, steps: int) -> list[int]:
    probe = Recording(1, 3, 0)
    for step in range(steps):
        samples.loss(probe, step)
    return [int(number) for features in probe.seen for number in features[::4, 0]]


def test_each_epoch_has_every_image_once_in_a_new_order() -> None:
    order = order_of(numbered(7, 3, batch=4), 7)  # 28 images: four epochs
    epochs = [tuple(order[start : start + 7]) for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 4


def test_seed_determines_the_order() -> None:
    first, again, other = (order_of(numbered(7, seed, batch=3), 5) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_step_is_independent_of_earlier_steps() -> None:
    order = order_of(numbered(5, 0, batch=2), 6)
    probe = Recording(1, 3, 0)
    numbered(5, 0, batch=2).loss(probe, 5)
    assert probe.seen[0][::4, 0].tolist() == order[10:]


def crops_of(
    source: Witness, data: LabelledData, seed: int, steps: Sequence[int], protocol: Protocol = TINY
) -> list[float]:
    probe = moved_probe(3)
    with RandomCrops(source, data.train, protocol, seed) as samples:
        assert samples.channels == 3
        source.asked.clear()
        return [float(samples.loss(probe, step).detach()) for step in steps]


def drawn(source: Witness) -> list[tuple[str, Crop]]:
    """The requested crops, sorted because several threads draw them."""
    return sorted(((image.id, crop) for image, crop, _ in source.asked), key=repr)


def test_random_crops_are_reproducible_for_a_seed(mixed: LabelledData) -> None:
    source = Witness(pooled)
    first = crops_of(source, mixed, 1, [0, 1, 2])
    asked = drawn(source)
    assert crops_of(source, mixed, 1, [0, 1, 2]) == first
    assert drawn(source) == asked
    other = crops_of(source, mixed, 2, [0, 1, 2])
    assert drawn(source) != asked
    assert other != first


def test_random_crops_of_a_step_are_independent_of_earlier_steps(mixed: LabelledData) -> None:
    source = Witness(pooled)
    crops_of(source, mixed, 1, [2])
    alone = drawn(source)
    crops_of(source, mixed, 1, [0, 1, 2])
    assert set(alone) <= set(drawn(source))
    assert len(alone) == 4


def test_random_crops_show_every_image_once_in_an_epoch(mixed: LabelledData) -> None:
    source = Witness(pooled)
    crops_of(source, mixed, 0, range(5))  # 20 crops of 5 images
    assert set(Counter(image.id for image, _, _ in source.asked).values()) == {4}
    assert len({crop for _, crop, _ in source.asked}) == 20


def test_a_batch_may_have_more_crops_than_there_are_images(tmp_path: Path) -> None:
    data = data_at(tmp_path / "few", pairs(2, [(32, 48)], 0), pairs(1, [(32, 48)], 1))
    source = Witness(pooled)
    crops_of(source, data, 0, [0], replace(TINY, batch=6))
    assert sorted(Counter(image.id for image, _, _ in source.asked).values()) == [3, 3]
    assert len({crop for _, crop, _ in source.asked}) == 6


@pytest.mark.parametrize("patch", [14, 4, 6])
def test_loss_of_random_crops_is_the_cross_entropy_at_every_pixel(mixed: LabelledData, patch: int) -> None:
    source = Witness(grid_of(patch, patch), patch)
    probe = moved_probe(3)
    with RandomCrops(source, mixed.train, TINY, 7) as samples:
        found = float(samples.loss(probe, 3).detach())
    assert len(source.asked) == 4
    predicted = probe(torch.stack([pooled(inputs[None], patch)[0] for _, _, inputs in source.asked]))
    total = 0.0
    for (image, crop, _), part in zip(source.asked, predicted, strict=True):
        assert isinstance(image, LabelledImage)
        wide = F.interpolate(part.permute(2, 0, 1)[None], crop.padded, mode="bilinear")
        left, top, _, _ = crop.pads
        shown = wide[:, :, top : top + crop.size[0], left : left + crop.size[1]]
        total += float(
            F.cross_entropy(shown, _labels_by_hand(image, crop)[None], ignore_index=NO_LABEL, reduction="sum").detach()
        )
    # The mean is over all 28 x 28 pixels of a crop, including those that show no part of the image.
    assert found == pytest.approx(total / (4 * 28 * 28), rel=1e-4)


def _labels_by_hand(image: LabelledImage, crop: Crop) -> Tensor:
    x0, y0, x1, y1 = crop.box
    rows = ((y0 + (torch.arange(crop.size[0]) + 0.5).double() / crop.size[0] * (y1 - y0)) * image.height).long()
    columns = ((x0 + (torch.arange(crop.size[1]) + 0.5).double() / crop.size[1] * (x1 - x0)) * image.width).long()
    labels = image.labels()[rows][:, columns]
    return labels.flip(1) if crop.flip else labels


def test_colours_are_distorted_only_if_requested(mixed: LabelledData) -> None:
    source = Witness(pooled)
    changed = []
    for wanted in (True, False):
        crops_of(source, mixed, 0, range(3), replace(TINY, distort=wanted))
        plain = [ExtractorSource.inputs(source, image, crop) for image, crop, _ in source.asked]
        pairs_seen = zip(source.asked, plain, strict=True)
        changed.append(sum(not torch.equal(made, usual) for (_, _, made), usual in pairs_seen))
    assert changed[0] >= 8  # expected share: 15 / 16
    assert changed[1] == 0


# --- Training


def train(
    samples: Any, protocol: Protocol, classes: int, seed: int, device: torch.device, **more: Any
) -> tuple[LinearProbe, Curve]:
    probe = LinearProbe(samples.channels, classes, seed).to(device)
    return probe, probing.train(probe, samples.loss, protocol, **more)


def test_the_optimiser_is_adamw_with_the_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.optim.AdamW] = []
    rates: list[float] = []

    class Spy(torch.optim.AdamW):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

        def step(self, *args: Any, **kwargs: Any) -> Any:
            rates.extend(group["lr"] for group in self.param_groups)
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    protocol = replace(PAPER, steps=20, warmup=5)
    probe, _ = train(Noise(), protocol, 3, 0, CPU)
    (optimizer,) = made
    (group,) = optimizer.param_groups
    assert group["betas"] == (0.9, 0.999)
    assert group["weight_decay"] == 1e-4
    assert group["eps"] == 1e-8
    assert not group["amsgrad"]
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in probe.parameters()}
    wanted = [1e-3 * (1 - step / 20) * (1 - max(1 - step / 5, 0) * (1 - 1e-6)) for step in range(20)]
    assert rates == pytest.approx(wanted)


def test_training_matches_a_hand_written_loop() -> None:
    protocol = replace(PAPER, steps=6, warmup=2)
    probe, curve = train(Noise(), protocol, 3, seed=4, device=CPU, looks=3)
    norm, linear = nn.BatchNorm1d(5), nn.Linear(5, 3)
    begun = LinearProbe(5, 3, 4)
    linear.load_state_dict(begun.classify.state_dict())
    model = nn.Sequential(norm, linear)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4)
    losses = []
    for step in range(6):
        optimizer.param_groups[0]["lr"] = protocol.learning_rate_at(step)
        generator = torch.Generator().manual_seed(step)
        features = torch.randn(30, 5, generator=generator)
        loss = F.cross_entropy(model(features), torch.randint(3, (30,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    torch.testing.assert_close(probe.classify.weight, linear.weight)
    torch.testing.assert_close(probe.norm.weight, norm.weight)
    torch.testing.assert_close(probe.norm.running_var, norm.running_var)
    means = [np.mean(losses[start : start + 2]) for start in (0, 2, 4)]
    assert [step for step, _ in curve.losses] == [2, 4, 6]
    assert [loss for _, loss in curve.losses] == pytest.approx(means, rel=1e-5)
    assert not probe.training


def test_evaluations_are_evenly_spaced_in_eval_mode_without_side_effects() -> None:
    protocol = replace(PAPER, steps=11, warmup=0)
    modes = []

    def look(probe: LinearProbe) -> float:
        modes.append(probe.training)
        probe(torch.randn(9, 5) * 100)  # would change the running statistics in training mode
        return float(len(modes))

    looked, curve = train(Noise(), protocol, 3, 0, CPU, look=look, looks=4)
    assert curve.looks == [(3, 1.0), (6, 2.0), (9, 3.0), (11, 4.0)]
    assert modes == [False] * 4
    plain, _ = train(Noise(), protocol, 3, 0, CPU, looks=4)
    assert states_equal(looked, plain)


@pytest.mark.parametrize("stopped", [4, 7, 9])
def test_resumed_training_matches_uninterrupted_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    monkeypatch.setattr(probing, "_CHECKPOINT_EVERY", 3)
    protocol, path = replace(PAPER, steps=11, warmup=2), tmp_path / "deep" / "0.pt"

    def trained(
        checkpoint: Path | None, progress: Callable[[], None] = lambda: None
    ) -> tuple[Noise, LinearProbe, Curve]:
        samples = Noise()
        probe, curve = train(
            samples, protocol, 3, 0, CPU, checkpoint=checkpoint, look=first_weight, looks=5, progress=progress
        )
        return samples, probe, curve

    _, straight, wanted = trained(None)
    with pytest.raises(Stop):
        trained(path, stop_after(stopped))
    samples, probe, curve = trained(path)
    assert samples.steps == list(range(stopped // 3 * 3, 11))
    assert states_equal(probe, straight)
    assert curve == wanted
    assert [file.name for file in path.parent.iterdir()] == ["0.pt"]  # no incomplete file is left
    samples, probe, curve = trained(path)  # again after the run has finished
    assert samples.steps == [9, 10]
    assert states_equal(probe, straight)
    assert curve == wanted


def test_seed_determines_the_training() -> None:
    protocol = replace(PAPER, steps=3, warmup=0)
    first, again, other = (train(Noise(), protocol, 3, seed, CPU)[0] for seed in (0, 0, 1))
    assert states_equal(first, again)
    assert not states_equal(first, other)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other", "shapes"])
def test_damaged_checkpoint_is_named_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(probing, "_CHECKPOINT_EVERY", 2)
    protocol, path = replace(PAPER, steps=5, warmup=0), tmp_path / "0.pt"
    train(Noise(), protocol, 3, 0, CPU, checkpoint=path)
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not a checkpoint")
        case "other":
            torch.save({"step": 3}, path)
        case _:
            train(Noise(), protocol, 4, 0, CPU, checkpoint=(path := tmp_path / "1.pt"))
    with pytest.raises(FitError, match=rf"(?s){path.name}: damaged checkpoint .*delete it") as raised:
        train(Noise(), protocol, 3, 0, CPU, checkpoint=path)
    assert "weights_only" not in str(raised.value)  # torch's advice, which would run any code in the file


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_training(value: float) -> None:
    class Bad(Noise):
        def loss(self, probe: LinearProbe, step: int) -> Tensor:
            return super().loss(probe, step) * (value if step == 2 else 1)

    with pytest.raises(FitError, match=rf"loss is {value} at step 2; try a smaller learning_rate"):
        train(Bad(), replace(PAPER, steps=5, warmup=0), 3, 0, CPU)


# --- Evaluation


def test_released_windows_are_evaluated_with_stretched_scores(even: LabelledData) -> None:
    patch, source = 6, ExtractorSource("colours", backbone(grid_of(6, 6), 6))  # windows of 28 pixels are padded to 30
    probe, image = moved_probe(3).eval(), even.val.images[0]
    protocol = replace(TINY, pads="stretched", short_side=28, long_side=28)  # one window per image
    found = evaluate_probe(probe, source, replace(even.val, images=(image,)), protocol)
    scale = 28 / max(image.height, image.width)
    size = int(image.height * scale + 0.5), int(image.width * scale + 0.5)
    pads = centre_pads(*size, patch, patch)
    shown = F.pad(source.inputs(image, Crop.whole(size)), (pads[0], pads[2], pads[1], pads[3]))
    scores = F.interpolate(probe(pooled(shown[None], patch)).permute(0, 3, 1, 2), size, mode="bilinear")
    wide = F.interpolate(scores, (image.height, image.width), mode="bilinear")
    predicted, truth = wide[0].argmax(0), image.labels()
    for kind in range(CLASSES):
        hits = int(((predicted == kind) & (truth == kind)).sum())
        assert found.hits[0, kind] == pytest.approx(hits, abs=2)


def test_released_crops_stretch_scores_including_pads(mixed: LabelledData) -> None:
    source, probe = Witness(grid_of(6, 6), 6), moved_probe(3)
    with RandomCrops(source, mixed.train, replace(TINY, pads="stretched"), 7) as samples:
        found = float(samples.loss(probe, 3).detach())
    predicted = probe(torch.stack([pooled(inputs[None], 6)[0] for _, _, inputs in source.asked]))
    total = 0.0
    for (image, crop, _), part in zip(source.asked, predicted, strict=True):
        assert isinstance(image, LabelledImage)
        shown = F.interpolate(part.permute(2, 0, 1)[None], (28, 28), mode="bilinear")
        labels = torch.full((28, 28), NO_LABEL)
        labels[: crop.size[0], : crop.size[1]] = _labels_by_hand(image, crop)
        total += float(F.cross_entropy(shown, labels[None], ignore_index=NO_LABEL, reduction="sum").detach())
    assert found == pytest.approx(total / (4 * 28 * 28), rel=1e-4)


def test_scores_of_overlapping_windows_are_averaged(mixed: LabelledData) -> None:
    patch = 6  # windows of 28 pixels are padded to 30
    source = ExtractorSource("colours", backbone(grid_of(patch, patch), patch))
    probe = moved_probe(3).eval()
    found = evaluate_probe(probe, source, mixed.val, TINY)
    for number, image in enumerate(mixed.val.images):
        scale = min(112 / max(image.height, image.width), 28 / min(image.height, image.width))
        height, width = int(image.height * scale + 0.5), int(image.width * scale + 0.5)
        shown = source.inputs(image, Crop.whole((height, width)))
        total, times = torch.zeros(1, CLASSES, height, width), torch.zeros(height, width)
        for top in _starts(height):
            for left in _starts(width):
                window = F.pad(shown[:, top : top + 28, left : left + 28], (1, 1, 1, 1))
                assert window.shape == (3, 30, 30)
                part = probe(pooled(window[None], patch)).permute(0, 3, 1, 2)
                part = F.interpolate(part, (30, 30), mode="bilinear")[:, :, 1:29, 1:29]
                total[:, :, top : top + 28, left : left + 28] += part.detach()
                times[top : top + 28, left : left + 28] += 1
        wide = F.interpolate(total / times, (image.height, image.width), mode="bilinear")
        predicted, truth = wide[0].argmax(0), image.labels()
        known = truth != NO_LABEL
        for kind in range(CLASSES):
            hits = int(((predicted == kind) & (truth == kind)).sum())
            assert found.truth[number, kind] == int((truth == kind).sum())
            assert found.hits[number, kind] == pytest.approx(hits, abs=2)  # border pixels may differ
            assert found.predicted[number, kind] == pytest.approx(int(((predicted == kind) & known).sum()), abs=2)


def _starts(side: int) -> list[int]:
    """Starts of windows of 28 pixels, 19 pixels apart."""
    return sorted({min(start, side - 28) for start in range(0, side, 19)})


def test_a_window_shows_its_part_of_the_scaled_image(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    photo = chance.integers(256, size=(71, 97, 3)).astype(np.uint8)
    data = data_at(tmp_path / "data", [(photo, np.zeros((71, 97)))], [(photo, np.zeros((71, 97)))])
    source, image = source_of(), data.val.images[0]
    height, width = 28, 38  # 71 x 97 scaled to a shorter side of 28
    whole = source.inputs(image, Crop.whole((height, width)))
    for crop in windows(height, width, TINY, (PATCH, PATCH)):
        left = round(crop.box[0] * width)
        torch.testing.assert_close(source.inputs(image, crop), whole[:, :, left : left + 28], atol=1e-4, rtol=0)


@pytest.mark.parametrize("stride", [6, 3])
def test_whole_images_are_evaluated_at_every_mask_pixel(mixed: LabelledData, stride: int) -> None:
    source = ExtractorSource("colours", backbone(grid_of(6, stride), 6, stride))
    probe = moved_probe(3).eval()
    found = evaluate_probe(probe, source, mixed.val, replace(QUICK, size=(36, 42)))
    assert found.truth.tolist() == [list(image.class_pixels) for image in mixed.val.images]
    for number, image in enumerate(mixed.val.images):
        part = probe(pooled(source.inputs(image, Crop.whole((36, 42)))[None], 6, stride))[0].detach()
        rows = ((np.arange(image.height) + 0.5) / image.height * 36 - 3) / stride  # in patches
        columns = ((np.arange(image.width) + 0.5) / image.width * 42 - 3) / stride
        wide = np.stack([_bilinear(part[..., kind].numpy(), rows, columns) for kind in range(CLASSES)], -1)
        predicted, truth = wide.argmax(-1), image.labels().numpy()
        hits = [int(((predicted == kind) & (truth == kind)).sum()) for kind in range(CLASSES)]
        np.testing.assert_allclose(found.hits[number], hits, atol=3)  # features are rounded to half precision


def _bilinear(grid: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    along = np.stack([np.interp(columns, np.arange(grid.shape[1]), row) for row in grid])  # (h, W)
    return np.stack([np.interp(rows, np.arange(grid.shape[0]), column) for column in along.T], -1)


def test_evaluation_does_not_change_the_probe(even: LabelledData) -> None:
    probe = moved_probe(3).eval()
    before = {name: value.clone() for name, value in probe.state_dict().items()}
    steps: list[int] = []
    for protocol in (QUICK, TINY):
        evaluate_probe(probe, source_of(), even.val, protocol, progress=lambda: steps.append(1))
    assert len(steps) == 8  # one per image
    assert all(torch.equal(before[name], value) for name, value in probe.state_dict().items())


# --- Training and evaluation


@pytest.mark.parametrize(("patch", "stride"), [(14, 14), (7, 7), (4, 4), (6, 3)])
@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_both_presets_learn_from_colours_on_any_grid_and_any_size(
    mixed: LabelledData, preset: str, patch: int, stride: int
) -> None:
    source = ExtractorSource("colours", backbone(grid_of(patch, stride), patch, stride))
    (trained,) = linear_segmentation(source, mixed, FAST if preset == "quick" else TINY, [3])
    assert trained.seed == 3
    assert trained.counts.truth.tolist() == [list(image.class_pixels) for image in mixed.val.images]
    assert scores(trained.counts).aacc > majority(mixed) + 15
    assert trained.curve.losses[-1][1] < trained.curve.losses[0][1]
    assert len(trained.curve.looks) == (8 if preset == "quick" else 0)
    assert trained.curve.losses[-1][0] == (60 if preset == "quick" else 40)


def test_one_hot_features_score_100(even: LabelledData) -> None:
    (trained,) = evaluate(one_hot, even)
    found = scores(trained.counts)
    assert found.miou > 99.5
    assert trained.curve.looks[-1][1] == pytest.approx(found.miou)


def test_one_hot_features_score_nearly_100_on_blocks(tmp_path: Path) -> None:
    def large(chance: np.random.Generator, height: int, width: int) -> np.ndarray:
        return blocks(chance, height, width, 16)

    size = [(32, 48)]
    (trained,) = evaluate(one_hot, data_at(tmp_path / "data", pairs(6, size, 5, large), pairs(6, size, 6, large)))
    assert 95 < scores(trained.counts).miou < 100  # interpolation rounds the corners of blocks


def test_one_hot_features_score_nearly_100_with_the_published_protocol(tmp_path: Path) -> None:
    size = [(28, 28)]  # 7 x 7 patches: evaluation scales nothing, and stripes end at patch borders
    data = data_at(tmp_path / "data", pairs(6, size, 5), pairs(4, size, 6))
    (trained,) = evaluate(one_hot, data, replace(TINY, distort=False))
    assert scores(trained.counts).miou > 95


def test_better_features_score_better(tmp_path: Path) -> None:
    data = data_at(tmp_path / "data", pairs(8, [(32, 48)], 7, blocks), pairs(6, [(32, 48)], 8, blocks))
    for protocol in (FAST, TINY):
        (good,), (bad,) = evaluate(pooled, data, protocol), evaluate(noisy, data, protocol)
        assert scores(good.counts).miou > scores(bad.counts).miou + 15


@pytest.mark.parametrize("protocol", [FAST, TINY], ids=["quick", "paper"])
def test_shuffled_labels_score_no_better_than_the_commonest_class(tmp_path: Path, protocol: Protocol) -> None:
    def shuffled(seed: int) -> list[Pair]:
        made = pairs(10, [(32, 48)], seed, blocks)
        other = pairs(10, [(32, 48)], seed + 1, blocks)
        return [(photo, mask) for (photo, _), (_, mask) in zip(made, other, strict=True)]

    data = data_at(tmp_path / "data", shuffled(20), shuffled(30))
    (trained,) = evaluate(one_hot, data, protocol)
    found = scores(trained.counts)
    # Pixels of a block share a label: the accuracy over 240 blocks has a standard deviation of 2.8 points.
    assert found.aacc < majority(data) + 6
    assert found.miou < 20  # guessing at random gives 1 / 7


def test_position_predicts_only_classes_that_depend_on_it(tmp_path: Path) -> None:
    def split(chance: np.random.Generator, height: int, width: int) -> np.ndarray:
        mask = np.zeros((height, width), dtype=np.int64)
        mask[height // 2 :] = 1
        mask[height // 2 :, width // 2 :] = 3
        return mask

    size = [(32, 48)]
    by_place = data_at(tmp_path / "place", pairs(6, size, 9, split), pairs(4, size, 10, split))
    anywhere = data_at(tmp_path / "anywhere", pairs(10, size, 11, blocks), pairs(8, size, 12, blocks))
    (good,), (bad,) = evaluate(places, by_place), evaluate(places, anywhere)
    assert scores(good.counts).aacc > 90
    assert scores(good.counts).iou[2] is None  # neither present nor predicted
    assert scores(bad.counts).aacc < majority(anywhere) + 6


@pytest.mark.parametrize("protocol", [FAST, replace(TINY, steps=8)], ids=["quick", "paper"])
def test_the_same_seed_gives_the_same_counts(mixed: LabelledData, protocol: Protocol) -> None:
    first = evaluate(noisy, mixed, protocol, (0, 1))
    again = evaluate(noisy, mixed, protocol, (1, 0))
    assert [trained.seed for trained in again] == [1, 0]
    assert same(first[0].counts, again[1].counts)
    assert same(first[1].counts, again[0].counts)
    assert first[0].curve.losses == again[1].curve.losses
    assert first[0].curve.losses != first[1].curve.losses


def test_cache_does_not_change_the_results(mixed: LabelledData, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    found = [evaluate(pooled, mixed, cache=given)[0] for given in (None, cache, cache)]
    assert len(list(cache.folder.rglob("*.safetensors"))) == 9
    assert all(same(found[0].counts, one.counts) and found[0].curve == one.curve for one in found[1:])


def test_published_training_resumes_from_its_checkpoint(
    mixed: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "_CHECKPOINT_EVERY", 3)
    protocol = replace(TINY, steps=10)
    (straight,) = evaluate(pooled, mixed, protocol)
    with pytest.raises(Stop):
        evaluate(pooled, mixed, protocol, checkpoints=tmp_path / "states", progress=stop_after(8))
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["0.pt"]
    steps: list[int] = []
    (gone_on,) = evaluate(pooled, mixed, protocol, checkpoints=tmp_path / "states", progress=lambda: steps.append(1))
    assert same(gone_on.counts, straight.counts)
    assert gone_on.curve == straight.curve
    assert len(steps) == 10  # including the 6 steps of the checkpoint


def test_every_step_of_every_seed_is_reported(even: LabelledData) -> None:
    steps: list[int] = []
    evaluate(pooled, even, replace(FAST, steps=9), (0, 1), progress=lambda: steps.append(1))
    assert len(steps) == 18


@pytest.mark.parametrize("protocol", [FAST, TINY], ids=["quick", "paper"])
def test_non_finite_features_are_refused_with_the_source_name(even: LabelledData, protocol: Protocol) -> None:
    with pytest.raises(EvaluationError, match=r"broken: \d+ of \d+ feature values are not finite"):
        evaluate(broken, even, protocol)


@pytest.mark.parametrize("protocol", [FAST, replace(TINY, steps=3)], ids=["quick", "paper"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_images_without_any_label_are_refused(tmp_path: Path, protocol: Protocol, split: str) -> None:
    labelled = pairs(2, [(32, 48)], 13)
    bare = [(photo, np.full_like(mask, 255)) for photo, mask in labelled]
    data = data_at(tmp_path / "data", bare if split == "train" else labelled, bare if split == "val" else labelled)
    with pytest.raises(EvaluationError, match="label"):
        evaluate(pooled, data, protocol)


@pytest.mark.parametrize("protocol", [FAST, replace(TINY, steps=3)], ids=["quick", "paper"])
def test_single_unlabelled_images_are_allowed(tmp_path: Path, protocol: Protocol) -> None:
    labelled = pairs(3, [(32, 48)], 14)
    bare = [(photo, np.full_like(mask, 255)) for photo, mask in labelled[:1]]
    (trained,) = evaluate(pooled, data_at(tmp_path / "data", [*labelled, *bare], [*bare, *labelled]), protocol)
    assert trained.counts.items == 4
    assert not trained.counts.truth[0].any()
    assert np.isfinite(scores(trained.counts).miou)
