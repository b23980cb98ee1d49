"""Code shared by the training of stage 2 (the denoiser) and stage 3 (the distilled ViT)."""
