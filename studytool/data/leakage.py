"""The guard against leaks: what may not stand in two splits, and so which volumes have to stay together."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from studytool.data.dataset import Dataset
from studytool.data.scan import Array, OnProgress, scan
from studytool.errors import DataError
from studytool.files import write_json

Rows = NDArray[np.int64]

CACHE_NAME = "identical.cache"
_MAX_PAIRS = 20_000_000
# "_snr0.05", "SNR-inf" or "snr_1e-2" between separators or at an end: what tells one noise level from another
_SNR = re.compile(r"(?:^|[_./\s-])snr[_=-]?(?:inf(?:inite|inity)?|\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?=$|[_./\s-])", re.I)


@dataclass(frozen=True)
class LeakageReport:
    """What the guard looked at: `groups` known tomograms, `ungrouped` volumes of none, and what has to be said.

    `hashed` tells whether volumes were compared by their content.
    """

    groups: int
    ungrouped: int
    hashed: bool
    notes: tuple[str, ...]


def check_leakage(
    dataset: Dataset, *, parts: Array | None = None, identical: Sequence[Sequence[int]] | None = None
) -> LeakageReport:
    """Refuse a dataset whose splits share something; volumes without a split are in none and share nothing.

    Compared are tomograms (and with them places in a tomogram), particles (of the same id but for a signal-to-noise
    ratio in it), boxes that overlap where no tomogram is known (positions and box count the same voxels), and volumes
    of the same bytes: `identical` as `identical_volumes` finds them; by default, so far as they were found before.

    Args:
        dataset: the dataset, opened with the split in question.
        parts: other parts than its splits, as text [N]; "" is none.
        identical: groups of row numbers.

    Raises:
        DataError: names two volumes of different splits that share something, and what.
    """
    parts = dataset.splits if parts is None else parts
    known = known_identical(dataset) if identical is None else identical
    used = np.flatnonzero(parts != "")
    for what, keys in _keys(dataset, known or ()):
        _refuse_shared(dataset, parts, used[keys[used] >= 0], keys, what)
    _refuse_overlaps(dataset, parts)
    ungrouped = int(np.count_nonzero(dataset.tomograms == ""))
    groups = len(dataset.manifest.tomograms) - ("" in dataset.manifest.tomograms)
    return LeakageReport(groups, ungrouped, known is not None, _notes(dataset, ungrouped))


def units(dataset: Dataset, identical: Sequence[Sequence[int]]) -> Rows:
    """Which volumes have to stay together: a number [N] for each, the same for those that share something.

    Raises:
        DataError: so many boxes overlap, without a tomogram known, that nothing can be told from them.
    """
    rows = [np.arange(len(dataset))]
    nodes = [np.arange(len(dataset))]
    first = len(dataset)
    for _, keys in _keys(dataset, identical):
        known = np.flatnonzero(keys >= 0)
        rows.append(known)
        nodes.append(first + keys[known])
        first += int(keys.max(initial=-1)) + 1
    for one, other in _overlapping_pairs(dataset):
        rows.append(one)
        nodes.append(other)
    row, node = np.concatenate(rows), np.concatenate(nodes)
    graph = coo_matrix((np.ones(len(row), dtype=np.int8), (row, node)), shape=(first, first))
    _, component = connected_components(graph, directed=False)
    _, unit = np.unique(component[: len(dataset)], return_inverse=True)
    return unit.astype(np.int64)


def identical_volumes(dataset: Dataset, *, on_progress: OnProgress | None = None) -> list[list[int]]:
    """Groups of rows whose stored volumes are the same, byte for byte, by SHA-256; read once, then remembered.

    The result is kept in the dataset's folder, where that can be written to.
    """
    known = known_identical(dataset)
    if known is not None:
        return known
    digests = np.empty((len(dataset), 4), np.uint64)
    for rows, volumes in scan(dataset, on_progress=on_progress):
        for row, volume in zip(rows.tolist(), volumes, strict=True):
            digests[row] = np.frombuffer(hashlib.sha256(volume).digest(), np.uint64)
    _, inverse, counts = np.unique(digests, axis=0, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(counts[inverse.ravel()] > 1)
    groups: dict[int, list[int]] = {}
    for row in shared.tolist():
        groups.setdefault(int(inverse.ravel()[row]), []).append(row)
    found = sorted(groups.values())
    if os.access(dataset.folder, os.W_OK):
        content = {"fingerprint": dataset.manifest.fingerprint, "identical": found}
        write_json(_cache(dataset.folder), {"sha256": _digest(content), "content": content})
    return found


def known_identical(dataset: Dataset) -> list[list[int]] | None:
    """What `identical_volumes` found of this very dataset before; None if it never looked, or that is damaged."""
    path = _cache(dataset.folder)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        content = stored["content"]
        if stored["sha256"] != _digest(content) or content["fingerprint"] != dataset.manifest.fingerprint:
            return None
        groups = [[int(row) for row in group] for group in content["identical"]]
        return groups if all(0 <= row < len(dataset) for group in groups for row in group) else None
    except (OSError, ValueError, TypeError, LookupError):
        return None  # a cache: it is made again


def _cache(folder: Path) -> Path:
    return folder / "splits" / CACHE_NAME


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _keys(dataset: Dataset, identical: Sequence[Sequence[int]]) -> list[tuple[str, Rows]]:
    """What is compared, and for every row a number that is equal where that is the same; -1 where it is not known."""
    ids = dataset.particle_ids.tolist()
    stripped = [_without_snr(text) for text in ids]
    particles = np.full(len(dataset), -1, np.int64)
    if stripped != ids:  # else every id is another one
        # The same number may count different things in different classes.
        particles = _numbers(zip(stripped, dataset.labels.tolist(), strict=True))
    content = np.full(len(dataset), -1, np.int64)
    for number, group in enumerate(identical):
        content[np.asarray(group, dtype=np.int64)] = number
    tomograms = np.where(dataset.tomograms == "", -1, _numbers(map(_without_snr, dataset.tomograms.tolist())))
    return [("tomogram", tomograms), ("particle", particles), ("volume", content)]


def _without_snr(text: str) -> str:
    return _SNR.sub("", text) if "snr" in text.lower() else text


def _numbers(values: Iterable[Hashable]) -> Rows:
    """A number for each value, the same for equal ones."""
    number_of: dict[Hashable, int] = {}
    return np.array([number_of.setdefault(value, len(number_of)) for value in values], dtype=np.int64)


def _refuse_shared(dataset: Dataset, parts: Array, rows: Array, keys: Array, what: str) -> None:
    """Refuse two of `rows` that have the same key and different parts."""
    order = rows[np.lexsort((parts[rows], keys[rows]))]
    one, other = order[:-1], order[1:]
    leaks = np.flatnonzero((keys[one] == keys[other]) & (parts[one] != parts[other]))
    if not len(leaks):
        return
    a, b = int(one[leaks[0]]), int(other[leaks[0]])
    told = {
        "tomogram": f"are of the same tomogram {str(dataset.tomograms[a])!r}",
        "particle": "are the same particle, at two signal-to-noise ratios",
        "volume": "have the same volume, byte for byte",
    }[what]
    raise DataError(f"{_in_two_splits(dataset, parts, a, b)} {told}; {_MEND}")


def _refuse_overlaps(dataset: Dataset, parts: Array) -> None:
    rows, scaled = _unnamed_positions(dataset)
    rows, scaled = rows[parts[rows] != ""], scaled[parts[rows] != ""]
    for part in np.unique(parts[rows]).tolist():
        inside = parts[rows] == part
        if inside.all():
            return
        others = np.flatnonzero(~inside)
        distance, nearest = KDTree(scaled[others]).query(scaled[inside], p=np.inf, distance_upper_bound=1.0)
        if (distance < 1).any():
            at = int(np.flatnonzero(distance < 1)[0])
            a, b = int(rows[np.flatnonzero(inside)[at]]), int(rows[others[nearest[at]]])
            raise DataError(
                f"{_in_two_splits(dataset, parts, a, b)} have boxes that overlap, if they are of one tomogram, which "
                f"is not known; {_MEND}, or import it again with the tomograms' names"
            )


_MEND = "split the dataset anew with `studytool data split`"


def _in_two_splits(dataset: Dataset, parts: Array, a: int, b: int) -> str:
    one, other = (f"{str(dataset.particle_ids[row])!r} in {str(parts[row])!r}" for row in (a, b))
    return f"{dataset.folder}: {one} and {other}"


def _unnamed_positions(dataset: Dataset) -> tuple[Array, Array]:
    """Rows without a tomogram but with a position, and those positions in boxes: boxes overlap within less than 1."""
    rows = np.flatnonzero((dataset.tomograms == "") & np.isfinite(dataset.positions_zyx).all(axis=1))
    return rows, dataset.positions_zyx[rows] / np.array(dataset.manifest.shape_dhw, dtype=np.float64)


def _overlapping_pairs(dataset: Dataset) -> list[tuple[Array, Array]]:
    rows, scaled = _unnamed_positions(dataset)
    if len(rows) < 2:
        return []
    tree = KDTree(scaled)
    within = np.nextafter(1.0, 0.0)
    if tree.count_neighbors(tree, within, p=np.inf) > _MAX_PAIRS:
        raise DataError(
            f"{dataset.folder}: {len(rows)} volumes have a position but no tomogram, and nearly all of their boxes "
            "would overlap in one; import them again with the tomograms' names"
        )
    pairs = tree.query_pairs(within, p=np.inf, output_type="ndarray")
    return [(rows[pairs[:, 0]], rows[pairs[:, 1]])]


def _notes(dataset: Dataset, ungrouped: int) -> tuple[str, ...]:
    if not ungrouped:
        return ()
    which = "all volumes" if ungrouped == len(dataset) else f"{ungrouped} of {len(dataset)} volumes"
    return (
        f"{dataset.folder}: the tomogram of {which} is not known, so that volumes of one tomogram may stand in two "
        "splits and scores may be too good.",
    )
