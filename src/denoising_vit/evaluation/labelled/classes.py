"""Names of classes: those of VOC, and lists and tables that come with a data set."""

from __future__ import annotations

from pathlib import Path

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.layouts import read_text

#: The classes of Pascal VOC in the order of their labels.
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

#: How many classes ADE20K's scene parsing benchmark has.
ADE_CLASSES = 150

_REMEDY = "Write the names of the classes into it, one a line, that of label 0 first"


def read_class_list(path: Path) -> tuple[str, ...]:
    """Names of classes, one a line; the first line names label 0.

    Raises:
        EvaluationError: if the file is missing, has no name, an empty line among names, or a name twice.
    """
    if not path.is_file():
        raise EvaluationError(f"{path}: expected a list of classes, found no such file. {_REMEDY}")
    names = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if names == [""]:
        raise EvaluationError(f"{path}: expected a list of classes, found an empty file. {_REMEDY}")
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            # Leaving it out would give every later class the label of its neighbour.
            raise EvaluationError(f"{path}: line {number} is empty, expected the name of label {number - 1}")
        if first.setdefault(name, number) != number:
            raise EvaluationError(
                f"{path}: line {number} is {name!r}, as line {first[name]}; expected a name of its own for each class"
            )
    return tuple(names)


def read_ade_names(table: Path) -> tuple[str, ...]:
    """Names from ADE20K's ``objectInfo150.txt``, or ``class 1`` to ``class 150`` where that is missing.

    Raises:
        EvaluationError: if the table is there and does not number 150 classes.
    """
    if not table.is_file():
        return tuple(f"class {number}" for number in range(1, ADE_CLASSES + 1))
    rows = [line.strip().split("\t") for line in read_text(table).split("\n") if line.strip()][1:]
    if [row[0].strip() for row in rows] != [str(number) for number in range(1, ADE_CLASSES + 1)]:
        raise EvaluationError(
            f"{table}: expected a header and then classes 1 to {ADE_CLASSES} in tab-separated columns, number first "
            f"and name last, found {len(rows)} rows that are not these; fetch the file again, or remove it"
        )
    return tuple(row[-1].strip() for row in rows)
