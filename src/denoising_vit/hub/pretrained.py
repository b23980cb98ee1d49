"""save_pretrained, from_pretrained and push_to_hub: one implementation for all shareable files of this package.

A folder, on disk or on the hub, has at most one file of each kind, with a fixed name, and one model card for all of
them. So everything for one backbone fits into one repository, and each class downloads only its own file.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from denoising_vit.backbones.runtime import offline_if_unreachable
from denoising_vit.errors import DenoisingVitError, FormatError, HubError, OutputError
from denoising_vit.files import Mark, first_line, require_ours
from denoising_vit.hub.card import CARD, CARD_MARK, KINDS, kinds_in, record_of, write_card

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

#: File that the hub adds to a new repository.
_OF_THE_HUB = ".gitattributes"


class Pretrained(ABC):
    """Base of classes with ``save`` and ``load`` that can be shared as a folder or a hub repository.

    Attributes:
        FORMAT: ``format`` in the record of its files, a key of :data:`KINDS`.
    """

    FORMAT: ClassVar[str]

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by :meth:`save`."""

    @classmethod
    def path_in(cls, folder: str | Path) -> Path:
        """The object's file in a folder."""
        return Path(folder).expanduser() / KINDS[cls.FORMAT].file

    def save_pretrained(self, folder: str | Path, *, figures: Mapping[str, Any] | None = None) -> None:
        """Write the object's file and a model card into a folder, which is created if it does not exist.

        A file of the same kind is replaced. The card is rewritten to cover all files of this package in the folder.

        Args:
            folder: the folder.
            figures: measured values to state in the card, by description.

        Raises:
            OutputError: if an existing file must not be replaced.
            OSError: if the folder cannot be written to.
        """
        path = self.path_in(folder)
        if os.path.lexists(path) and record_of(path).get("format") != self.FORMAT:
            raise OutputError(f"{path} exists and is not a {self.FORMAT} file; choose another folder, or move it away")
        require_ours(path.with_name(CARD), CARD_MARK)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save(path)
        write_card(path.parent, figures)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> Self:
        """Load from a folder of :meth:`save_pretrained` or a hub repository of :meth:`push_to_hub`.

        Args:
            source: a folder, a file, or a hub id ``owner/name``.
            revision: branch, tag or commit on the hub.

        Raises:
            FormatError: if the folder has no such file, or the file is damaged or of another type.
            HubError: if the download fails.
        """
        if Path(source).expanduser().is_file():
            return cls.load(source)
        path = cls.path_in(source)
        if path.parent.is_dir():
            if not path.is_file():
                found = ", ".join(sorted(entry.name for entry in path.parent.iterdir())[:5]) or "nothing"
                raise FormatError(f"{path.parent}: expected a file {path.name} in this folder, found {found}")
            return cls.load(path)
        if not _HUB_ID.fullmatch(str(source)):
            raise FormatError(f"{source}: expected a folder, or a hub id like owner/name")
        from huggingface_hub import hf_hub_download

        with _hub(f"{path.name} of {source} could not be downloaded from the hub"):
            fetched = hf_hub_download(str(source), path.name, revision=revision)
        return cls.load(fetched)

    def push_to_hub(
        self, repo_id: str, *, figures: Mapping[str, Any] | None = None, private: bool | None = None
    ) -> str:
        """Upload the object's file and a model card, as the user logged in to the hub's client.

        To share several files in one repository, save them into one folder and use :func:`push_folder`.

        Args:
            repo_id: ``owner/name``; created if it does not exist.
            figures: measured values to state in the card, by description.
            private: whether a new repository is private.

        Returns:
            The address of the repository.

        Raises:
            OutputError: if the repository has files but no card of this package.
            HubError: if the upload fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, figures=figures)
            return push_folder(folder, repo_id, private=private)


def push_folder(folder: str | Path, repo_id: str, *, private: bool | None = None) -> str:
    """Upload the model card and the files that it covers; nothing else in the folder.

    Args:
        folder: a folder with files of :meth:`Pretrained.save_pretrained`.
        repo_id: ``owner/name``; created if it does not exist.
        private: whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        OutputError: if the repository has files but no card of this package.
        HubError: if the upload fails.
    """
    from huggingface_hub import HfApi

    files = [CARD, *(KINDS[name].file for name in kinds_in(Path(folder)))]
    api = HfApi(library_name="denoising-vit")
    with _hub(f"{repo_id}: could not be uploaded to the hub"):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        there = set(api.list_repo_files(repo_id)) - {_OF_THE_HUB}
        if there and (CARD not in there or Mark.read(Path(api.hf_hub_download(repo_id, CARD))) != CARD_MARK):
            raise OutputError(f"{repo_id} has files from another source on the hub; choose another repository")
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files)
    return str(address)


@contextlib.contextmanager
def _hub(failed: str) -> Iterator[None]:
    """Convert errors of the hub's client, of any type, to HubError."""
    try:
        with offline_if_unreachable():
            yield
    except DenoisingVitError:
        raise
    except Exception as error:  # network, missing file, no permission, damaged cache, ...
        raise HubError(f"{failed} ({type(error).__name__}: {first_line(error)})") from error
