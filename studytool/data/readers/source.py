"""What every reader delivers: a list of the particles a source holds, and a way to read each one's volume.

A reader is two things: a function `recognize(path, options)`, which looks at the content (not the name) and returns a
`Source` or None, and that `Source`. Reading the list is cheap and happens once, in the main process; the volumes are
read in worker processes, so that a `Source` can be pickled and holds no open file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from studytool.errors import DataError

NO_TOMOGRAM_NOTE = (
    "no tomogram is known, or not of all particles: those of one tomogram may come to stand on both sides of a split, "
    "which makes results look better than they are; --group-column names a table's column that tells it"
)

Volume = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class ReadOptions:
    """What the user says of a source where the source itself does not, or says it in an unusual place.

    `label_column` and `group_column` name columns of a particle table; `label` is one label for all particles of a
    source that has none; `root` is the folder that relative paths in a table count from (default: the table's own
    folder), and outside which nothing is read; `volumes` is the folder of volumes of a Dynamo table; `tomograms` is a
    folder of tomograms to cut boxes of `cut` voxels from (or `box`, the side of the dataset's volumes, which the import
    uses in any case), `coordinates` the table of their positions;
    `voxel_size_angstrom` is that of the tomograms where they do not tell, or the one to choose of a project that has
    several, as `tomogram_type` chooses among kinds of reconstruction and `picks_of` ("USER/SESSION", or an annotation's
    number) among several annotations of one object.
    """

    label_column: str | None = None
    group_column: str | None = None
    label: str | None = None
    root: Path | None = None
    volumes: Path | None = None
    tomograms: Path | None = None
    coordinates: Path | None = None
    cut: int | None = None
    box: int | None = None
    voxel_size_angstrom: float | None = None
    tomogram_type: str | None = None
    picks_of: str | None = None


@dataclass(frozen=True)
class Entry:
    """One particle of a source before its volume is read.

    `label` is "" where the source has none, `tomogram` "" where it is not known, `split` "" where it says nothing.
    `position_zyx` counts voxels in the tomogram. `where` is the reader's own reference (anything that can be pickled);
    `origin` is how a person finds the particle: the file, and the row or number in it.
    """

    particle_id: str
    label: str
    tomogram: str
    where: Any
    origin: str
    split: str = ""
    snr: float | None = None
    position_zyx: tuple[float, float, float] | None = None


class Source(Protocol):
    """A recognized source.

    `kind` says in a few words what it is ("RELION 3.1 STAR file"); `notes` are what the user should be told once
    (pseudo-subtomograms, classes that are another program's output, no tomogram known); `provenance` are JSON values
    that go into the manifest.
    """

    @property
    def kind(self) -> str: ...  # noqa: D102

    @property
    def notes(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def entries(self) -> Sequence[Entry]: ...  # noqa: D102

    @property
    def provenance(self) -> dict[str, Any]: ...  # noqa: D102

    def read(self, entry: Entry) -> ReadVolume:
        """Read the volume of one entry.

        Raises:
            DataError: names `entry.origin` and what is wrong with it.
        """


@dataclass(frozen=True)
class ReadVolume:
    """A volume float32 [D, H, W] in the order z, y, x, and its voxel size in Å; None where the source does not tell."""

    volume_DHW: Volume
    voxel_size_angstrom: float | None


@dataclass(frozen=True)
class Listing:
    """What is the same in every reader's `Source`, which has `read` and its own references besides."""

    kind: str
    entries: Sequence[Entry]
    notes: Sequence[str]
    provenance: dict[str, Any]


@contextmanager
def named(entry: Entry) -> Iterator[None]:
    """Put the entry's origin before what is wrong with its file."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{entry.origin}: {error}") from error


def require_finite(where: str, volume: np.ndarray[Any, Any]) -> None:
    """Refuse a volume in which not every voxel is a number.

    Raises:
        DataError: names `where`, and how many are not.
    """
    if not np.isfinite(volume).all():
        bad = int(np.count_nonzero(~np.isfinite(volume)))
        raise DataError(f"{where}: {bad} of {volume.size} voxels are NaN or infinite; mend it or leave it out")
