"""Artifacts, denoisers and weights in folders and hub repositories: equal outputs, model cards, no overwriting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

import denoising_vit as dv
import tiny_artifact
import tiny_denoiser
import tiny_distillation
import tiny_hub
from denoising_vit import Backbone
from denoising_vit.backbones.recorded import describe
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.distilled.weights import write_distilled
from denoising_vit.hub.card import CARD, CARD_MARK, KINDS
from denoising_vit.hub.pretrained import Pretrained, push_folder
from denoising_vit.training_free import with_registers

pytestmark = pytest.mark.usefixtures("one_thread")


def planted() -> Backbone:
    return tiny_denoiser.backbone()


def artifact() -> dv.Artifact:
    values = tiny_artifact.pattern(*tiny_artifact.GRID, tiny_denoiser.CHANNELS).half().float()
    return tiny_artifact.artifact_of(planted(), values)


def subspace() -> dv.Subspace:
    return dv.find_subspace(planted(), rank=5)


def denoiser() -> dv.Denoiser:
    return tiny_denoiser.denoiser(planted())


def vit() -> Backbone:
    return tiny_distillation.backbone(2)


def registers() -> dv.Registers:
    return dv.Registers(((0, 3), (1, 5)), describe(vit()), {"photos": 8, "before": 0.02})


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> dv.DistilledWeights:
    """A whole tiny ViT: a named model is built with all its blocks."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    backbone = dv.load_backbone(tiny_distillation.MODEL, weights="random", dtype="float32", device="cpu")
    state = cast("nn.Module", backbone.model).state_dict()
    write_distilled(state, path, {"backbone": describe(backbone), "info": {"photos": 11}, "step": 4})
    return dv.DistilledWeights.load(path)


#: For each kind: a function that creates it, and one that returns its extractor.
PIECES: dict[str, tuple[Callable[[], Any], Callable[[Any], Callable[[Tensor], Tensor]]]] = {
    "artifact": (artifact, lambda piece: DenoisedViT(planted(), piece)),
    "subspace": (subspace, lambda piece: DenoisedViT(planted(), piece)),
    "denoiser": (denoiser, lambda piece: DenoisedViT(planted(), piece)),
    "registers": (registers, lambda piece: with_registers(vit(), piece)),
}


def images() -> Tensor:
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PIECES)
def test_saved_folder_gives_the_same_outputs_and_has_a_card(name: str, tmp_path: Path) -> None:
    make, extractor = PIECES[name]
    piece = make()
    piece.save_pretrained(tmp_path / "new" / "folder", figures={"what was measured": 0.25})
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == [CARD, f"{name}.safetensors"]
    found = type(piece).from_pretrained(folder)
    assert torch.equal(extractor(found)(images()), extractor(piece)(images()))
    card = (folder / CARD).read_text()
    assert card.startswith("---\nlibrary_name: denoising-vit\n") and str(CARD_MARK) in card
    assert f'{type(piece).__name__}.from_pretrained("PATH")' in card
    assert "| what was measured | 0.25 |" in card
    assert f"| backbone | {piece.trained_for['name'] if name == 'denoiser' else piece.backbone['name']} |" in card
    assert "licence of the backbone's weights is not recorded" in card


def test_distilled_weights_give_the_same_outputs(distilled: dv.DistilledWeights, tmp_path: Path) -> None:
    distilled.save_pretrained(tmp_path)
    found = dv.DistilledWeights.from_pretrained(tmp_path)
    assert found.path == tmp_path / "distilled.safetensors" and found.record == distilled.record
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    expected = distilled.backbone(**options)(images())
    assert torch.equal(found.backbone(**options)(images()), expected)
    named = dv.load_backbone(tiny_distillation.MODEL, weights=distilled.path, **options)
    assert torch.equal(named(images()), expected)
    card = (tmp_path / CARD).read_text()
    assert "| photos | 11 |" in card and "| step | 4 |" in card
    found.save_pretrained(tmp_path)  # into its own folder
    assert dv.DistilledWeights.from_pretrained(tmp_path).record == distilled.record


def test_artifact_and_subspace_share_a_folder_and_its_card(tmp_path: Path) -> None:
    artifact().save_pretrained(tmp_path)
    subspace().save_pretrained(tmp_path)
    card = (tmp_path / CARD).read_text()
    assert "## Artifact G" in card and "## Subspace" in card and card.count("## Licence") == 1
    assert dv.Artifact.from_pretrained(tmp_path).grid == tiny_artifact.GRID
    assert dv.Subspace.from_pretrained(tmp_path).rank == 5


