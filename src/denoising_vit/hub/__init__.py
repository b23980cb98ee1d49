"""Folders and hub repositories of this package's files: contents, model card, upload and download."""
