"""Label propagation in videos: against loops, on moving squares, and with memory for the context only."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.errors import EvaluationError, PlanError, SizeError
from denoising_vit.evaluation.correspondence import ClipData, PropagationOptions, open_clips, propagate
from denoising_vit.evaluation.correspondence.label_propagation import (
    Held,
    at_patches,
    carried,
    carry,
    compared,
    contour_accuracy,
    evaluated_frames,
    filled,
    region_similarity,
    to_mask,
)
from denoising_vit.evaluation.features import FeatureCache
from tiny_correspondence import HEIGHT, WIDTH, Shot, crossing, frame, moving, shuffled, write_davis
from tiny_labelled import PATCH, colours, source_of, speckled

pytestmark = pytest.mark.usefixtures("one_thread")


def random_clip(frames: int, h: int = 5, w: int = 6, channels: int = 4, labels: int = 3) -> tuple[list[Tensor], Tensor]:
    chance = torch.Generator().manual_seed(frames)
    features = [torch.randn(h, w, channels, generator=chance) for _ in range(frames)]
    return features, torch.rand(h, w, labels, generator=chance)


def by_loops(
    target: Tensor, features: list[Tensor], labels: list[Tensor], k: int, radius: int, temperature: float
) -> Tensor:
    """Propagated labels, patch by patch over all candidates."""
    h, w, _ = target.shape
    ours, *others = (
        one.double().numpy() / one.double().norm(dim=-1, keepdim=True).numpy() for one in (target, *features)
    )
    found = torch.zeros(h, w, labels[0].shape[-1], dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            candidates = []
            for theirs, label in zip(others, labels, strict=True):
                for v in range(h):
                    for u in range(w):
                        if not radius or max(abs(v - y), abs(u - x)) <= radius:
                            candidates.append((float(ours[y, x] @ theirs[v, u]), label[v, u].double()))
            best = sorted(candidates, key=lambda candidate: -candidate[0])[:k]
            weights = [np.exp(cosine / temperature) for cosine, _ in best]
            for weight, (_, label) in zip(weights, best, strict=True):
                found[y, x] += weight / sum(weights) * label
    return found


@pytest.mark.parametrize("radius", [0, 1, 2, 12])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.1), (5, 1.0), (10_000, 0.1)])
def test_labels_match_a_loop_implementation(k: int, radius: int, temperature: float) -> None:
    """If k exceeds the size of the window, all of its patches are used."""
    (target, *features), _ = random_clip(4)
    labels = [random_clip(number)[1] for number in (5, 6, 7)]
    context = [Held(F.normalize(one, dim=-1), label) for one, label in zip(features, labels, strict=True)]
    found = carried(F.normalize(target, dim=-1), context, k=k, radius=radius, temperature=temperature)
    expected = by_loops(target, features, labels, k, radius, temperature)
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("context", [0, 1, 3, 20])
def test_the_context_is_the_first_frame_and_the_last_few(context: int) -> None:
    features, first = random_clip(8)
    found = list(carry(features, first, PropagationOptions(context=context, radius=2)))
    labels = [first]
    for number in range(1, len(features)):
        earlier = [0, *range(max(number - context, 1), number)]
        some, theirs = [features[one] for one in earlier], [labels[one] for one in earlier]
        labels.append(by_loops(features[number], some, theirs, 5, 2, 0.1).float())
    assert len(found) == 7
    for ours, expected in zip(found, labels[1:], strict=True):
        assert torch.allclose(ours, expected, atol=1e-4)


def test_ties_with_the_last_neighbour_also_vote() -> None:
    """The order of equally similar patches must not matter."""
    features = torch.zeros(1, 4, 2)
    features[..., 0] = 1
    labels = torch.tensor([[[1.0], [0.0], [0.0], [0.0]]])
    found = carried(features, [Held(features, labels)], k=2, radius=0, temperature=0.1)
    assert torch.allclose(found, torch.full((1, 4, 1), 0.25))


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_weights_are_finite_at_any_temperature(temperature: float) -> None:
    features, first = random_clip(3)
    for labels in carry(features, first, PropagationOptions(temperature=temperature)):
        assert torch.isfinite(labels).all() and labels.max() <= 1


def test_first_frame_labels_are_taken_at_patch_centres() -> None:
    labels = torch.zeros(48, 60, dtype=torch.int64)
    labels[:, 30:] = 3
    labels[20:, :] = -1
    labels[:4, :5] = 7
    patches = at_patches(labels, (3, 7), (24, 30), 6, 6)  # resized to half the size: a patch covers 12 pixels
    assert patches.shape == (4, 5, 3)
    for i in range(4):
        for j in range(5):
            value = int(labels[6 + 12 * i, 6 + 12 * j])
            assert patches[i, j].tolist() == [value == 0, value == 3, value == 7]
    overlapping = at_patches(labels, (3,), (24, 30), 6, 3)  # centres every 6 pixels, starting at 6
    assert overlapping[:, :, 1].tolist() == [
        [float(labels[6 + 6 * i, 6 + 6 * j] == 3) for j in range(9)] for i in range(7)
    ]


def test_each_label_is_scaled_to_0_to_1_before_the_argmax() -> None:
    labels = torch.tensor([[[1.0, 0.0, 0.5], [0.9, 0.1, 0.5]], [[0.8, 0.2, 0.5], [0.6, 0.05, 0.5]]])
    found = filled(labels)
    assert torch.allclose(found[..., 0], torch.tensor([[1.0, 0.75], [0.5, 0.0]]), atol=1e-6)
    assert torch.allclose(found[..., 1], torch.tensor([[0.0, 0.5], [1.0, 0.25]]), atol=1e-6)
    assert torch.equal(found[..., 2], labels[..., 2])  # constant: nothing to scale
    assert torch.equal(filled(torch.zeros(2, 2, 3)), torch.zeros(2, 2, 3))
    assert to_mask(labels[..., :2], 2, 2, (2, 2), 1, 1).tolist() == [[0, 0], [1, 1]]


def test_masks_are_interpolated_between_patch_centres() -> None:
    """Two patches of 8 pixels at twice the size: a linear ramp between their centres, constant beyond them."""
    labels = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    mask = to_mask(labels, 16, 32, (8, 16), 8, 8)
    assert mask.shape == (16, 32)
    assert (mask[:, :16] == 0).all() and (mask[:, 16:] == 1).all()
    uneven = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    mask = to_mask(uneven, 8, 8, (8, 16), 8, 4)  # overlapping: centres at 4, 8 and 12 of 16 pixels
    assert mask[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


# --- memory ---


def test_only_the_context_is_kept_in_memory() -> None:
    """Earlier frames and labels that left the context are released, and no frame is read in advance."""
    taken: list[weakref.ref[Tensor]] = []
    given: list[weakref.ref[Tensor]] = []

    def alive(refs: list[weakref.ref[Tensor]]) -> int:
        return sum(ref() is not None for ref in refs)

    def frames() -> Iterator[Tensor]:
        for number in range(30):
            features = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(number))
            taken.append(weakref.ref(features))
            yield features
            del features

    first = torch.rand(4, 5, 2)
    number, most_frames, most_labels = 0, 0, 0
    for number, labels in enumerate(carry(frames(), first, PropagationOptions(context=3)), start=1):
        given.append(weakref.ref(labels))
        del labels
        assert len(taken) == number + 1
        most_frames, most_labels = max(most_frames, alive(taken)), max(most_labels, alive(given))
    assert number == 29
    assert most_frames <= 2
    assert most_labels == 3


# --- scores ---


def clips_of(folder: Path, *clips: list[Shot]) -> ClipData:
    return open_clips(write_davis(folder, {f"clip{number}": shots for number, shots in enumerate(clips)}))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ClipData:
    return clips_of(tmp_path_factory.mktemp("davis"), moving(), crossing(5, 1), moving(4, 2))


def test_moving_squares_are_tracked(data: ClipData) -> None:
    """Two objects of one sequence share a group; interpolation between patches rounds the corners of squares."""
    found = propagate(source_of(colours), data, PropagationOptions())
    assert found.values.shape == (4, 3) and found.groups.tolist() == [0, 1, 1, 2]
    assert (found.values > 95).all()
    scored = found.scored()
    assert list(scored) == ["J&F", "J", "F"]
    assert scored["J&F"] == pytest.approx((scored["J"] + scored["F"]) / 2)


def test_shuffled_features_score_low(data: ClipData) -> None:
    """Scores are at chance level, because the colours of objects are at random patches."""
    found = propagate(source_of(shuffled), data, PropagationOptions()).scored()
    assert found["J"] < 30 and found["F"] < 40


def test_better_features_score_better(data: ClipData) -> None:
    def noisy(noise: float) -> Callable[[Tensor], Tensor]:
        def model(image: Tensor) -> Tensor:
            clean = colours(image)
            return clean + noise * (torch.frac(clean.abs() * 9973) - 0.5)

        return model

    scores = [propagate(source_of(noisy(noise)), data, PropagationOptions()).scored() for noise in (0, 0.7, 1.5)]
    assert scores[0]["J&F"] > scores[1]["J&F"] + 3 > scores[2]["J&F"] + 6


def test_object_that_jumps_out_of_the_window_is_lost(tmp_path: Path) -> None:
    """A square jumps further than the window reaches, and never returns into it."""
    jump = clips_of(tmp_path / "jump", [frame([(24, 80 if number else 8)], number) for number in range(5)])
    near = propagate(source_of(colours), jump, PropagationOptions(radius=2, context=0)).scored()
    far = propagate(source_of(colours), jump, PropagationOptions(radius=0, context=0)).scored()
    assert far["J"] > 95 and near["J"] < 20


def test_scores_match_a_loop_implementation(data: ClipData) -> None:
    """A second implementation of the protocol."""
    source, options = source_of(speckled), PropagationOptions(context=2, k=3, radius=3)
    found = propagate(source, data, options)
    frames = data.clips[1]
    features = [speckled(torch.from_numpy(one.pixels().copy()).permute(2, 0, 1)[None] / 255)[0] for one in frames]
    features = [one.half().float() for one in features]  # features are kept in half precision
    start = frames[0].labels()[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
    labels = [torch.stack([start == number for number in (0, 1, 2)], dim=-1).float()]
    figures = []
    for number in range(1, len(frames)):
        earlier = [0, *range(max(number - 2, 1), number)]
        some, theirs = [features[one] for one in earlier], [labels[one] for one in earlier]
        labels.append(by_loops(features[number], some, theirs, 3, 3, 0.1).float())
        if number == len(frames) - 1:
            continue
        whole = F.interpolate(labels[-1].permute(2, 0, 1)[None], (HEIGHT, WIDTH), mode="bilinear")[0]
        low, high = whole.amin((1, 2), keepdim=True), whole.amax((1, 2), keepdim=True)
        mask = ((whole - low) / (high - low)).argmax(0).numpy()
        truth = frames[number].labels().numpy()
        figures.append(
            [
                (region_similarity(truth == one, mask == one), contour_accuracy(truth == one, mask == one))
                for one in (1, 2)
            ]
        )
    expected = 100 * np.mean(figures, axis=0)  # (objects, J and F)
    assert np.allclose(found.values[1:3, 1:], expected, atol=0.2)
    assert (expected < 98).any()


def test_first_and_last_frame_are_not_evaluated(tmp_path: Path) -> None:
    shots = moving(5)
    wrong = [*shots[:4], (shots[4][0], shots[0][1])]
    plain, same = (
        propagate(source_of(colours), clips_of(tmp_path / name, clip), PropagationOptions())
        for name, clip in (("plain", shots), ("wrong", wrong))
    )
    assert np.array_equal(plain.values, same.values)
    middle = [*shots[:3], (shots[3][0], shots[0][1]), shots[4]]
    other = propagate(source_of(colours), clips_of(tmp_path / "middle", middle), PropagationOptions())
    assert other.values[0, 1] < plain.values[0, 1] - 10


def test_second_of_two_frames_is_evaluated(tmp_path: Path) -> None:
    right, wrong = moving(2), [moving(1)[0], (moving(2)[1][0], moving(6)[5][1])]
    found = propagate(source_of(colours), clips_of(tmp_path, right, wrong), PropagationOptions())
    assert found.values[0, 0] > 95 and found.values[1, 0] < 40


def test_labels_propagate_through_frames_without_masks(tmp_path: Path) -> None:
    """Steps are small enough for the window from frame to frame, but too wide if frames are left out."""
    shots = moving(8)
    bare = [shot if number in (0, 6) else (shot[0], None) for number, shot in enumerate(shots)]
    options = PropagationOptions(radius=1, context=1)
    found = propagate(source_of(colours), clips_of(tmp_path / "bare", bare), options)
    left_out = [shots[0], shots[6], shots[7]]
    jumping = propagate(source_of(colours), clips_of(tmp_path / "jumping", left_out), options)
    assert found.values[0, 1] > 90 > jumping.values[0, 1]


def test_evaluated_frames(data: ClipData) -> None:
    frames = data.clips[0]
    assert evaluated_frames(frames) == {1, 2, 3, 4}
    assert evaluated_frames(frames[:3]) == {1}
    assert evaluated_frames(frames[:2]) == {1}
    bare = [replace(one, mask=None) if number in (1, 2) else one for number, one in enumerate(frames)]
    assert evaluated_frames(bare) == {3, 4}
    assert evaluated_frames(bare[:4]) == {3}


def test_unlabelled_pixels_are_not_evaluated() -> None:
    truth = np.array([[1, 1, 2, -1], [1, 1, 2, -1]])
    found = np.array([[1, 1, 2, 2], [1, 1, 2, 1]])
    figures = compared(truth, found, (1, 2))
    assert figures.tolist() == [[100] * 3] * 2
    assert compared(truth, np.where(found == 2, 1, found), (1, 2))[1, 1] == 0


def test_repeated_and_cached_runs_give_the_same_scores(tmp_path: Path, data: ClipData) -> None:
    source, options = source_of(speckled), PropagationOptions()
    cache = FeatureCache(tmp_path)
    steps: list[int] = []
    first = propagate(source, data, options, cache=cache, progress=lambda: steps.append(1))
    again, bare = propagate(source, data, options, cache=cache), propagate(source, data, options)
    assert len(steps) == len(data.val.images) == len(list(tmp_path.rglob("*.safetensors")))
    assert np.array_equal(first.values, again.values) and np.array_equal(first.values, bare.values)


def test_frames_can_be_resized(data: ClipData) -> None:
    shapes: list[tuple[int, ...]] = []

    def model(image: Tensor) -> Tensor:
        shapes.append(tuple(image.shape[2:]))
        return colours(image)

    found = propagate(source_of(model), data, PropagationOptions(size=(192, 256))).scored()
    assert set(shapes) == {(192, 256)} and found["J&F"] > 95
    with pytest.raises(SizeError):
        propagate(source_of(colours), data, PropagationOptions(size=50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PropagationOptions(context=-1), "context must be at least 0, got -1"),
        (PropagationOptions(k=0), "k must be at least 1, got 0"),
        (PropagationOptions(radius=-2), "radius must be at least 0, got -2"),
        (PropagationOptions(temperature=0), "temperature must be a positive number, got 0"),
        (PropagationOptions(temperature=float("nan")), "temperature must be a positive number, got nan"),
        (PropagationOptions(temperature=float("inf")), "temperature must be a positive number, got inf"),
    ],
)
def test_options_out_of_range_are_rejected(data: ClipData, options: PropagationOptions, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        propagate(source_of(colours), data, options)


def test_non_finite_features_are_rejected(data: ClipData) -> None:
    with pytest.raises(EvaluationError, match="not finite"):
        propagate(source_of(lambda image: colours(image) * float("nan")), data, PropagationOptions())
