"""A folder of repositories in place of the Hugging Face hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest

from denoising_vit.backbones import runtime


class Hub:
    """The part of the client that the package uses, on folders below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private: bool | None = None

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        assert exist_ok
        self.private = private
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        (self.root / repo_id / ".gitattributes").touch()
        return f"https://hub/{repo_id}"

    def list_repo_files(self, repo_id: str) -> list[str]:
        return [path.name for path in (self.root / repo_id).iterdir()]

    def hf_hub_download(self, repo_id: str, filename: str, revision: str | None = None) -> str:
        if not (self.root / repo_id / filename).is_file():
            raise FileNotFoundError(f"{filename} is not there")
        assert revision in (None, "v1")
        return str(self.root / repo_id / filename)

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str]) -> None:
        for path in Path(folder_path).iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, self.root / repo_id)


def installed(root: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Makes the package use the replacement."""
    made = Hub(root)
    monkeypatch.setattr(runtime, "_reachable", lambda _url: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: made)
    return made
