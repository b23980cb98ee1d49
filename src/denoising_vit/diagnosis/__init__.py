"""Diagnosis of a backbone: its artifacts, and whether cleaning is worthwhile."""
