"""Denoisers in files and on the hub: saving and loading, matching backbones, and error messages."""

from __future__ import annotations

import builtins
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny_artifact
from command import Dvit, in_process
from denoising_vit import SEEDS, Backbone, Denoiser, DenoiserError, FormatError, load_backbone, load_denoiser
from denoising_vit.backbones import loading
from denoising_vit.backbones import runtime as model_hub
from denoising_vit.backbones.recorded import describe
from denoising_vit.denoiser import (
    HUB_ID,
    fetch_published,
    published_file,
    published_variants,
    read_denoiser,
    write_denoiser,
)
from denoising_vit.denoiser import loading as denoiser_loading

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.usefixtures("no_network")]

DINOV2_S = "vit_small_patch14_dinov2.lvd142m"
DINOV2_B = "vit_base_patch14_dinov2.lvd142m"
DINO_S = "vit_small_patch16_224.dino"

State = dict[str, Tensor]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network and an empty hub cache."""
    monkeypatch.setattr(model_hub, "_reachable", lambda url: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def filled(
    channels: int = 64, grid: tuple[int, int] = (4, 4), blocks: int = 1, seed: int = 0, **more: dict[str, Any]
) -> Denoiser:
    """A frozen denoiser with random values in all parameters."""
    denoiser = Denoiser(channels, grid, blocks, **more).requires_grad_(False).eval()
    chance = torch.Generator().manual_seed(seed)
    for value in denoiser.parameters():
        value.copy_(torch.randn(value.shape, generator=chance) * 0.1)
    return denoiser


def features_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def assert_same(found: Denoiser, expected: Denoiser, *, half: bool = False) -> None:
    assert (found.embed_dim, found.grid, found.blocks) == (expected.embed_dim, expected.grid, expected.blocks)
    theirs, ours = expected.state_dict(), found.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value.half().float() if half else value), name


def tiny_backbone(seed: int = 0, channels: int = 64) -> Backbone:
    return tiny_artifact.backbone(seed=seed, channels=channels)


def renamed(backbone: Backbone, name: str) -> Backbone:
    backbone.name = name
    return backbone


def published(path: Path, denoiser: Denoiser, **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"denoiser": denoiser.state_dict(), **more}, path)
    return path


# Files written by the package


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (2, 8)], ids=str)
def test_written_file_is_read_back_rounded_to_half_precision(
    grid: tuple[int, int], blocks: int, tmp_path: Path
) -> None:
    about, info = describe(tiny_backbone()), {"steps": 7, "loss": [0.5, None], "photos": {"count": 3}}
    denoiser = filled(128, grid, blocks, trained_for=about, info=info)
    write_denoiser(denoiser, tmp_path / "own.safetensors")
    found = read_denoiser(tmp_path / "own.safetensors")
    assert_same(found, denoiser, half=True)
    assert found.trained_for == json.loads(json.dumps(about)) and found.info == info
    assert not found.training and all(value.dtype == torch.float32 for value in found.parameters())
    features = features_of(2, *grid, 128)
    torch.testing.assert_close(found(features), denoiser(features), rtol=0.02, atol=0.02)
    write_denoiser(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "own.safetensors").read_bytes()


def test_writing_does_not_change_a_bfloat16_denoiser_in_training(tmp_path: Path) -> None:
    denoiser = filled().bfloat16().train().requires_grad_(True)
    write_denoiser(denoiser, tmp_path / "own.safetensors")
    assert denoiser.training and denoiser.pos_embed.dtype == torch.bfloat16
    found = read_denoiser(tmp_path / "own.safetensors")
    torch.testing.assert_close(found.pos_embed, denoiser.pos_embed.float(), rtol=1e-3, atol=1e-6)
    assert (found.trained_for, found.info) == (None, {})


def test_values_are_float16_in_the_file(tmp_path: Path) -> None:
    write_denoiser(filled(), tmp_path / "own.safetensors")
    assert {value.dtype for value in load_file(tmp_path / "own.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize("name", ["own", "own.bin", "own.SAFETENSORS", "own.pth"])
def test_name_without_the_safetensors_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=rf"{re.escape(name)}: expected a name ending in \.safetensors"):
        write_denoiser(filled(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_raises_an_os_error_and_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        write_denoiser(filled(), tmp_path / "none" / "own.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("blocks", [1, 2])
def test_saved_folder_is_read_back_in_half_precision(blocks: int, tmp_path: Path) -> None:
    about, info = describe(tiny_backbone()), {"steps": 7}
    denoiser = filled(128, (5, 3), blocks, trained_for=about, info=info)
    denoiser.save_pretrained(tmp_path / "folder")
    found = Denoiser.from_pretrained(tmp_path / "folder")
    assert_same(found, denoiser, half=True)
    assert found.trained_for == json.loads(json.dumps(about)) and found.info == info
    assert_same(load_denoiser(tmp_path / "folder"), found)


def test_info_set_after_construction_is_saved_in_the_folder(tmp_path: Path) -> None:
    denoiser = filled()
    denoiser.trained_for, denoiser.info = describe(tiny_backbone()), {"steps": 7}
    denoiser.save_pretrained(tmp_path / "folder")
    found = Denoiser.from_pretrained(tmp_path / "folder")
    assert found.info == {"steps": 7} and found.trained_for is not None


def test_a_folder_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Such a folder was written by huggingface_hub's model mixin."""
    denoiser = filled(128, (5, 3), trained_for=describe(tiny_backbone()), info={"steps": 7})
    (tmp_path / "config.json").write_text(json.dumps(denoiser.config))
    save_file(denoiser.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    for found in (Denoiser.from_pretrained(tmp_path), load_denoiser(tmp_path)):
        assert_same(found, denoiser)
        assert found.info == {"steps": 7} and not found.training
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not a denoiser, or damaged"):
        Denoiser.from_pretrained(tmp_path)


# Published files


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "a.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_state_dict_is_read_from_each_kind_of_file(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    denoiser = filled(blocks=2).to(dtype)
    if name.endswith(".safetensors"):
        save_file(denoiser.state_dict(), tmp_path / name)
    else:
        torch.save({"denoiser": denoiser.state_dict(), "step": 3}, tmp_path / name)
    found = read_denoiser(tmp_path / name)
    assert_same(found, denoiser.float())
    assert found.trained_for is None


def test_home_folder_in_a_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_denoiser(filled(), tmp_path / "own.safetensors")
    assert_same(load_denoiser("~/own.safetensors"), filled(), half=True)


# Refused files


def refused(path: Path, *words: str) -> str:
    with pytest.raises(FormatError) as caught:
        load_denoiser(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert re.search(word, str(caught.value)), caught.value
    return str(caught.value)


@pytest.mark.parametrize("name", ["none.safetensors", "none.pth", "none"])
def test_missing_file_error_names_the_path(name: str, tmp_path: Path) -> None:
    refused(tmp_path / name, "no such denoiser file")
    with pytest.raises(FormatError, match=rf"{re.escape(str(tmp_path / name))}: no such denoiser file"):
        read_denoiser(tmp_path / name)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.9, 0.9999])
