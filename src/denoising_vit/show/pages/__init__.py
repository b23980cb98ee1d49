"""Pages: what was run, on what, with which result, in one HTML file that needs nothing else."""

from denoising_vit.show.pages.rendering import Picture, jpeg_uri, png_uri, render, write_page

__all__ = ["Picture", "jpeg_uri", "png_uri", "render", "write_page"]
