"""A STAR file with columns added to its table of particles; every other block, column, row and comment stays."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from studytool.data.export import file_names, star_names
from studytool.data.readers.startable import read_star_table
from studytool.data.readers.tables import lines_of_text
from studytool.files import whole_file
from studytool.labelling.labels import REJECTED, Labels

NAME, PROBABILITY, ENTROPY = "studytoolClassName", "studytoolClassProbability", "studytoolClassEntropy"
NUMBER = "rlnClassNumber"
_FIELD = re.compile(r"\"[^\"]*\"|'[^']*'|[^ \t]+")
_COMMENT = re.compile(r"[ \t]#.*$")


def write_labelled_star(star: Path, out: Path, labels: Labels) -> None:
    """Write `star` again as `out`, with class name, probability and entropy (nats) of every particle.

    `rlnClassNumber` is the number of the class, 0 for a rejected particle; columns of these names that are there
    already get the new values. Names of classes are written without what a STAR file cannot hold, spaces included.
    """
    _write(star, out, _columns(labels), keep=lambda _row: True)


def write_star_per_class(star: Path, out: Path, labels: Labels) -> dict[str, Path]:
    """Write `OUT_CLASS.star` beside `out` for every class that has particles, and for the rejected; class -> file."""
    columns, names = _columns(labels), labels.names
    paths = {name: path for name, path in class_files(out, labels.classes).items() if name in names}
    for name, path in paths.items():
        _write(star, path, columns, keep=lambda row, name=name: names[row] == name)  # type: ignore[misc]
    return paths


def class_files(out: Path, classes: Sequence[str]) -> dict[str, Path]:
    """`OUT_CLASS.star` of every class and of the rejected."""
    stems = file_names((*classes, REJECTED))
    return {name: out.with_name(f"{out.stem}_{stem}{out.suffix}") for name, stem in stems.items()}


def _columns(labels: Labels) -> dict[str, list[str]]:
    in_star = star_names((*labels.classes, REJECTED), spaces=False)
    return {
        NAME: [in_star[name] for name in labels.names],
        PROBABILITY: [f"{value:.6f}" for value in labels.probability],
        ENTROPY: [f"{value:.6f}" for value in labels.entropy],
        NUMBER: [str(number) for number in labels.numbers.tolist()],
    }


def _write(star: Path, out: Path, columns: Mapping[str, Sequence[str]], *, keep: Callable[[int], bool]) -> None:
    block = read_star_table(star).block
    with whole_file(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in _lines(star, block, columns, keep))


def _lines(star: Path, block: str, columns: Mapping[str, Sequence[str]], keep: Callable[[int], bool]) -> Iterator[str]:
    """The file's lines; `read_star_table` has found every row whole."""
    inside = loop = in_rows = False
    names: list[str] = []
    held: list[str] = []
    row = 0
    for _, line in lines_of_text(star):
        text = _COMMENT.sub("", line).rstrip()
        if text.startswith("data_") and "/" not in text:  # else it is the path of a particle
            if inside and not loop:
                yield from _single_values(names, columns)
            inside, loop, in_rows = text[5:] == block, False, False
            yield line
        elif inside and loop and names and not in_rows and (not text or text.startswith("#")):
            held.append(line)  # what stands between the columns and the rows comes after the new columns
        elif not inside or not text or text.startswith("#"):
            yield line
        elif text.startswith("loop_") and not names:
            loop = True
            yield line
        elif text.startswith("_") and not in_rows:
            name = text.split()[0][1:]
            names.append(name)
            yield f"_{name} {columns[name][0]}" if not loop and name in columns else line
        else:
            if not in_rows:
                in_rows = True
                added = [name for name in columns if name not in names]
                yield from (f"_{name} #{number}" for number, name in enumerate(added, start=len(names) + 1))
                yield from held
            if keep(row):
                fields = dict(zip(names, _FIELD.findall(text), strict=True))
                fields |= {name: values[row] for name, values in columns.items()}
                yield " ".join(fields.values())
            row += 1
    if inside and not loop:
        yield from _single_values(names, columns)


def _single_values(names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What is added to a block without a loop, which is a table of one row."""
    yield from (f"_{name} {values[0]}" for name, values in columns.items() if name not in names)
