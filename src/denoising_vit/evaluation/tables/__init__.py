"""Tables of results, made from the lines that an evaluation appended and from nothing else."""

from denoising_vit.evaluation.tables.document import report_markdown
from denoising_vit.evaluation.tables.entries import BrokenLine, Entries, Entry, Paired, parse_entry, read_entries

__all__ = [
    "BrokenLine",
    "Entries",
    "Entry",
    "Paired",
    "parse_entry",
    "read_entries",
    "report_markdown",
]
