"""Folders and hub repositories of what the package makes: their files, their model card, and how they are shared."""
