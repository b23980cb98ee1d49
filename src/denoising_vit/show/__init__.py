"""Sheets of photos with maps of their features in shared colours."""
