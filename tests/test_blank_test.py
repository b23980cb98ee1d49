"""The blank-image test, computed by hand and on planted artifacts of known size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

import denoising_vit as dv
import planted
from denoising_vit.backbones import Backbone
from denoising_vit.metrics.blank_test import BlankProbe, blank_figures, shift_change

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (11 * planted.PATCH, 7 * planted.PATCH)
NAMES = ["blank_variance", "blank_detail", "blurred_detail", "shift_change", "photo_variance"]


def probe(backbone: Backbone, photos: int = 2) -> BlankProbe:
    return BlankProbe.of(backbone, SIZE, planted.photos(photos))


def smooth(ramp: float = 0.0, phase: float = 0.0) -> Backbone:
    """Mean colour of each patch, one of its pixels times `phase`, and a linear ramp over positions times `ramp`."""

    class Model(torch.nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            seen = avg_pool2d(image, planted.PATCH)
            places = torch.arange(seen.shape[2])[:, None] + torch.arange(seen.shape[3])
            texture = image[:, :, :: planted.PATCH, :: planted.PATCH]  # one pixel: changes with every shift
            return torch.cat([seen, phase * texture, ramp * places.float().expand(len(seen), 1, -1, -1)], 1)

    return dv.load_backbone(Model(), patch_size=planted.PATCH, default_size=planted.SIZE, device="cpu")


def test_images_are_normalised_and_shifted_by_whole_pixels() -> None:
    made = BlankProbe.of(planted.backbone(), SIZE, planted.photos(6))
    assert made.blank.shape == (8, 3, *SIZE)
    assert made.blurred.shape == (4, 3, *SIZE)
    assert [part.shape for part in made.shifted] == [(4, 3, *SIZE)] * 3
    assert made.shifts == (0.25, 0.5)  # 2 and 4 of 8 pixels
    still, quarter, half = made.shifted
    assert torch.equal(still[..., 2:, 2:], quarter[..., :-2, :-2])
    assert torch.equal(still[..., 4:, 4:], half[..., :-4, :-4])
    backbone = planted.backbone()
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    pixels = made.blank * std + mean
    assert float(pixels.min()) > -1e-6 and float(pixels.max()) < 1 + 1e-6
    assert torch.allclose(pixels[:3].mean((1, 2, 3)), torch.tensor([0.0, 0.5, 1.0]), atol=1e-6)
    assert int((pixels.std((2, 3)).sum(1) > 0.005).sum()) == 2  # noise; the others have one colour
    again = BlankProbe.of(planted.backbone(), SIZE, planted.photos(6))
    assert torch.equal(again.blank, made.blank) and torch.equal(again.blurred, made.blurred)


def test_blurred_photos_have_no_detail_but_still_a_colour() -> None:
    made = probe(planted.backbone())
    still, blurred = made.shifted[0], made.blurred
    assert float(torch.diff(blurred, dim=3).square().mean()) < 0.01 * float(torch.diff(still, dim=3).square().mean())
    assert torch.allclose(blurred.mean((2, 3)), still.mean((2, 3)), atol=0.1)


def test_raw_features_score_1_and_constant_features_0() -> None:
    backbone = planted.backbone(share=0.2)
    raw = probe(backbone).through(backbone)
    assert blank_figures(raw, raw) == pytest.approx(dict.fromkeys(NAMES, 1.0))
    constant = raw.through(torch.ones_like)
    assert blank_figures(constant, raw) == pytest.approx(dict.fromkeys(NAMES, 0.0))


def test_half_of_a_pattern_leaves_a_quarter_of_its_variance() -> None:
    backbone = planted.backbone(share=0.2)
    raw = probe(backbone).through(backbone)
    colours = replace(raw, blank=raw.blank[:6])  # without noise images, whose patches differ by chance
    pattern = planted.pattern(11, 7).permute(1, 2, 0) * (0.2 * 60) ** 0.5  # (C, h, w) -> (h, w, C)
    found = blank_figures(colours.through(lambda features: features - pattern / 2), colours)
    assert (found["blank_variance"], found["blank_detail"]) == pytest.approx((0.25, 0.25), rel=1e-4)
    gone = blank_figures(colours.through(lambda features: features - pattern), colours)
    assert (gone["blank_variance"], gone["blank_detail"]) == pytest.approx((0, 0), abs=1e-8)
    assert (gone["photo_variance"] or 0) > 0.5
    noise = blank_figures(raw.through(lambda features: features - pattern), raw)
    assert 0 < (noise["blank_variance"] or 0) < 0.2


def test_removing_high_frequencies_leaves_only_the_ramp() -> None:
    backbone = smooth(ramp=1.0)
    raw = probe(backbone).through(backbone)
    board = (torch.arange(11)[:, None] + torch.arange(7)).remainder(2)[None, :, :, None].float()
    dirty = replace(raw, blank=raw.blank + board)
    found = blank_figures(replace(raw, blank=raw.blank[:6]), replace(dirty, blank=dirty.blank[:6]))
    assert found["blank_detail"] == pytest.approx(0, abs=1e-9)
    # Variance of the ramp, (11^2 - 1) / 12 + (7^2 - 1) / 12, in one channel, and of the board in each of seven.
    assert found["blank_variance"] == pytest.approx(14 / (14 + 7 * float(board.var(correction=0))))


def test_shift_change_by_hand() -> None:
    # Features are 3 y + 5 x in patches; half a patch further they are (3 + 5) / 2 = 4 more. One of two channels is off.
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    ramp = (3 * y + 5 * x)[None, :, :, None].expand(2, -1, -1, 2)
    off = torch.tensor([0.0, 3.0])
    nothing = torch.zeros(2, 4, 5, 2)
    made = BlankProbe(nothing, nothing, (ramp, ramp + 4 + off, ramp + 2), (0.5, 0.25))
    assert shift_change(made) == pytest.approx((9 / 2 + 0) / 2)


def test_removing_texture_features_lowers_the_shift_change() -> None:
    backbone = smooth(phase=1.0)
    raw = probe(backbone).through(backbone)
    clean = raw.through(lambda features: features * torch.tensor([1.0, 1, 1, 0, 0, 0, 1]))
    assert 0 < (blank_figures(clean, raw)["shift_change"] or 0) < 0.5


def test_metrics_of_a_missing_artifact_are_none() -> None:
    flat = smooth()
    raw = probe(flat).through(flat)
    colours = replace(raw, blank=raw.blank[:6])
    found = blank_figures(colours, colours)
    assert (found["blank_variance"], found["blank_detail"]) == (None, None)
    assert found["photo_variance"] == 1


def test_without_photos_only_blank_metrics_are_available() -> None:
    backbone = planted.backbone(share=0.2)
    raw = BlankProbe.of(backbone, SIZE, []).through(backbone)
    found = blank_figures(raw, raw)
    assert [name for name, value in found.items() if value is not None] == ["blank_variance", "blank_detail"]


def test_small_grids_have_no_detail_metrics() -> None:
    backbone = planted.backbone(share=0.2)
    photos = [np.asarray(photo) for photo in planted.photos(1)]
    for size, missing in (((16, 40), ["blank_detail", "blurred_detail"]), ((8, 40), None)):
        raw = BlankProbe.of(backbone, size, photos).through(backbone)
        found = [name for name, value in blank_figures(raw, raw).items() if value is None]
        assert found == (missing or ["blank_detail", "blurred_detail", "shift_change"])
