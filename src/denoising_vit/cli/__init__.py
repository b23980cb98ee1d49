"""``dvit``: the command line, in thin modules of one or more verbs."""

from denoising_vit.cli.app import main

__all__ = ["main"]
