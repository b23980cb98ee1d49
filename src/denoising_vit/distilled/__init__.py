"""Stage 3: train the ViT itself to give clean features, without an extra block."""
