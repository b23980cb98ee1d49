"""The options of stage 1: one class that states what each option affects; records stay unchanged."""

from __future__ import annotations

from dataclasses import fields

import pytest

from denoising_vit.decomposition.options import CalibrationOptions, DenoiseOptions, ExactOptions
from denoising_vit.diagnosis.options import DiagnoseOptions
from denoising_vit.errors import PlanError
from denoising_vit.evaluation.options import FieldOptions
from denoising_vit.show.options import VideoOptions

WIDE = (0.4, 1.0)


def test_record_omits_options_without_effect_or_recorded_elsewhere() -> None:
    exact = DenoiseOptions(area=WIDE)
    every = {"method", "views", "held_out", "size", "resolution", "smoothness", "shrinkage", "clip", "coverage"}
    every |= {"area", "taper", "seed", "batch_size"}
    assert exact.recorded().keys() == every
    assert exact.recorded("nothing").keys() == every - {"held_out", "batch_size"}
    assert exact.recorded("shape", "nothing").keys() == every - {"held_out", "batch_size", "size", "resolution"}
    assert exact.recorded("views", "shape", "nothing").keys() == {"method", "smoothness", "shrinkage", "clip"}


def test_the_neural_field_depends_on_seed_and_held_out_views() -> None:
    recorded = DenoiseOptions(method="neural-field").recorded("views", "shape", "nothing")
    assert recorded.keys() == {"method", "seed", "held_out", "neural"}


def test_one_pass_is_recorded_by_method_and_size() -> None:
    assert DenoiseOptions(method="subtract", size=56).recorded() == {"method": "subtract", "size": 56}


def test_published_crops_are_omitted_from_records() -> None:
    assert "area" not in DenoiseOptions().recorded() and DenoiseOptions(area=WIDE).recorded()["area"] == [0.4, 1.0]
    assert "area" not in VideoOptions().recorded() and VideoOptions(area=WIDE).recorded()["area"] == [0.4, 1.0]
    assert "ratio" not in DiagnoseOptions().recorded() and DiagnoseOptions(ratio=(1, 2)).recorded()["ratio"] == (1, 2)


def test_options_of_data_sets_match_those_of_a_photo() -> None:
    assert FieldOptions(area=WIDE, taper=0.1).denoising() == DenoiseOptions(held_out=0, area=WIDE, taper=0.1)
    assert CalibrationOptions(clip=4).denoising() == DenoiseOptions(views=16, held_out=0, clip=4)
    assert DiagnoseOptions(area=WIDE).calibration() == CalibrationOptions(views=8, clip=6.0, area=WIDE)
    names = {each.name for each in fields(ExactOptions)}
    for options in (DenoiseOptions, FieldOptions, CalibrationOptions):
        assert names <= {each.name for each in fields(options)}


@pytest.mark.parametrize("options", [VideoOptions(area=(0.5, 0.1)), DiagnoseOptions(area=(0.5, 0.1))], ids=type)
def test_invalid_crops_are_rejected(options: VideoOptions | DiagnoseOptions) -> None:
    with pytest.raises(PlanError, match="crop area must be two increasing fractions"):
        options.validate() if isinstance(options, VideoOptions) else options.calibration()
