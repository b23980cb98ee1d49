"""The table of kinds of features: every command and the page support a new entry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import planted
from command import in_process
from denoising_vit.backbones import Backbone
from denoising_vit.denoise import denoise_image
from denoising_vit.errors import PlanError
from denoising_vit.extractors import KINDS, Cleaners, Extractor, FeatureKind, features_help, parse_names
from denoising_vit.show.app.models import Model
from denoising_vit.show.options import ShowOptions, VideoOptions
from denoising_vit.show.sheets import PhotoExtractor
from denoising_vit.show.video.frames import FrameFeatures

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "made-up"

#: A call of each command that takes features, complete except for them.
VERBS = {
    "show": ("show", "photo.jpg", "-o", "out"),
    "video": ("video", "clip.mp4", "-o", "out"),
    "export": ("export", "-o", "out", "--weights", "none", "--backbone", "none"),
    **{
        task: ("evaluate", task, "--data", "nowhere")
        for task in (
            "knn",
            "segmentation",
            "hummingbird",
            "clustering",
            "depth",
            "discovery",
            "correspondence",
            "artifacts",
        )
    },
}


def halved(backbone: Backbone, _cleaners: Cleaners) -> tuple[Extractor, dict[str, str]]:
    """Half of the backbone's features."""
    return lambda image: backbone(image) / 2, {"share": "half"}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind of features that is in the table during a test."""
    monkeypatch.setitem(KINDS, NAME, FeatureKind(NAME, "half of them", halved))
    return NAME


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_command_lists_all_kinds(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dvit = in_process(capsys, monkeypatch)
    monkeypatch.setenv("COLUMNS", "80")  # help in one column
    words = dvit(*VERBS[verb][: 2 if "evaluate" in VERBS[verb] else 1], "--help").words
    for kind in KINDS.values():
        if verb != "export" or kind.one_pass:
            assert f"{kind.name} ({kind.summary})" in words


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_accepts_a_new_kind(
    verb: str, made_up: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is not refused as unknown; the command then refuses the missing input."""
    monkeypatch.chdir(tmp_path)
    dvit = in_process(capsys, monkeypatch)
    refused = dvit(*VERBS[verb], "--features", "made-down")
    assert refused.code == 2 and "unknown features: 'made-down'; choose from raw, subtract" in refused.words
    assert made_up in refused.words
    assert "unknown features" not in dvit(*VERBS[verb], "--features", made_up).words


def test_photos_are_denoised_and_shown_by_a_new_kind(made_up: str) -> None:
    backbone, photo = planted.backbone(), planted.photos(1)[0]
    result = denoise_image(backbone, photo, method=made_up)
    torch.testing.assert_close(result.semantic, result.raw / 2)
    assert result.info["method"] == made_up and result.info["share"] == "half"
    shown = PhotoExtractor(backbone, ["raw", made_up], Cleaners(), ShowOptions().denoising())(photo)
    torch.testing.assert_close(shown.maps()[made_up], shown.maps()["raw"] / 2)


def test_video_frames_and_the_page_support_a_new_kind(made_up: str) -> None:
    backbone = planted.backbone()
    features = FrameFeatures(backbone, Cleaners(), VideoOptions(features=f"raw,{made_up}"))
    photo = np.resize(planted.photos(1)[0], (planted.SIZE, planted.SIZE, 3))[None].repeat(2, 0)
    found = features(photo)
    torch.testing.assert_close(found[made_up], found["raw"] / 2)
    assert features.identity["share"] == "half"
    assert Model(backbone, None, None).methods == ("exact", "project", "average", made_up)


def test_unknown_method_error_lists_a_new_kind(made_up: str) -> None:
    with pytest.raises(PlanError, match=f"unknown method 'magic'; choose from exact, .*{made_up}"):
        denoise_image(planted.backbone(), planted.photos(1)[0], method="magic")


def test_exact_features_have_no_extractor() -> None:
    with pytest.raises(PlanError, match="unknown extractor 'exact'; choose from raw, subtract, denoiser, distilled"):
        Cleaners().extractor("exact", planted.backbone())


def test_help_is_made_from_the_table() -> None:
    assert features_help([KINDS["raw"], KINDS["exact"]]) == (
        "raw (the backbone's own), exact (stage 1, fitted to each image)"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("raw,rwa", "unknown features: 'rwa'; choose from raw, subtract"),
        ("raw,raw", "one or more different features, separated by commas, got raw, raw; choose"),
        ([], "got none; choose from"),
    ],
    ids=str,
)
def test_error_for_wrong_names_lists_the_choices(names: str | list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_names(names, KINDS)
