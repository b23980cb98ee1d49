"""``dvit``: the command line, thin modules of the verbs."""

from denoising_vit.cli.app import main

__all__ = ["main"]
