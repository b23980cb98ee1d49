"""Views of an image: patch grid, crops, rendering and sampling."""
