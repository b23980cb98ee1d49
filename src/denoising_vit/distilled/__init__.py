"""Stage 3: the ViT itself learns to give clean features, and needs no extra block."""
