"""``dvit store info|verify|export``: inspection of a feature store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from denoising_vit.cli.reporting import print_error, print_note
from denoising_vit.cli.streams import OK, SOME_FAILED, print_json
from denoising_vit.errors import StoreError
from denoising_vit.files import unwritable

StoreName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STORE")]


def info(store: StoreName, /, json: tyro.conf.FlagCreatePairsOff[bool] = False) -> int:
    """Print the number of photos, backbone, views and size of a store.

    Args:
        store: a folder or URL.
        json: print JSON, with the whole manifest.
    """
    from denoising_vit.store import FeatureStore

    opened = FeatureStore.open(store)
    found = opened.info()
    if json:
        print_json(found)
        return OK
    manifest = opened.manifest
    field, size = (" x ".join(map(str, pair)) for pair in (manifest.field, manifest.size))
    rows = {
        "photos": f"{found['done']} of {found['images']} done, {found['failed']} failed",
        "shards": f"{found['sealed']} of {found['shards']} sealed, {found['staged']} photos staged",
        "field": f"{field} nodes, {manifest.channels} channels, {manifest.dtype}",
        "bytes": f"{found['bytes']:,}",
        "backbone": f"{manifest.backbone.get('name')} ({manifest.backbone.get('weights')})",
        "views": f"{manifest.options.get('views')} of {size} pixels, seed {manifest.options.get('seed')}",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in rows.items():
        table.add_row(name, escape(text))
    Console().print(table)
    return OK


def verify(store: StoreName, /) -> int:
    """Read a whole store with its checksums, and print any damage.

    Args:
        store: a folder or URL.
    """
    from denoising_vit.store import FeatureStore

    opened = FeatureStore.open(store)
    problems = 0
    for problem in opened.verify():
        problems += 1
        print_error(str(problem), "damaged")
    done = len(opened.done())
    print_note(f"{done} photos read, {problems} problem{'' if problems == 1 else 's'} found in {opened.url}")
    return SOME_FAILED if problems else OK


def export(
    store: StoreName,
    /,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    kind: Literal["npy", "safetensors"] = "npy",
) -> int:
    """Write the field of each photo to its own file.

    Args:
        store: a folder or URL.
        out: local folder; created if it does not exist. Existing files are kept: if a file with the same name and other
            content exists, nothing is written.
        kind: npy (the field only) or safetensors (with its record); photos of int8 stores are float32.
    """
    from denoising_vit.store import FeatureStore

    try:
        files = FeatureStore.open(store).export(out, kind)
    except OSError as error:
        raise StoreError(f"cannot write to {out} ({unwritable(error)}); choose another folder with -o") from error
    print_note(f"{len(files)} files in {out}")
    return OK
