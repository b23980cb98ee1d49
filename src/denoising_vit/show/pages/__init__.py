"""HTML pages about a run: pictures, metrics and settings in one file without scripts."""

from denoising_vit.show.pages.rendering import Picture, jpeg_uri, png_uri, render, write_page

__all__ = ["Picture", "jpeg_uri", "png_uri", "render", "write_page"]