def test_card_has_no_local_paths(tmp_path: Path) -> None:
    piece = artifact()
    piece.backbone["weights"] = "/home/someone/weights.safetensors"
    piece.save_pretrained(tmp_path)
    assert "| backbone, weights | weights.safetensors |" in (tmp_path / CARD).read_text()
    assert "someone" not in (tmp_path / CARD).read_text()


def test_kinds_and_pretrained_classes_match() -> None:
    classes = {dv.Artifact, dv.Subspace, dv.Registers, dv.Denoiser, dv.DistilledWeights}
    assert {found.FORMAT for found in classes} == set(KINDS)
    assert set(Pretrained.__subclasses__()) == classes


def test_files_from_elsewhere_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("# My notes\n")
    with pytest.raises(dv.DenoisingVitError, match=r"README.md exists and was not written by this command"):
        artifact().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CARD]
    (tmp_path / CARD).unlink()
    registers().save(tmp_path / "artifact.safetensors")
    before = (tmp_path / "artifact.safetensors").read_bytes()
    with pytest.raises(
        dv.DenoisingVitError, match=r"artifact.safetensors exists and is not a denoising-vit/artifact file"
    ):
        artifact().save_pretrained(tmp_path)
    assert (tmp_path / "artifact.safetensors").read_bytes() == before


def test_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    subspace().save_pretrained(tmp_path)
    with pytest.raises(
        dv.FormatError, match=r"expected a file artifact.safetensors .*, found README.md, subspace.safe"
    ):
        dv.Artifact.from_pretrained(tmp_path)
    with pytest.raises(dv.FormatError, match=r"nowhere: expected a folder, or a hub id like owner/name"):
        dv.Artifact.from_pretrained("nowhere")
    assert dv.Subspace.from_pretrained(tmp_path / "subspace.safetensors").rank == 5  # a file is accepted too
    with pytest.raises(dv.FormatError, match="expected a file written by dvit distill"):
        dv.DistilledWeights.load(tmp_path / "subspace.safetensors")


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tiny_hub.Hub:
    return tiny_hub.installed(tmp_path / "hub", monkeypatch)


@pytest.mark.parametrize("name", PIECES)
def test_pushed_files_can_be_loaded(name: str, hub: tiny_hub.Hub) -> None:
    make, extractor = PIECES[name]
    piece = make()
    assert piece.push_to_hub("owner/name", private=True) == "https://hub/owner/name"
    assert hub.private
    assert piece.push_to_hub("owner/name")  # again, over the package's own card
    found = type(piece).from_pretrained("owner/name", revision="v1")
    assert torch.equal(extractor(found)(images()), extractor(piece)(images()))


def test_push_leaves_out_other_files_of_the_folder(hub: tiny_hub.Hub, tmp_path: Path) -> None:
    artifact().save_pretrained(tmp_path / "own")
    subspace().save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "diagnosis.html").write_text("photos")
    push_folder(tmp_path / "own", "owner/name")
    pushed = {"artifact.safetensors", "subspace.safetensors", CARD, ".gitattributes"}
    assert set(hub.list_repo_files("owner/name")) == pushed


@pytest.mark.parametrize("theirs", [CARD, "model.safetensors"])
def test_repository_with_other_files_is_not_overwritten(theirs: str, hub: tiny_hub.Hub) -> None:
    hub.create_repo("owner/name", private=None, exist_ok=True)
    (hub.root / "owner/name" / theirs).write_text("theirs")
    with pytest.raises(dv.DenoisingVitError, match="owner/name has files from another source on the hub"):
        artifact().push_to_hub("owner/name")
    assert set(hub.list_repo_files("owner/name")) == {".gitattributes", theirs}


def test_hub_failures_raise_a_hub_error(hub: tiny_hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        dv.HubError, match=r"artifact.safetensors of owner/name could not be downloaded from the hub \(File"
    ):
        dv.Artifact.from_pretrained("owner/name")

    def fail(*_: object, **__: object) -> None:
        raise PermissionError("no access")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: SimpleNamespace(create_repo=fail))
    with pytest.raises(
        dv.HubError, match=r"owner/name: could not be uploaded to the hub \(PermissionError: no access\)"
    ):
        artifact().push_to_hub("owner/name")
