"""Looking at features: maps of a photo's features, side by side in the same colours, on one sheet."""
