"""Labels as a CSV for any source, as a Dynamo table, and features as arrays."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from studytool.data.readers.source import Entry
from studytool.data.readers.tables import lines_of_text
from studytool.errors import DataError
from studytool.files import whole_file
from studytool.labelling.labels import Labels

_DYNAMO_CLASS = 21  # column 22 of a table, counted from 0
EMBEDDINGS = (".npz", ".parquet")


def write_csv(out: Path, ids: Sequence[str], origins: Sequence[str], labels: Labels) -> None:
    """A row per particle: id, where it is from, class, number, probability, entropy, probability of each class."""
    head = ["particle", "origin", "class_name", "class_number", "probability", "entropy_nats"]
    with whole_file(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*head, *(f"probability of {name}" for name in labels.classes)])
        rows = zip(ids, origins, labels.names, labels.numbers.tolist(), labels.probability, labels.entropy, strict=True)
        for (*texts, probability, entropy), all_of_it in zip(rows, labels.probabilities, strict=True):
            numbers = (probability, entropy, *all_of_it)
            writer.writerow([*texts, *(f"{number:.6f}" for number in numbers)])


def write_dynamo(table: Path, out: Path, labels: Labels) -> None:
    """The Dynamo table again with the class (column 22) set, 0 for a rejected particle; all other numbers stay."""
    rows = iter(labels.numbers.tolist())
    with whole_file(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for _, line in lines_of_text(table):
            fields = line.split()
            if fields:
                fields[_DYNAMO_CLASS] = str(next(rows))
                file.write(" ".join(fields) + "\n")


def write_embedding(out: Path, ids: NDArray[np.str_], features: NDArray[np.float32], labels: Labels) -> None:
    """Features [N, F] float32 with ids and labels, as .npz (no pickles in it) or as .parquet with a list per particle.

    Raises:
        DataError: another ending.
    """
    check_embedding_name(out)
    if out.suffix == ".npz":
        with whole_file(out) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                features=features,
                particle=ids.astype(np.str_),
                class_name=np.array(labels.names),
                class_number=labels.numbers,
                probabilities=labels.probabilities,
                classes=np.array(labels.classes),
            )
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    columns = {
        "particle": pa.array(ids.tolist()),
        "class_name": pa.array(labels.names),
        "class_number": pa.array(labels.numbers),
        "probability": pa.array(labels.probability),
        "features": values,
    }
    with whole_file(out) as temporary:
        pq.write_table(pa.table(columns), temporary)


def check_embedding_name(out: Path) -> None:
    """Refuse a file that features cannot be written to (DataError), before they are computed."""
    if out.suffix not in EMBEDDINGS:
        raise DataError(f"{out}: features are written as {' or '.join(EMBEDDINGS)}; give the file that ending")


def origins_of(entries: Sequence[Entry]) -> list[str]:
    """How a person finds each particle."""
    return [entry.origin for entry in entries]
