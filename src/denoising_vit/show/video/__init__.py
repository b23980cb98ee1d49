"""Videos of features side by side, with the same colours in all frames of a clip."""
