"""HTML pages about a run: pictures, metrics and settings in one file without scripts."""
