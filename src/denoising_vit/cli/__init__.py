"""``dvit``: the command line, one thin module per verb."""

from denoising_vit.cli.app import main

__all__ = ["main"]
