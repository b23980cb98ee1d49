"""Public names of the package, each imported on first use."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import denoising_vit as dv

STUB = Path(dv.__file__).with_suffix(".pyi")


def test_every_public_name_exists_and_is_listed() -> None:
    assert len(dv.__all__) > 30
    for name in dv.__all__:
        assert getattr(dv, name) is not None, name
        assert name in dir(dv)


def test_public_names_match_the_stub() -> None:
    imports = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: f"denoising_vit.{node.module}" for node in imports for alias in node.names}
    assert sorted(homes) == sorted(dv.__all__)
    for name, home in homes.items():
        assert getattr(dv, name) is getattr(importlib.import_module(home), name)


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="denoize_image"):
        _ = dv.denoize_image  # pyright: ignore[reportAttributeAccessIssue]
