"""Options of the page."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from denoising_vit.errors import AppError

#: Largest `max_upload` in megabytes: an upload is held in memory.
MOST_UPLOAD = 1000.0


@dataclass(frozen=True)
class AppOptions:
    """Address and limits of the page.

    Attributes:
        host: address to listen at; 127.0.0.1 is reachable from this computer only, 0.0.0.0 from the whole network.
        port: port, 1 to 65535.
        share: also open a public internet address through Gradio's relay; anyone with the address can use the page, and
            photos and results pass through the relay.
        max_upload: largest uploaded photo in MB.
        examples: folder with more sample photos, visible to everyone who reaches the page.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    max_upload: float = 20.0
    examples: Path | None = None

    def validate(self) -> None:
        """Checks the options before anything is loaded.

        Raises:
            AppError: naming the option, its range and its value.
        """
        if not 1 <= self.port <= 65535:
            raise AppError(f"port must be 1 to 65535, got {self.port}")
        if not 0 < self.max_upload <= MOST_UPLOAD:
            raise AppError(f"max_upload must be more than 0 and at most {MOST_UPLOAD:g} MB, got {self.max_upload:g}")
        if self.examples is not None and not self.examples.is_dir():
            raise AppError(f"examples must be a folder with photos, got {self.examples}, which is not a folder")

    @property
    def local(self) -> bool:
        """True if only this computer reaches the page."""
        try:
            return ipaddress.ip_address(self.host).is_loopback and not self.share
        except ValueError:
            return self.host == "localhost" and not self.share
