"""Stage 1: separating the features of many views of one image into semantic field, shared artifact and residual."""
