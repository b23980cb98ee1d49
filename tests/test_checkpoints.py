"""Checkpoints of training scripts: the model in them is found, and no code in them is executed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from denoising_vit import Backbone, Denoiser, FormatError, WeightsError, load_backbone, load_denoiser
from denoising_vit.backbones.weights import models_among, read_state_dict

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "test_vit"

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """State of a ViT whose weights differ from those of ``weights="random"``."""
    torch.manual_seed(11)
    return timm.create_model(NAME, num_classes=0).state_dict()


def other(state: State) -> State:
    return {name: value + 1 for name, value in state.items()}


def before(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def within(wrapper: str, state: State) -> State:
    """Rename blocks as if they were compiled or sharded one by one."""
    return {name.replace(".attn.", f".{wrapper}.attn."): value for name, value in state.items()}


def denoiser(**options: Any) -> Denoiser:
    torch.manual_seed(5)
    return Denoiser(64, (3, 3), **options).requires_grad_(False).eval()


def trained(model: nn.Module) -> tuple[State, dict[str, Any]]:
    """Parameters, and the optimizer state after two steps of a schedule in a NumPy array."""
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-5)
    for rate in np.concatenate([np.linspace(0, 1e-3, 2), 1e-6 + 1e-3 * np.cos(np.arange(2))])[1:3]:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        sum(value.square().sum() for value in model.parameters()).backward()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    model.requires_grad_(False)
    assert isinstance(optimizer.state_dict()["param_groups"][0]["lr"], np.float64)
    return model.state_dict(), optimizer.state_dict()


def load(path: Path, name: str = NAME) -> Backbone:
    return load_backbone(name, weights=path, dtype="float32", device="cpu")


def assert_loads(content: object, state: State, folder: Path) -> None:
    torch.save(content, folder / "weights.pth")
    loaded = load(folder / "weights.pth").state_dict()
    for name, value in state.items():
        assert torch.equal(loaded[f"model.{name}"], value), name


def same_denoiser(found: Denoiser, expected: Denoiser) -> bool:
    features = torch.randn(1, 3, 3, 64, generator=torch.Generator().manual_seed(0))
    return torch.equal(found(features), expected(features))


# Checkpoints of the released training scripts


def test_denoiser_saved_with_its_optimizer_is_read(tmp_path: Path) -> None:
    model = denoiser()
    state, optimizer = trained(model)
    torch.save({"denoiser": state, "optimizer": optimizer, "step": 1}, tmp_path / "ckpt_000001.pth")
    assert same_denoiser(load_denoiser(tmp_path / "ckpt_000001.pth"), model)


def test_distilled_model_saved_with_its_optimizer_is_read(tmp_path: Path) -> None:
    model = nn.ModuleDict({"model": timm.create_model(NAME, num_classes=0)})
    state, optimizer = trained(model)
    torch.save({"model": state, "optimizer": optimizer, "step": np.int64(1)}, tmp_path / "ckpt.pth")
    loaded = load(tmp_path / "ckpt.pth").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_numpy_scalars_under_their_older_module_name_are_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": denoiser().state_dict(), "lr": np.float64(0.1)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert same_denoiser(load_denoiser(path), denoiser())


def test_numpy_objects_cannot_execute_code(tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
            return open, (str(trace), "w")

    model = denoiser().state_dict()
    for number, hidden in enumerate((np.array([Evil()], dtype=object), np.array([1.0]), np.dtype("O"))):
        path = tmp_path / f"{number}.pth"
        torch.save({"denoiser": model, "lr": np.float64(1), "more": hidden, "evil": Evil()}, path)
        with pytest.raises(FormatError, match="code in checkpoints is never executed"):
            load_denoiser(path)
        assert not trace.exists()


# Wrappings of a ViT

WRAPPINGS: dict[str, Callable[[State], object]] = {
    "compiled": lambda state: before("_orig_mod.", state),
    "compiled within data parallelism": lambda state: {"model": before("module._orig_mod.", state)},
    "data parallelism within compiled": lambda state: before("_orig_mod.module.", state),
    "blocks compiled": lambda state: within("_orig_mod", state),
    "blocks sharded": lambda state: before("_fsdp_wrapped_module.", within("_fsdp_wrapped_module", state)),
    "blocks with checkpoints": lambda state: within("_checkpoint_wrapped_module", state),
    "patch embedding compiled": lambda state: {
        name.replace("patch_embed.", "patch_embed._orig_mod."): value for name, value in state.items()
    },
    "prefix encoder.": lambda state: {"state_dict": before("encoder.", state) | {"head.weight": torch.ones(3)}},
    "prefix vit.": lambda state: before("vit.", state),
    "prefix visual.trunk.": lambda state: before("visual.trunk.", state) | {"logit_scale": torch.ones(())},
    "a prefix of several parts": lambda state: {"state_dict": before("net.image_encoder.vit.model.", state)},
    "under model_ema": lambda state: {"model_ema": state, "epoch": 3},
    "under state_dict_ema beside the model": lambda state: {"state_dict_ema": state, "state_dict": other(state)},
    "average beside the model": lambda state: {"model": other(state), "model_ema": before("module.", state)},
    "teacher beside the student": lambda state: {
        "student": before("module.backbone.", other(state)),
        "teacher": before("backbone.", state),
    },
    "teacher after the student in one dictionary": lambda state: (
        before("student.backbone.", other(state)) | before("teacher.backbone.", state)
    ),
    "target of a predictor": lambda state: {
        "encoder": before("module.", other(state)),
        "target_encoder": before("module.", state),
    },
    "the student alone": lambda state: {"student": state, "predictor": {"weight": torch.ones(3)}},
    "a distilled one under denoiser": lambda state: {"denoiser": before("model.", state)},
    "along with its denoiser": lambda state: {
        "model": before("vit.model.", state) | denoiser().state_dict(),
    },
    "blocks in chunks": lambda state: {
        "teacher": {
            f"backbone.{name.replace('blocks.', f'blocks.{int(name.split(chr(46))[1]) // 3}.')}"
            if name.startswith("blocks.")
            else f"backbone.{name}": value
            for name, value in state.items()
        }
    },
    "with a command line": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, name="vit")},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_vit_is_found_in_wrapped_checkpoints(wrapping: str, state: State, tmp_path: Path) -> None:
    assert_loads(WRAPPINGS[wrapping](state), state, tmp_path)


def test_student_of_the_requested_size_is_preferred_to_a_larger_teacher(state: State, tmp_path: Path) -> None:
    larger = VisionTransformer(img_size=160, patch_size=16, embed_dim=96, depth=2, num_heads=2, num_classes=0)
    assert_loads({"teacher": larger.state_dict(), "student": state}, state, tmp_path)


@pytest.mark.parametrize("name", ["weights.SAFETENSORS", "weights.pth", "weights", "weights.bin"])
def test_safetensors_file_is_recognised_by_its_content(name: str, state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / name)
    assert torch.equal(load(tmp_path / name).get_parameter("model.norm.bias"), state["norm.bias"])
    save_file(denoiser().state_dict(), tmp_path / name)
    assert same_denoiser(load_denoiser(tmp_path / name), denoiser())


def test_pytorch_file_is_recognised_by_its_content(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.safetensors")
    assert torch.equal(load(tmp_path / "weights.safetensors").get_parameter("model.norm.bias"), state["norm.bias"])


# Wrappings of a denoiser

DENOISERS: dict[str, Callable[[State], object]] = {
    "under denoiser": lambda state: {"denoiser": state, "step": 3},
    "under model": lambda state: {"model": state},
    "bare": lambda state: state,
    "compiled": lambda state: {"denoiser": before("_orig_mod.", state)},
    "data parallel": lambda state: {"denoiser": before("module.", state)},
    "under a prefix": lambda state: {"state_dict": before("net.", state)},
    "average beside it": lambda state: {"denoiser": other(state), "denoiser_ema": state},
    "along with the ViT": lambda state: {
        "model": state | before("vit.model.", timm.create_model(NAME, num_classes=0).state_dict())
    },
}


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("wrapping", DENOISERS)
def test_denoiser_is_found_in_wrapped_checkpoints(wrapping: str, blocks: int, tmp_path: Path) -> None:
    model = denoiser(blocks=blocks)
    torch.save(DENOISERS[wrapping](model.state_dict()), tmp_path / "denoiser.pth")
    assert same_denoiser(load_denoiser(tmp_path / "denoiser.pth"), model)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5)], ids=str)
def test_a_denoiser_without_a_position_embedding_adds_none(grid: tuple[int, int], blocks: int, tmp_path: Path) -> None:
    model = denoiser(blocks=blocks)
    features = torch.randn(2, *grid, 64, generator=torch.Generator().manual_seed(0))
    expected = model.denoiser(features.flatten(1, 2)).unflatten(1, grid)
    state = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    torch.save({"denoiser": state, "step": 3}, tmp_path / "denoiser.pth")
    torch.testing.assert_close(load_denoiser(tmp_path / "denoiser.pth")(features), expected)


# Rejected checkpoints and the reasons given


def refused(content: object, folder: Path, words: str) -> None:
    torch.save(content, folder / "weights.pth")
    with pytest.raises(WeightsError, match=words):
        load(folder / "weights.pth")


def test_mismatched_vit_is_reported_with_its_prefix_and_keys(state: State, tmp_path: Path) -> None:
    short = {name: value for name, value in state.items() if not name.startswith("blocks.5.")}
    content = {"state_dict": before("net.vit.", short) | {"net.head.weight": torch.ones(3)}}
    words = (
        r"the ViT under 'state_dict\.net\.vit\.' do not fit test_vit: "
        r"12 missing \(blocks\.5\.norm1.*; 1 not under this prefix \(state_dict\.net\.head\.weight\)"
    )
    refused(content, tmp_path, words)


def test_ambiguous_vits_are_rejected(state: State, tmp_path: Path) -> None:
    content = {"state_dict": before("base_encoder.", state) | before("momentum_encoder.", other(state))}
    refused(
        content,
        tmp_path,
        r"under 'state_dict\.base_encoder\.', 'state_dict\.momentum_encoder\.', .*save the one to use",
    )


def test_same_name_with_and_without_a_wrapper_is_rejected(state: State, tmp_path: Path) -> None:
    refused({"model": state, "module": {"model": other(state)}}, tmp_path, r"two tensors named model\.cls_token")


@pytest.mark.parametrize(
    "key",
    [
        "embeddings.patch_embeddings.projection.weight",  # DINOv2, ViT, DeiT
        "vit.embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.weight",  # DINOv3
        "vision_model.embeddings.patch_embedding.weight",  # CLIP, SigLIP
    ],
)
def test_hugging_face_names_suggest_the_hf_loader(key: str, tmp_path: Path) -> None:
    refused(
        {key: torch.ones(64, 3, 16, 16)},
        tmp_path,
        r"tensor name of Hugging Face transformers.*load_backbone\('hf:FOLDER'\)",
    )


def test_denoiser_given_as_weights_is_recognised(tmp_path: Path) -> None:
    refused({"denoiser": denoiser().state_dict()}, tmp_path, "a denoiser, not the weights of test_vit; load it with")


def test_vit_given_as_a_denoiser_is_recognised(state: State, tmp_path: Path) -> None:
    for content in ({"denoiser": before("model.", state)}, {"denoiser": state}, state):
        torch.save(content, tmp_path / "vit.pth")
        with pytest.raises(FormatError, match=r"a whole model \(load it with weights=FILE"):
            load_denoiser(tmp_path / "vit.pth")


def test_convolutional_denoiser_is_rejected_as_unsupported(tmp_path: Path) -> None:
    convolutions = {"denoiser.0.weight": torch.ones(32, 64, 1, 1), "denoiser.0.bias": torch.ones(32)}
    torch.save({"denoiser": convolutions}, tmp_path / "a.pth")
    with pytest.raises(FormatError, match="a convolutional denoiser, which is not supported"):
        load_denoiser(tmp_path / "a.pth")


def test_recursive_dictionary_is_rejected(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": {}}
    content["model"]["model"] = content
    refused(content, tmp_path, "not a readable safetensors or PyTorch weights file")


# Single functions


def test_optimizer_states_and_wrapper_names_are_removed(tmp_path: Path) -> None:
    one, two = torch.ones(1), torch.ones(2)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}}
    torch.save({"a": {"module.b": one, 7: {"_orig_mod": {"c": two}}}, "optimizer": optimizer}, tmp_path / "a.pth")
    found = {name: len(value) for name, value in read_state_dict(tmp_path / "a.pth").items()}
    assert found == {"a.b": 1, "a.7.c": 2}


def test_models_are_ordered_from_teacher_to_student() -> None:
    names = ("student", "b", "a", "model_ema", "teacher", "teachers")
    tensors = {f"{name}.x.{leaf}": torch.ones(()) for name in names for leaf in ("mark", "more")}
    found = models_among(tensors, "mark")
    assert list(found) == ["teacher.x.", "model_ema.x.", "a.x.", "b.x.", "teachers.x.", "student.x."]
    assert all(list(model) == ["mark", "more"] for model in found.values())


def test_files_can_be_read_by_several_threads_at_once(tmp_path: Path) -> None:
    model = denoiser()
    state, optimizer = trained(model)
    torch.save({"denoiser": state, "optimizer": optimizer}, tmp_path / "a.pth")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: same_denoiser(load_denoiser(tmp_path / "a.pth"), model), range(64)))
    assert all(found)
