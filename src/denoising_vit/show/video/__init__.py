"""Videos of features: any extractors side by side, in colours that stay the same from the first frame to the last."""
