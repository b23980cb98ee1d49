"""The model card of a folder: a README written from the records of the files in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from denoising_vit.backbones.recorded import Fingerprint
from denoising_vit.files import DISTILLED, Mark, digest_of, owned_path, read_record

#: Name of the card.
CARD = "README.md"

#: Mark of all cards. A card is rewritten from the files in its folder, so its mark has no inputs.
CARD_MARK = Mark("model-card", digest_of(CARD))


@dataclass(frozen=True)
class Kind:
    """A kind of file that can be shared."""

    file: str  #: name of the file in a folder or repository
    name: str  #: heading of its section in the card
    about: str  #: description of the file
    use: str  #: Python line that creates an extractor from a ``backbone`` and the file; PATH is the folder or hub id


#: Kinds of files by the ``format`` in their record, in the order of the card.
KINDS: Mapping[str, Kind] = {
    "denoising-vit/artifact": Kind(
        "artifact.safetensors",
        "Artifact G",
        "A pattern that the backbone adds to the features of every image; subtract it",
        'extractor = dv.DenoisedViT(backbone, dv.Artifact.from_pretrained("PATH"))',
    ),
    "denoising-vit/subspace": Kind(
        "subspace.safetensors",
        "Subspace",
        "Directions of the features that encode the position of a patch; project them out",
        'extractor = dv.DenoisedViT(backbone, dv.Subspace.from_pretrained("PATH"))',
    ),
    "denoising-vit/registers": Kind(
        "registers.safetensors",
        "Test-time registers",
        "Neurons that write outlier tokens; their output is moved into one added token",
        'extractor = dv.clean(backbone, "registers", registers=dv.Registers.from_pretrained("PATH"))',
    ),
    "denoising-vit/denoiser": Kind(
        "denoiser.safetensors",
        "Denoiser",
        "A transformer block after the backbone that maps raw features to clean ones in one forward pass",
        'extractor = dv.DenoisedViT(backbone, dv.Denoiser.from_pretrained("PATH"))',
    ),
    DISTILLED: Kind(
        "distilled.safetensors",
        "Distilled weights",
        "The backbone, fine-tuned to give clean features without an extra block",
        'extractor = dv.DistilledWeights.from_pretrained("PATH").backbone()',
    ),
}

_ABOUT = (
    "Made by denoising-vit, after [Denoising Vision Transformers](https://arxiv.org/abs/2401.02957) (Yang et al., ECCV "
    "2024). `PATH` is this folder or its id on the hub. An extractor maps normalised images (B, 3, H, W) to features "
    "(B, h, w, C)."
)

_LICENCE = (
    "The licence of the backbone's weights is not recorded in these files; see where the weights were published. That "
    "licence, and the terms of the photos used, may also apply to these files."
)


def write_card(folder: Path, figures: Mapping[str, Any] | None = None) -> None:
    """Write the card of the shareable files in a folder, with measured values ``figures`` by description.

    Raises:
        OutputError: if the folder has a README that is not a card of this package.
        OSError: if it cannot be written.
    """
    text = card([(KINDS[name], record_of(folder / KINDS[name].file)) for name in kinds_in(folder)], figures or {})
    with owned_path(folder / CARD, CARD_MARK) as temporary:
        temporary.write_text(text, encoding="utf-8")


def kinds_in(folder: Path) -> list[str]:
    """The kinds of files in a folder, by format."""
    return [name for name, kind in KINDS.items() if record_of(folder / kind.file).get("format") == name]


def record_of(path: Path) -> dict[str, Any]:
    """The package's record in a file; empty if the file is missing or has none."""
    try:
        found = read_record(path)
    except (SafetensorError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def card(pieces: Sequence[tuple[Kind, dict[str, Any]]], figures: Mapping[str, Any]) -> str:
    """The card in Markdown with metadata for hubs, from kind and record of each file, and figures by description."""
    names = dict.fromkeys(str(_backbone(record).get("name", "a ViT")) for _, record in pieces)
    parts = [front_matter("denoising-vit"), f"# Clean features of {', '.join(names)}", _ABOUT]
    for kind, record in pieces:
        parts += [f"## {kind.name}", f"{kind.about}. File: `{kind.file}`."]
        parts += [_use(kind, record), table(_made(record))]
    if figures:
        parts += ["## Metrics", table(figures)]
    return "\n\n".join([*parts, "## Licence", _LICENCE]) + "\n"


def front_matter(library: str) -> str:
    """Metadata for hubs; ``library`` is the library's name on the hub."""
    tags = "".join(f"\n- {tag}" for tag in ("denoising-vit", "feature-extraction", "vision"))
    return f"---\nlibrary_name: {library}\npipeline_tag: image-feature-extraction\nlicense: other\ntags:{tags}\n---"


def table(rows: Mapping[str, Any]) -> str:
    """A table of two columns without headings, in Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _use(kind: Kind, record: dict[str, Any]) -> str:
    load = f"backbone = dv.load_backbone({json.dumps(_backbone(record).get('name', 'NAME'))})\n"
    lines = f"{load if 'backbone,' in kind.use else ''}{kind.use}"
    return f"```python\nimport denoising_vit as dv\n\n{lines}\n```"


def _made(record: dict[str, Any]) -> dict[str, Any]:
    """Rows on the backbone, and on the provenance of the file."""
    about = _backbone(record)
    rows = {name: about[name] for name in ("name", "layer", "norm", "stride") if about.get(name) is not None}
    if "weights" in about:
        rows["weights"] = Path(str(about["weights"])).name  # folders stay private
    if about:
        rows["fingerprint"] = Fingerprint(tuple(about["fingerprint"])).short
    rows = {"backbone" if name == "name" else f"backbone, {name}": value for name, value in rows.items()}
    info = record.get("info", {})
    return rows | _plain(record | {"info": None}) | _plain(info) | _plain(info.get("options") or {})


def _backbone(record: dict[str, Any]) -> dict[str, Any]:
    return record.get("backbone") or record.get("trained_for") or {}


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers and texts of a record, pairs of numbers, and the number of photos."""
    rows: dict[str, Any] = {}
    for name, value in record.items():
        title = name.replace("_", " ")
        if name in ("format", "format_version", "made", "plan"):
            continue
        if name in ("photos", "skipped") and isinstance(value, list):
            rows[title] = len(value)
        elif isinstance(value, str | int | float):
            rows[title] = value
        elif isinstance(value, list) and len(value) == 2 and all(isinstance(side, int | float) for side in value):
            rows[title] = (" × " if isinstance(value[0], int) else ", ").join(map(str, value))
    return rows
