"""Stage 1: from features of many views of an image to semantic field, shared artifact and residual."""
