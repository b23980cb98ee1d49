"""Evaluation: label-free metrics of artifacts in feature maps."""
