"""Calibration: the artifact of a backbone from a few dozen photos, and its reliability."""
