"""Some damaged files of every kind; `python tests/fuzz.py` tries thousands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fuzz
from denoising_vit.backbones.recorded import names_backbone
from denoising_vit.data import open_dataset
from denoising_vit.errors import PhotoError, StoreError
from denoising_vit.store import Manifest
from denoising_vit.store.layout import checked

#: Mutations of each kind.
COUNT = 20

KINDS = ("photo", "list", "shard", "decomposition", "artifact", "denoiser", "palette", "matrix")
KINDS += ("manifest", "marker", "failure", "staged", "results")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Kind]:
    return fuzz.kinds(tmp_path_factory.mktemp("seeds"))


def test_every_kind_is_tried(kinds: dict[str, fuzz.Kind]) -> None:
    assert tuple(kinds) == KINDS


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_raise_errors_of_this_package(kinds: dict[str, fuzz.Kind], name: str, tmp_path: Path) -> None:
    found = list(fuzz.failures(name, kinds[name], COUNT, 0, tmp_path))
    assert not found, f"mutation {found[0][0]} of {name}: {found[0][1]}"


@pytest.mark.parametrize("name", [name for name in KINDS if name != "list"])
def test_intact_files_are_read(kinds: dict[str, fuzz.Kind], name: str, tmp_path: Path) -> None:
    for number, content in enumerate(kinds[name].seeds):
        path = tmp_path / f"{number}{kinds[name].suffix}"
        path.write_bytes(content)
        kinds[name].read(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("count", "x"), ("count", 2**70), ("ids_digest", 1), ("backbone", []), ("grid", [3]), ("field", [3.5, 4])],
)
def test_manifest_with_wrong_types_is_damaged(kinds: dict[str, fuzz.Kind], name: str, value: object) -> None:
    content = json.loads(kinds["manifest"].seeds[0])
    with pytest.raises(StoreError, match=f"store: damaged manifest .unexpected value for {name}"):
        Manifest.from_json(json.dumps(content | {name: value}), "store")


def test_invalid_fsspec_address_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("filecache://a\n")
    with pytest.raises(PhotoError, match=r"filecache://a: expected a path or an fsspec address"):
        open_dataset(tmp_path / "list.txt")


@pytest.mark.parametrize("change", [{"fingerprint": []}, {"fingerprint": [2**70]}, {"digest": 1}, {"name": None}])
def test_invalid_records_name_no_backbone(change: dict[str, object]) -> None:
    assert names_backbone(fuzz.BACKBONE)
    assert not names_backbone(fuzz.BACKBONE | change)


@pytest.mark.parametrize("record", ["x", True, None])
def test_record_that_is_not_an_object_is_refused(record: object) -> None:
    with pytest.raises(ValueError, match="expected a JSON object"):
        checked(record)