@pytest.mark.parametrize("name", ["own.safetensors", "published.pth", "old.pth"])
def test_truncated_file_error_names_the_path(name: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "own.safetensors":
        write_denoiser(filled(), path)
    else:
        content = {"denoiser": filled().state_dict()}
        torch.save(content, path, _use_new_zipfile_serialization=name != "old.pth")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(path, "damaged|empty|not a readable")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.txt"])
@pytest.mark.parametrize(
    "content",
    [b"hello", b"<!DOCTYPE html>", bytes(1000), b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04" * 9],
    ids=["text", "web page", "zeros", "git-lfs pointer", "start of a zip"],
)
def test_other_file_error_names_the_path_and_what_was_expected(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "not a readable safetensors or PyTorch weights file|convert it to safetensors")


def test_artifact_file_is_refused(tmp_path: Path) -> None:
    artifact = tiny_artifact.artifact_of(tiny_backbone())
    artifact.save(tmp_path / "artifact.safetensors")
    refused(
        tmp_path / "artifact.safetensors",
        "expected a safetensors file of 'denoising-vit/denoiser', got 'denoising-vit/artifact'",
    )


@pytest.mark.parametrize("content", [{}, {"denoiser": {}}, {"step": 3}, None, [torch.ones(2)], torch.ones(2)])
def test_error_for_a_file_without_tensors_names_the_expected_key(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "no tensors found; expected .* denoiser")


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    state = {f"model.{key}": value for key, value in timm.create_model("test_vit").state_dict().items()}
    torch.save({"model": state}, tmp_path / "distilled.pth")
    refused(tmp_path / "distilled.pth", "not a denoiser: expected pos_embed .*, got a whole model")
    torch.save({key.removeprefix("model."): value for key, value in state.items()}, tmp_path / "vit.pth")
    refused(tmp_path / "vit.pth", "not a denoiser: expected pos_embed .*, got a whole model")


def rewritten(path: Path, head: object, state: State | None = None) -> Path:
    """A denoiser file with another head; a head given as text is written unchanged."""
    text = head if isinstance(head, str) else json.dumps(head)
    save_file(filled().state_dict() if state is None else state, path, metadata={"denoising_vit": text})
    return path


def own_head(**other: object) -> dict[str, object]:
    own: dict[str, object] = {"format": "denoising-vit/denoiser", "format_version": 1, "grid": [4, 4]}
    return own | {"trained_for": None, "info": {}} | other


def test_valid_head_of_the_tests_below_is_read(tmp_path: Path) -> None:
    assert_same(read_denoiser(rewritten(tmp_path / "own.safetensors", own_head())), filled())


def test_a_newer_format_is_refused_with_both_versions(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "own.safetensors", own_head(format_version=2))
    refused(path, "format version 1 or lower, got 2", "upgrade denoising-vit")


DAMAGED_HEADS: dict[str, object] = {
    "no JSON": "{",
    "a list": [1],
    "a number": 3,
    "version in words": own_head(format_version="two"),
    "no version": {"format": "denoising-vit/denoiser", "format_version": None, "grid": [4, 4]},
    "grid of one side": own_head(grid=[16]),
    "grid of three sides": own_head(grid=[4, 4, 1]),
    "grid in words": own_head(grid="4x4"),
    "grid in fractions": own_head(grid=[2.5, 6.4]),
    "negative grid": own_head(grid=[-4, -4]),
    "another grid": own_head(grid=[4, 5]),
    "backbone without fingerprint": own_head(trained_for={"name": "vit"}),
    "backbone without name": own_head(trained_for={"fingerprint": [1.0]}),
    "backbone in words": own_head(trained_for="vit"),
    "info in words": own_head(info="seven steps"),
}


@pytest.mark.parametrize("head", DAMAGED_HEADS)
def test_damaged_head_error_names_the_path(head: str, tmp_path: Path) -> None:
    refused(rewritten(tmp_path / "own.safetensors", DAMAGED_HEADS[head]))


FC2 = "denoiser.mlp.fc2.weight"

DAMAGED_STATES: dict[str, tuple[Callable[[State], object], str]] = {
    "missing": (lambda state: state.pop(FC2), rf"1 tensors missing \({re.escape(FC2)}\)"),
    "extra": (lambda state: state.update(more=torch.ones(2)), r"1 unexpected \(more\)"),
    "a third block's": (lambda state: state.update({"denoiser.2.norm1.bias": torch.ones(64)}), "tensors missing"),
    "another shape": (lambda state: state.update({FC2: torch.ones(64, 64)}), rf"another shape \({re.escape(FC2)}\)"),
    "position of two dimensions": (lambda state: state.update(pos_embed=torch.ones(16, 64)), r"\(1, h w, C\)"),
    "position of a map": (lambda state: state.update(pos_embed=torch.ones(1, 64, 4, 4)), r"\(1, h w, C\)"),
    "two positions": (lambda state: state.update(pos_embed=torch.ones(2, 16, 64)), r"\(1, h w, C\)"),
    "position without places": (lambda state: state.update(pos_embed=torch.ones(1, 0, 64)), "0 positions does not fit"),
    "no square": (lambda state: state.update(pos_embed=torch.ones(1, 15, 64)), "15 positions does not fit"),
    "half a head": (lambda state: state.update(pos_embed=torch.ones(1, 16, 96)), "multiple of 64 channels, got 96"),
    "another width": (lambda state: state.update(pos_embed=torch.ones(1, 16, 128)), "of another shape"),
    "NaN": (lambda state: state[FC2].view(-1)[3].fill_(float("nan")), rf"{re.escape(FC2)} .*not finite"),
    "infinity": (lambda state: state["pos_embed"].view(-1)[3].fill_(float("inf")), "pos_embed .*not finite"),
}


@pytest.mark.parametrize("damage", DAMAGED_STATES)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_error_for_other_tensors_names_the_mismatch(name: str, damage: str, tmp_path: Path) -> None:
    state = filled().state_dict()
    change, words = DAMAGED_STATES[damage]
    change(state)
    if name == "a.pth":
        torch.save({"denoiser": state}, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    refused(tmp_path / name, words)


def test_values_beyond_half_precision_are_written_in_float32(tmp_path: Path) -> None:
    """In float16 they would be infinite, and the file could not be read back."""
    denoiser = filled()
    denoiser.pos_embed[0, 0, 0] = 1e5
    path = tmp_path / "own.safetensors"
    write_denoiser(denoiser, path)
    assert torch.equal(read_denoiser(path).pos_embed, denoiser.pos_embed)
    assert {name for name, value in load_file(path).items() if value.dtype == torch.float32} == {"pos_embed"}


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return builtins.open, (str(self.trace), "w")


@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.safetensors"])
@pytest.mark.parametrize("how", ["zip", "old", "pickle"])
def test_code_in_a_pickle_is_refused_and_never_run(how: str, name: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / name
    content = {"denoiser": filled().state_dict(), "optimizer": Evil(trace)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    refused(path)
    assert not trace.exists()


def test_pickle_of_the_test_above_would_run_code(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "trace"))).close()
    assert (tmp_path / "trace").exists()


# Loading for a backbone


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file of a denoiser that was trained for ``tiny_backbone()``."""
    path = tmp_path / "own.safetensors"
    write_denoiser(filled(trained_for=describe(tiny_backbone()), info={"steps": 7}), path)
    return path


def test_loaded_denoiser_is_frozen_and_in_evaluation_mode(own: Path) -> None:
    for denoiser in (load_denoiser(own), load_denoiser(str(own), backbone=tiny_backbone())):
        assert not denoiser.training
        assert not any(value.requires_grad for value in denoiser.parameters())
        assert denoiser.info == {"steps": 7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_denoiser_has_the_dtype_of_the_backbone(own: Path, dtype: torch.dtype) -> None:
    backbone = tiny_backbone().to(dtype=dtype)
    denoiser = load_denoiser(own, backbone=backbone)
    assert {value.dtype for value in denoiser.parameters()} == {dtype}
    features = backbone(torch.ones(1, 3, 56, 56))
    expected = load_denoiser(own)(features)
    assert float((denoiser(features) - expected).norm() / expected.norm()) < (0.03 if dtype == torch.bfloat16 else 1e-6)


def test_loaded_denoiser_is_on_the_device_of_the_backbone(own: Path) -> None:
    backbone = tiny_backbone()
    assert backbone.fingerprint  # computed before the backbone is moved to the meta device
    denoiser = load_denoiser(own, backbone=backbone.to("meta"))
    assert {value.device.type for value in denoiser.parameters()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loaded_denoiser_is_on_the_gpu_of_the_backbone(own: Path) -> None:
    here, there = tiny_backbone(), tiny_backbone().to("cuda")
    found = load_denoiser(own, backbone=there)(there(torch.ones(1, 3, 56, 56)))
    assert found.device.type == "cuda"
    expected = load_denoiser(own, backbone=here)(here(torch.ones(1, 3, 56, 56)))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)


def test_error_for_other_weights_names_both_backbones(own: Path) -> None:
    ours, other = tiny_backbone(), renamed(tiny_backbone(seed=1), "another")
    with pytest.raises(DenoiserError) as caught:
        load_denoiser(own, backbone=other)
    message = str(caught.value)
    assert ours.name in message and ours.fingerprint.short in message
    assert "another" in message and other.fingerprint.short in message
    assert message.index(ours.fingerprint.short) < message.index(other.fingerprint.short)


def test_error_for_a_backbone_of_another_width_names_both_widths(own: Path, tmp_path: Path) -> None:
    other = renamed(tiny_backbone(channels=6), "another")
    for path in (own, published(tmp_path / "a.pth", filled())):
        with pytest.raises(DenoiserError, match=r"denoiser has 64 channels, but another .* has 6\b"):
            load_denoiser(path, backbone=other)


def test_published_denoiser_fits_any_backbone_of_its_width(tmp_path: Path) -> None:
    path = published(tmp_path / "a.pth", filled())
    for seed in range(2):
        assert_same(load_denoiser(path, backbone=tiny_backbone(seed)), filled())


def test_denoiser_fits_a_renamed_bfloat16_copy_of_its_backbone(own: Path) -> None:
    assert load_denoiser(own, backbone=renamed(tiny_backbone(), "alias").to(dtype=torch.bfloat16)).embed_dim == 64


# Denoisers by name


@pytest.mark.parametrize("variant", ["voc_denoised", "imgnet_denoised"])
def test_without_a_network_the_error_says_what_to_download(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(DenoiserError) as caught:
        load_denoiser(variant, backbone=renamed(tiny_backbone(), DINOV2_B))
    message = str(caught.value)
    assert f"Download {variant}/{DINOV2_B}.pth of jjaiweiyang/DVT" in message
    assert "--denoiser FILE" in message
    assert "ConnectionError: no route to host" in message and "second line" not in message


def test_real_hub_client_without_a_network_fails_and_is_unchanged() -> None:
    with pytest.raises(DenoiserError, match=rf"Download {re.escape(published_file(DINOV2_S, 'voc_denoised'))} of"):
        fetch_published(DINOV2_S, "voc_denoised")
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_published_denoiser_is_fetched_for_the_backbone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def fetch(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(published(tmp_path / name, filled(), step=3))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    found = load_denoiser("voc_denoised", backbone=renamed(tiny_backbone(), DINOV2_S).to(dtype=torch.bfloat16))
    assert asked == [(HUB_ID, f"voc_denoised/{DINOV2_S}.pth")]
    assert found.pos_embed.dtype == torch.bfloat16 and not found.training
    assert_same(found.float(), filled().bfloat16().float())


def test_fetched_denoiser_of_another_width_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = published(tmp_path / "a.pth", filled(128))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: str(path))
    with pytest.raises(DenoiserError, match="has 128 channels"):
        load_denoiser("voc_denoised", backbone=renamed(tiny_backbone(), DINOV2_S))


def test_variant_name_needs_a_backbone() -> None:
    with pytest.raises(DenoiserError, match="voc_denoised was published for several models: also give the backbone"):
        load_denoiser("voc_denoised")


@pytest.mark.parametrize("variant", ["voc_distilled", "imgnet_distilled"])
def test_error_for_a_distilled_model_points_to_load_backbone(variant: str) -> None:
    for backbone in (None, renamed(tiny_backbone(), DINOV2_B)):
        with pytest.raises(DenoiserError, match=rf"{variant} is a whole model.*load_backbone\(name, weights=FILE\)"):
            load_denoiser(variant, backbone=backbone)


def test_baseline_is_not_a_denoiser() -> None:
    with pytest.raises((DenoiserError, FormatError), match="baseline"):
        load_denoiser("baseline")


def test_error_for_an_unpublished_variant_lists_the_published_ones() -> None:
    with pytest.raises(DenoiserError, match=rf"no imgnet_denoised .* {re.escape(DINOV2_S)}; published: voc_denoised"):
        load_denoiser("imgnet_denoised", backbone=renamed(tiny_backbone(), DINOV2_S))
    with pytest.raises(DenoiserError, match=r"no voc_denoised was published for Planted; `dvit models`"):
        load_denoiser("voc_denoised", backbone=tiny_backbone())


@pytest.mark.parametrize("name", ["", "voc_denoise", "resnet50", "vit_tiny_patch16_224", "a/b/c", "nowhere/at.pth"])
def test_unknown_name_is_named_in_the_error(name: str) -> None:
    with pytest.raises(FormatError, match=f"^{re.escape(name)}: no such denoiser file; expected a file, or the name"):
        load_denoiser(name)


@pytest.mark.parametrize("name", ["vit_giant_patch14_dinov2.lvd142m", "vit_base_patch16_224.mae"])
def test_error_for_a_model_without_a_shipped_denoiser(name: str) -> None:
    with pytest.raises(DenoiserError, match=f"the package has no denoiser for {re.escape(name)}.*voc_denoised"):
        load_denoiser(name)


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package that ships denoisers for two models."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    write_denoiser(filled(seed=1), folder / f"{DINOV2_S}.safetensors")
    write_denoiser(filled(seed=2), folder / "vit_base_patch16_224.dino.safetensors")
    monkeypatch.setattr(denoiser_loading, "_SHIPPED", folder)
    return folder


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("name", [DINOV2_S, DINOV2_S.split(".")[0]])
def test_model_name_loads_its_shipped_denoiser(name: str) -> None:
    assert_same(load_denoiser(name), filled(seed=1), half=True)


@pytest.mark.usefixtures("shipped")
def test_shipped_denoiser_is_not_used_for_other_pretrained_weights() -> None:
    assert_same(load_denoiser("vit_base_patch16_224.dino"), filled(seed=2), half=True)
    with pytest.raises(DenoiserError, match=r"no denoiser for vit_base_patch16_224\.mae"):
        load_denoiser("vit_base_patch16_224.mae")


# The hub


def test_hub_timeout_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise TimeoutError("timed out")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(DenoiserError, match=r"owner/name is not a file, .* from the hub \(TimeoutError: timed out\)"):
        load_denoiser("owner/name")


def test_hub_id_without_a_network_raises_a_denoiser_error() -> None:
    with pytest.raises(
        DenoiserError, match=r"owner/name is not a file, and denoiser\.safetensors of owner/name could not"
    ):
        load_denoiser("owner/name")
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A local folder that stands in for owner/name on the hub."""
    folder = tmp_path / "repository"

    def fetch(repo_id: str, filename: str, **_: object) -> str:
        assert repo_id == "owner/name"
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return folder


def test_a_hub_id_is_loaded_frozen_for_the_backbone(hub: Path) -> None:
    filled(grid=(5, 3), trained_for=describe(tiny_backbone())).save_pretrained(hub)
    found = load_denoiser("owner/name", backbone=tiny_backbone())
    assert_same(found, filled(grid=(5, 3)), half=True)
    assert not found.training and not any(value.requires_grad for value in found.parameters())
    with pytest.raises(DenoiserError, match="trained for Planted"):
        load_denoiser("owner/name", backbone=tiny_backbone(seed=1))


@pytest.mark.parametrize("damage", ["missing", "extra", "another shape", "NaN"])
def test_a_repository_with_other_tensors_is_refused(damage: str, hub: Path) -> None:
    """Missing tensors are not filled with random values."""
    filled().save_pretrained(hub)
    state = load_file(hub / "denoiser.safetensors")
    DAMAGED_STATES[damage][0](state)
    save_file(state, hub / "denoiser.safetensors")
    with pytest.raises(FormatError, match=f"denoiser.safetensors.*{DAMAGED_STATES[damage][1]}"):
        load_denoiser("owner/name")


# Published variants


def test_published_variants_of_the_seed_models() -> None:
    variants = {name: published_variants(name) for name in SEEDS}
    assert {name for name, found in variants.items() if "voc_denoised" in found} == set(list(SEEDS)[:12])
    distilled = {name for name, found in variants.items() if "voc_distilled" in found}
    assert distilled == {name for name in list(SEEDS)[:12] if "_base_" in name} and len(distilled) == 8
    for variant in ("imgnet_denoised", "imgnet_distilled"):
        assert [name for name, found in variants.items() if variant in found] == [DINOV2_B]
    assert variants[DINOV2_B] == ("voc_denoised", "voc_distilled", "imgnet_denoised", "imgnet_distilled")
    assert variants["vit_giant_patch14_dinov2.lvd142m"] == published_variants("resnet50") == ()


def test_files_are_named_as_in_the_repository() -> None:
    assert HUB_ID == "jjaiweiyang/DVT"
    assert published_file(DINOV2_B, "voc_distilled") == "voc_distilled/vit_base_patch14_dinov2.lvd142m.pth"


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    return in_process(capsys, monkeypatch)


def test_models_command_lists_the_published_variants(dvit: Dvit) -> None:
    printed = dvit("models")
    assert printed.code == 0
    lines = {line.split()[0]: line for line in printed.out.splitlines() if line.split() and line.split()[0] in SEEDS}
    assert lines.keys() == SEEDS.keys()
    for name, line in lines.items():
        expected = ", ".join(published_variants(name))
        assert line.rstrip().endswith(f" {expected or '-'}"), line
        assert line.count("denoised") + line.count("distilled") == len(published_variants(name))
    assert "jjaiweiyang/DVT" in printed.words and "voc_denoised/MODEL.pth" in printed.words


# Distilled models as weights of the backbone


class Distilled(nn.Module):
    """A distilled model as the authors save it: the timm model under ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def test_a_distilled_model_loads_as_the_weights_of_its_backbone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = timm.create_model(DINO_S, num_classes=0).eval()
    state = Distilled(model).state_dict()
    assert "model.patch_embed.proj.weight" in state
    torch.save({"model": state, "optimizer": {"state": {}}, "step": 3}, tmp_path / "distilled.pth")
    backbone = load_backbone(DINO_S, weights=tmp_path / "distilled.pth", dtype="float32", device="cpu")
    image = features_of(1, 3, 224, 224)
    with torch.no_grad():
        tokens = model.forward_features(image)[:, 1:]  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(backbone(image), tokens.unflatten(1, (14, 14)), rtol=1e-4, atol=1e-4)


def test_a_denoiser_given_as_the_weights_of_a_backbone_is_refused(tmp_path: Path) -> None:
    path = published(tmp_path / "denoiser.pth", filled())
    with pytest.raises(loading.WeightsError, match=re.escape(str(path))):
        load_backbone("test_vit", weights=path, dtype="float32", device="cpu")
