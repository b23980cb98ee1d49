"""Clean a model in place, so that its own interface returns clean patch tokens."""
