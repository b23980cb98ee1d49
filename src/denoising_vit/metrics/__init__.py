"""Label-free metrics of features."""
