"""``dvit report``: tables in Markdown, from the lines that `dvit evaluate` appended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from denoising_vit.cli.exit_codes import OK, SOME_FAILED, WRONG_USAGE
from denoising_vit.cli.reporting import print_error, print_note
from denoising_vit.evaluation.tables import read_entries, report_markdown
from denoising_vit.files import atomic_path


def report(
    results: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RESULTS ...")],
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")],
    runs: tuple[Path, ...] = (),
) -> int:
    """Tables in Markdown from results files, with published figures beside measured ones.

    The same results give the same file. Where the same settings occur twice, the later line wins.

    Args:
        results: files of JSON lines that `dvit evaluate` wrote, one or more.
        out: the file (.md).
        runs: folders of `dvit train` or `dvit distill`, whose looks at held-out images are told of as well.
    """
    if not results:
        print_error("expected one or more files that `dvit evaluate` wrote, got none; name them before -o")
        return WRONG_USAGE
    if out.suffix != ".md" or not out.parent.is_dir() or out.is_dir():
        print_error(f"-o {out}: expected the name of a .md file in a folder that exists")
        return WRONG_USAGE
    if any(out.resolve() == path.resolve() for path in results):
        print_error(f"-o {out}: this file is among the results; name another, so that they are not lost")
        return WRONG_USAGE
    found = read_entries(results)
    for line in found.broken:
        print_error(f"{line.file}:{line.line}: {line.reason}", "skipped")
    try:
        with atomic_path(out) as temporary:
            temporary.write_bytes(report_markdown(found, runs).encode("utf-8", "backslashreplace"))  # no CRLF anywhere
    except OSError as error:
        print_error(f"cannot write {out} ({error.strerror or error})")
        return WRONG_USAGE
    print_note(f"{len(found.entries)} entries in {out}")
    return SOME_FAILED if found.broken else OK
