"""Clean a model in place, so that it gives clean patch tokens through its own interface."""
