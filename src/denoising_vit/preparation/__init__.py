"""Preparation of backbones for use: all their files, written by one command for a list of backbones."""
