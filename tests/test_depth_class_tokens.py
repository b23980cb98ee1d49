"""Class tokens with features: where they come from, what replaces them, and how probes use them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from denoising_vit import Artifact, Denoiser
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from denoising_vit.backbones.recorded import describe
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.depth import PAPER, QUICK, LinearDepth
from denoising_vit.evaluation.depth.samples import KeptDepth
from denoising_vit.evaluation.features import FeatureCache, see
from denoising_vit.evaluation.sources import ExtractorSource, FeatureSource, FieldSource
from denoising_vit.training_free import AveragedViT
from denoising_vit.views.crops import Crop
from tiny_depth import PATCH, backbone, blocky, data_of, flat, set_of, token_backbone, with_token

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)

#: Number of channels, which a denoiser accepts.
CHANNELS = 64


def wide(image: Tensor) -> Tensor:
    """Class token, a register and patches (B, 2 + h w, 64), each a different mix of colours."""
    patches = torch.nn.functional.avg_pool2d(image, PATCH).flatten(2).transpose(1, 2)
    mean = image.mean((2, 3))[:, None]
    mixes = torch.randn(3, 3, CHANNELS, generator=torch.Generator().manual_seed(0))
    return torch.cat([mean @ mixes[0], mean @ mixes[1], patches @ mixes[2]], 1)


def wide_without(image: Tensor) -> Tensor:
    """The same without class token and register."""
    return wide(image)[:, 2:]


def artifact_of(of: Backbone) -> Artifact:
    about = describe(of) | {"stride": of.stride, "patch_size": of.patch_size}
    values = torch.randn(12, 12, CHANNELS, generator=torch.Generator().manual_seed(1))
    return Artifact(values, (48, 48), about, {"views": 16, "photos": ["a.jpg", "b.jpg"]})


def denoiser_of(of: Backbone) -> Denoiser:
    made = Denoiser(CHANNELS, (4, 5), trained_for=describe(of))
    chance = torch.Generator().manual_seed(0)
    for value in made.requires_grad_(False).parameters():
        value.copy_(torch.randn(value.shape, generator=chance) * 0.1)
    return made.eval()


def sources_of(of: Backbone) -> dict[str, FeatureSource]:
    """Sources of a comparison, all made from one frozen backbone."""
    return {
        "raw": ExtractorSource("raw", of),
        "subtract": ExtractorSource("subtract", of, DenoisedViT(of, artifact_of(of))),
        "denoiser": ExtractorSource("denoiser", of, DenoisedViT(of, denoiser_of(of))),
        "average": ExtractorSource("average", of, AveragedViT(of, 2)),
        "function": ExtractorSource("function", of, lambda image: of(image)[..., :7] ** 2),
        "exact": FieldSource("exact", of, {}, {}),
    }


def backbone_of(prefix: bool) -> Backbone:
    return token_backbone(wide if prefix else wide_without)


@pytest.fixture
def shown(tmp_path: Path) -> list:
    images = set_of(tmp_path, blocky(3, 0))
    return [(image, Crop.whole((32, 48))) for image in images.images]


NAMES = ["raw", "subtract", "denoiser", "average", "function", "exact"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", [True, False], ids=["token", "mean"])
def test_class_tokens_come_from_the_frozen_backbone(shown: list, name: str, prefix: bool) -> None:
    """The first prefix token, or the mean of the features if there is none."""
    of = backbone_of(prefix)
    found = list(see(sources_of(of)[name].class_tokens(), shown))
    raw = ExtractorSource("raw", of)
    for (image, crop), token in zip(shown, found, strict=True):
        inputs = raw.inputs(image, crop)[None]
        tokens = (wide if prefix else wide_without)(inputs)
        assert token.shape == (1, 1, CHANNELS)
        torch.testing.assert_close(token[0, 0], tokens[0, 0] if prefix else tokens[0].mean(0), rtol=2e-3, atol=1e-3)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


@pytest.mark.parametrize("name", NAMES[:5])
@pytest.mark.parametrize("prefix", [True, False], ids=["token", "mean"])
def test_one_pass_gives_the_same_features_and_class_tokens_as_two(shown: list, name: str, prefix: bool) -> None:
    source = sources_of(backbone_of(prefix))[name]
    inputs = torch.stack([source.inputs(image, crop) for image, crop in shown])
    features, token = source.features_and_class(inputs)
    torch.testing.assert_close(features, source.features(inputs))
    torch.testing.assert_close(token, source.class_tokens().features(inputs))
    assert token.shape == (3, 1, 1, CHANNELS)


def test_extractor_that_is_a_backbone_has_its_own_class_tokens(shown: list) -> None:
    """For example a distilled model, which is evaluated in place of its teacher."""
    own = token_backbone()
    source = ExtractorSource("distilled", backbone_of(True), own)
    inputs = torch.stack([source.inputs(image, crop) for image, crop in shown])
    wanted = with_token(inputs)[:, :1, None]
    torch.testing.assert_close(source.features_and_class(inputs)[1], wanted)
    torch.testing.assert_close(source.class_tokens().features(inputs), wanted)


def test_class_tokens_use_the_same_normalisation_as_features(shown: list) -> None:
    of = backbone_of(True)
    source = ExtractorSource("raw", of, None, {}, IMAGENET)
    image, crop = shown[0]
    inputs = source.inputs(image, crop)
    assert torch.equal(source.class_tokens().inputs(image, crop), inputs)
    assert not torch.allclose(ExtractorSource("raw", of).class_tokens().inputs(image, crop), inputs)


def test_cache_separates_class_tokens_features_and_normalisations(shown: list, tmp_path: Path) -> None:
    of, cache = backbone_of(True), FeatureCache(tmp_path / "cache")
    plain, other = ExtractorSource("raw", of), ExtractorSource("raw", of, None, {"normalisation": "x"}, IMAGENET)
    sources = [plain, plain.class_tokens(), other, other.class_tokens()]
    paths = {cache.path(source, shown[0]) for source in sources}
    assert len(paths) == 4
    # Cleaning does not change class tokens.
    assert cache.path(sources_of(of)["subtract"].class_tokens(), shown[0]) in paths
    first = [list(see(source, shown, cache)) for source in sources]
    again = [list(see(source, shown, cache)) for source in sources]
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert sum(1 for _ in (tmp_path / "cache").rglob("*.safetensors")) == 12


def test_non_finite_class_tokens_are_rejected(shown: list) -> None:
    def broken(image: Tensor) -> Tensor:
        tokens = wide(image).clone()
        tokens[:, 0] = float("nan")
        return tokens

    source = ExtractorSource("raw", token_backbone(broken))
    with pytest.raises(EvaluationError, match="feature values are not finite"):
        list(see(source.class_tokens(), shown))
    with pytest.raises(EvaluationError, match="feature values are not finite"):
        source.features_and_class(source.inputs(*shown[0])[None])


def test_fields_cannot_give_features_and_class_tokens_in_one_pass() -> None:
    source = sources_of(backbone_of(True))["exact"]
    with pytest.raises(EvaluationError, match=r"exact: stage 1 fields .*--preset quick"):
        source.features_and_class(torch.zeros(1, 8, 12, CHANNELS))


# --- Probes


def test_kept_samples_have_the_class_token_of_each_image(tmp_path: Path) -> None:
    source = ExtractorSource("raw", token_backbone())
    kept = KeptDepth.take(source, set_of(tmp_path, [flat(2), flat(4)]), QUICK, None)
    assert kept.channels == 6
    assert [round(255 * float(token[0, 0, 0])) for token in kept.tokens] == [80, 160]
    without = KeptDepth.take(source, set_of(tmp_path / "b", [flat(2)]), replace(QUICK, class_token=False), None)
    assert without.channels == 3 and not without.tokens
    assert without.of([0]).channels == 3 and kept.of([1]).truths[0].mean() == 4


@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_probe_learns_depth_that_only_the_class_token_encodes(tmp_path: Path, preset: str) -> None:
    pictures = [flat(metres) for metres in np.linspace(1.5, 5.5, 8)]
    data = data_of(tmp_path / "flat", [pictures[(3 * number) % 8] for number in range(8)])
    tiny = replace(PAPER, crop=(24, 32), rotate=0.0, gamma=(1, 1), brightness=(1, 1), colour=(1, 1))
    protocol = replace(
        QUICK if preset == "quick" else tiny, steps=40, warmup=4, batch=2, learning_rate=0.5, mean_first=0, bins=16
    )
    found = []
    for class_token in (True, False):
        source = ExtractorSource("raw", token_backbone())
        ((_, outcome, _),) = LinearDepth(source, data, replace(protocol, class_token=class_token)).probes([0])
        found.append(outcome.scored()["RMSE"])
    assert found[0] < 0.4 < 1.0 < found[1]


def test_backbone_without_class_token_uses_the_mean_of_its_features(tmp_path: Path) -> None:
    source = ExtractorSource("raw", backbone())
    kept = KeptDepth.take(source, set_of(tmp_path, blocky(2, 0)), QUICK, None)
    assert kept.channels == 6
    for features, token in zip(kept.features, kept.tokens, strict=True):
        torch.testing.assert_close(token[0, 0].float(), features.float().mean((0, 1)), rtol=2e-3, atol=1e-3)


def test_backbone_with_registers_has_its_own_class_tokens() -> None:
    """Registers change tokens so little that the fingerprint may match that of the frozen backbone."""
    of = token_backbone()
    raw = ExtractorSource("raw", of).class_tokens()
    other = ExtractorSource("registers", of, of, {"registers": "1234"}).class_tokens()
    assert raw.identity != other.identity
