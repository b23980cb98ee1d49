"""Views of an image: the patch grid, where crops lie, how they are rendered, and how their features are sampled."""
