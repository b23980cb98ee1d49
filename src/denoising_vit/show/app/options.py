"""The options of the page."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from denoising_vit.errors import AppError

#: Megabytes that an upload may be set to have, at most: it is held in memory for a moment.
MOST_UPLOAD = 1000.0


@dataclass(frozen=True)
class AppOptions:
    """Where the page is, and what it takes.

    Attributes:
        host: address that it listens at. With 127.0.0.1 only this computer reaches it; with 0.0.0.0 the whole network.
        port: of that address, 1 to 65535.
        share: also open a public address on the internet, through a relay of Gradio's; whoever has the address can use
            this computer's page, and photos and results pass through the relay.
        max_upload: largest photo that may be uploaded, in MB.
        examples: folder with more sample photos; everyone who reaches the page can see them.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    max_upload: float = 20.0
    examples: Path | None = None

    def validate(self) -> None:
        """Checks what can be checked before anything is loaded.

        Raises:
            AppError: naming the option, what it may be, and what came.
        """
        if not 1 <= self.port <= 65535:
            raise AppError(f"port must be 1 to 65535, got {self.port}")
        if not 0 < self.max_upload <= MOST_UPLOAD:
            raise AppError(f"max_upload must be more than 0 and at most {MOST_UPLOAD:g} MB, got {self.max_upload:g}")
        if self.examples is not None and not self.examples.is_dir():
            raise AppError(f"examples must be a folder with photos, got {self.examples}, which is none")

    @property
    def local(self) -> bool:
        """Whether only this computer reaches the page."""
        try:
            return ipaddress.ip_address(self.host).is_loopback and not self.share
        except ValueError:
            return self.host == "localhost" and not self.share
