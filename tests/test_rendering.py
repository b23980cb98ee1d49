"""Rendered views: agreement with Pillow and torch, at the positions given by the plan."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from denoising_vit.views.options import CropOptions
from denoising_vit.views.plan import ViewPlan
from denoising_vit.views.rendering import ViewRenderer, render_boxes, resampling_matrix, to_image

NO_MEAN, UNIT_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


pytestmark = pytest.mark.usefixtures("one_thread")


def render(image: Tensor, plan: ViewPlan) -> Tensor:
    """All views, (V, 3, H, W) in [0, 1]."""
    return ViewRenderer(image, plan, NO_MEAN, UNIT_STD)(slice(None))


def by_pillow(photo: np.ndarray, plan: ViewPlan, view: int) -> Tensor:
    """(3, H, W) in [0, 1]."""
    height, width = photo.shape[:2]
    x0, y0, x1, y1 = plan.boxes[view].tolist()
    rendered = Image.fromarray(photo).resize(
        (plan.size[1], plan.size[0]),
        Image.Resampling.BICUBIC,
        box=(x0 * width, y0 * height, min(x1 * width, width), min(y1 * height, height)),
    )
    result = to_image(np.array(rendered))
    return result.flip(-1) if plan.flips[view] else result


def test_to_image_moves_channels_first_and_scales() -> None:
    photo = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    image = to_image(photo)
    assert image.shape == (3, 2, 3)
    assert image.dtype == torch.float32
    assert float(image[1, 0, 2]) == pytest.approx(photo[0, 2, 1] / 255)
    assert to_image(np.full((1, 1, 3), 255, dtype=np.uint8)).max() == 1


def test_to_image_accepts_views_of_arrays() -> None:
    """Slicing and mirroring in NumPy give negative strides."""
    photo = data.chelsea()[::-1, ::-2]
    torch.testing.assert_close(to_image(photo), to_image(photo.copy()), rtol=0, atol=0)


def test_read_only_array_gives_no_warning() -> None:
    """Every np.asarray(PIL image) is read-only."""
    photo = data.chelsea()
    photo.flags.writeable = False
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch gives this warning once a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            to_image(photo)
    finally:
        torch.set_warn_always(before)


# --- against other implementations ---


@pytest.mark.parametrize("size", [(224, 224), (210, 350)])
@pytest.mark.parametrize("photo", [data.chelsea(), data.astronaut()[:, :301]], ids=["cat", "astronaut"])
def test_views_match_pillow(photo: np.ndarray, size: tuple[int, int]) -> None:
    plan = ViewPlan.make(10, size=size, patch_size=14, seed=1)
    assert plan.flips.any() and not plan.flips.all()
    renderer = ViewRenderer(to_image(photo), plan, NO_MEAN, UNIT_STD)
    assert renderer.image.shape[1:] == photo.shape[:2]  # not reduced first, which has its own test
    for view, rendered in enumerate(renderer(slice(None))):
        # Pillow rounds to 8 bits after each pass, and clips the overshoot after the first one too.
        difference = (rendered - by_pillow(photo, plan, view)).abs() * 255
        assert float(difference.mean()) < 0.5
        assert float(difference.quantile(0.99)) < 1.5


@pytest.mark.parametrize(("start", "stop", "count"), [(0, 451, 32), (10.3, 440.9, 98), (200.5, 260.25, 98), (3, 4, 7)])
def test_resampling_matches_pillow_at_any_scale(start: float, stop: float, count: int) -> None:
    row = data.chelsea()[150:151, :, 0]  # (1, 451)
    first, weights = resampling_matrix(start, stop, 451, count)
    mine = weights @ torch.from_numpy(row[0, first : first + weights.shape[1]].astype(np.float32))
    theirs = Image.fromarray(row.astype(np.float32)).resize(
        (count, 1), Image.Resampling.BICUBIC, box=(start, 0, stop, 1)
    )
    torch.testing.assert_close(mine, torch.from_numpy(np.array(theirs)[0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(224, 224), (600, 600), (140, 700)])
def test_full_image_matches_torch(size: tuple[int, int]) -> None:
    image = to_image(data.chelsea())
    plan = ViewPlan.make(20, size=size, patch_size=14)
    renderer = ViewRenderer(image, plan, NO_MEAN, UNIT_STD)
    expected = F.interpolate(renderer.image[None], size, mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(renderer(slice(0, 1)), expected, rtol=0, atol=1e-4)


# --- flips, identity, normalisation ---


def test_flipped_views_are_mirrored_exactly() -> None:
    image = to_image(data.chelsea())
    plan = ViewPlan.make(6, size=(98, 126), patch_size=14)
    mirrored = render(image, dataclasses.replace(plan, flips=~plan.flips))
    torch.testing.assert_close(mirrored, render(image, plan).flip(-1), rtol=0, atol=1e-6)


def test_flipped_view_is_the_same_crop_of_the_mirrored_photo() -> None:
    photo = data.chelsea()
    plan = ViewPlan.make(6, size=(98, 98), patch_size=14, full_image=False)
    boxes = plan.boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [1, 0, 1, 0]  # x0, x1 = 1 - x1, 1 - x0
    other = dataclasses.replace(plan, boxes=boxes, flips=~plan.flips)
    torch.testing.assert_close(
        render(to_image(photo[:, ::-1]), other), render(to_image(photo), plan), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("side", [(98, 98), (56, 112)])
def test_photo_of_the_view_size_is_returned_unchanged(side: tuple[int, int]) -> None:
    photo = np.random.RandomState(0).randint(0, 256, (*side, 3), dtype=np.uint8)
    plan = ViewPlan.make(4, size=side, patch_size=14)
    torch.testing.assert_close(render(to_image(photo), plan)[0], to_image(photo), rtol=0, atol=1e-6)


def test_views_are_normalised() -> None:
    plan = ViewPlan.make(5, size=(56, 56), patch_size=14)
    mean, std = (0.1, 0.5, 0.9), (0.5, 0.25, 2.0)
    image = to_image(data.chelsea())
    plain = render(image, plan)
    expected = torch.stack([(plain[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(ViewRenderer(image, plan, mean, std)(slice(None)), expected, rtol=0, atol=1e-5)


def test_values_stay_in_the_range_of_a_photo() -> None:
    """The cubic kernel overshoots at edges."""
    photo = np.zeros((40, 40, 3), dtype=np.uint8)
    photo[:, 20:] = 255
    views = render(to_image(photo), ViewPlan.make(10, size=(98, 98), patch_size=14))
    assert float(views.min()) >= 0 and float(views.max()) <= 1


def test_batches_are_slices_of_all_views() -> None:
    plan = ViewPlan.make(7, size=(56, 56), patch_size=14)
    renderer = ViewRenderer(to_image(data.chelsea()), plan, NO_MEAN, UNIT_STD)
    batches = [renderer(slice(start, start + 3)) for start in range(0, 7, 3)]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(batches), renderer(slice(None)), rtol=0, atol=0)


# --- extreme photos ---


@pytest.mark.parametrize("shape", [(50, 70), (16, 16), (3, 400), (700, 900)])
def test_one_colour_stays_one_colour(shape: tuple[int, int]) -> None:
    photo = np.broadcast_to(np.array([30, 140, 250], dtype=np.uint8), (*shape, 3))
    views = render(to_image(photo), ViewPlan.make(12, size=(98, 98), patch_size=14))
    expected = torch.tensor([30, 140, 250])[:, None, None] / 255
    torch.testing.assert_close(views, expected.expand_as(views), rtol=0, atol=1e-5)


def test_large_photo_is_reduced_once_and_looks_the_same() -> None:
    photo = np.array(Image.fromarray(data.astronaut()).resize((1600, 1200), Image.Resampling.BICUBIC))
    plan = ViewPlan.make(8, size=(98, 98), patch_size=14, seed=1)
    renderer = ViewRenderer(to_image(photo), plan, NO_MEAN, UNIT_STD)
    smallest = (plan.boxes[:, 2:] - plan.boxes[:, :2]).min(0)  # width, height
    height, width = renderer.image.shape[1:]
    assert 98 <= width * smallest[0] < 100  # just enough pixels for the smallest crop
    assert 98 <= height * smallest[1] < 100
    for view, rendered in enumerate(renderer(slice(None))):
        difference = (rendered - by_pillow(photo, plan, view)).abs() * 255
        assert float(difference.mean()) < 1.5
        # A shift by a fifth of a pixel of the view would exceed this.
        assert float(difference.square().mean()) < 0.002 * 255**2 * float(rendered.var())


def test_long_and_thin_photo_gives_finite_views() -> None:
    photo = np.random.RandomState(0).randint(0, 256, (10, 20_000, 3), dtype=np.uint8)
    for image in (to_image(photo), to_image(photo.transpose(1, 0, 2))):
        views = render(image, ViewPlan.make(8, size=(98, 98), patch_size=14))
        assert views.shape == (8, 3, 98, 98)
        assert torch.isfinite(views).all()


# --- geometry of the plan ---


def ramp(height: int, width: int) -> Tensor:
    """(3, height, width): the first channel is x, the second y, in [0, 1] of the image at pixel centres."""
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width), torch.zeros(height, width)])


@pytest.mark.parametrize("shape", [(120, 90), (331, 467), (1200, 900)])
@pytest.mark.parametrize("size", [(98, 98), (70, 126)])
def test_patches_are_at_the_positions_of_the_plan(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """On a ramp the mean of a patch is the coordinate of its centre; half a patch off would be 0.02 or more."""
    plan = ViewPlan.make(24, size=size, patch_size=14)
    assert plan.flips.sum() >= 8
    patches = F.avg_pool2d(render(ramp(*shape), plan), 14)  # (V, 3, h, w)
    rows, columns = (torch.from_numpy(centre).float() for centre in plan.centres())
    # The outermost patches see the border, beyond which there is no ramp to sample.
    inner = (slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(
        patches[:, 0][inner], columns[:, None, 1:-1].expand(-1, len(rows[0]) - 2, -1), rtol=0, atol=2e-3
    )
    torch.testing.assert_close(
        patches[:, 1][inner], rows[:, 1:-1, None].expand(-1, -1, len(columns[0]) - 2), rtol=0, atol=2e-3
    )


def test_overlapping_patches_are_at_the_positions_of_the_plan() -> None:
    plan = ViewPlan.make(24, size=(98, 98), patch_size=14, stride=7)
    patches = F.avg_pool2d(render(ramp(331, 467), plan), 14, stride=7)
    assert patches.shape[2:] == plan.grid
    rows, columns = (torch.from_numpy(centre).float() for centre in plan.centres())
    inner = slice(2, -2)
    torch.testing.assert_close(
        patches[:, 0, 2:-2, 2:-2], columns[:, None, inner].expand(-1, plan.grid[0] - 4, -1), rtol=0, atol=2e-3
    )
    torch.testing.assert_close(
        patches[:, 1, 2:-2, 2:-2], rows[:, inner, None].expand(-1, -1, plan.grid[1] - 4), rtol=0, atol=2e-3
    )


# --- many views at once ---


@pytest.mark.parametrize("shape", [(120, 90), (331, 467), (3, 400), (1200, 900)])
@pytest.mark.parametrize("size", [(98, 98), (70, 126)])
def test_batched_views_match_single_ones(shape: tuple[int, int], size: tuple[int, int]) -> None:
    photo = np.random.RandomState(0).randint(0, 256, (*shape, 3), dtype=np.uint8)
    plan = ViewPlan.make(19, size=size, patch_size=14, seed=2)
    assert plan.flips.any() and not plan.flips.all()
    renderer = ViewRenderer(to_image(photo), plan, NO_MEAN, UNIT_STD)
    batched = render_boxes(renderer.image, plan.boxes, plan.flips, plan.size)
    assert batched.shape == (19, 3, *size) and batched.dtype == torch.float32
    torch.testing.assert_close(batched.clamp(0, 1), renderer(slice(None)), rtol=0, atol=2e-4)


def test_half_precision_views_differ_by_less_than_a_grey_level() -> None:
    plan = ViewPlan.make(9, size=(98, 98), patch_size=14)
    renderer = ViewRenderer(to_image(data.chelsea()), plan, NO_MEAN, UNIT_STD)
    batched = render_boxes(renderer.image, plan.boxes, plan.flips, plan.size, torch.float16)
    difference = (batched.clamp(0, 1) - renderer(slice(None))).abs()
    assert 0 < float(difference.max()) < 0.5 / 255
    assert float(difference.mean()) < 0.1 / 255


# --- released crops ---


@pytest.mark.parametrize("shape", [(61, 97), (300, 451)])
def test_released_views_are_torchvision_crops_of_the_squeezed_photo(shape: tuple[int, int]) -> None:
    """Photos smaller and larger than a view; crops are cut out before they are enlarged, with the overshoot."""
    photo = np.array(Image.fromarray(data.chelsea()).resize((shape[1], shape[0])))
    plan = ViewPlan.make(12, size=(112, 112), patch_size=14, seed=1, crops=CropOptions(coverage="released"))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    found = ViewRenderer(to_image(photo), plan, mean, std)(slice(None))
    squeezed = transforms.Compose([
        transforms.Resize((112, 112)), transforms.ToTensor(), transforms.Normalize(mean, std),
    ])(Image.fromarray(photo))  # fmt: skip
    assert isinstance(squeezed, Tensor)
    assert plan.flips.any()
    for view, (box, flip) in enumerate(zip(plan.boxes, plan.flips, strict=True)):
        left, top, right, bottom = np.round(box * 112).astype(int).tolist()
        size = [112, 112]
        bicubic = transforms.InterpolationMode.BICUBIC
        expected = functional.resized_crop(squeezed, top, left, bottom - top, right - left, size, bicubic)
        expected = functional.hflip(expected) if flip else expected
        # Pillow and torch sometimes round the levels of the squeezed photo differently, by one.
        difference = (found[view] - expected).abs() * torch.tensor(std)[:, None, None] * 255
        assert float(difference.max()) < 1.6 and float(difference.mean()) < 0.2
