"""Videos of features side by side, in the same colours for all frames of a clip."""
