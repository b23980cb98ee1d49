"""The package itself: its public names, each imported when it is first used."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import denoising_vit as dv

STUB = Path(dv.__file__).with_suffix(".pyi")


def test_every_public_name_is_there_and_listed() -> None:
    assert len(dv.__all__) > 30
    for name in dv.__all__:
        assert getattr(dv, name) is not None, name
        assert name in dir(dv)


def test_names_come_from_where_the_stub_says() -> None:
    imports = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom)]
    told = {alias.name: f"denoising_vit.{node.module}" for node in imports for alias in node.names}
    assert sorted(told) == sorted(dv.__all__)
    for name, home in told.items():
        assert getattr(dv, name) is getattr(importlib.import_module(home), name)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="denoize_image"):
        _ = dv.denoize_image  # pyright: ignore[reportAttributeAccessIssue]
