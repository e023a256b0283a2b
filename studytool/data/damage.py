"""Whether a dataset's shards are what its manifest says, to the last bit, before a study relies on them."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from studytool.data.manifest import Manifest, ShardEntry, fingerprint_of, write_manifest
from studytool.data.partial import whole_folder
from studytool.data.particles import SPLITS
from studytool.data.splits import list_splits, store_split
from studytool.errors import DataError, DiskFullError
from studytool.files import sha256_of, write_json

_READERS = 4
_TRUSTED_SECONDS = 7 * 24 * 3600.0
_MOMENT_SECONDS = 2.0


def damaged_shards(
    folder: Path,
    manifest: Manifest,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    notes: Path | None = None,
) -> list[str]:
    """The names of the shards that are missing, cut off, or of another SHA-256 than the manifest says.

    Args:
        folder: the dataset's.
        manifest: what it says of itself.
        on_progress: is told how many shards of how many have been looked at.
        notes: a folder in which to note what was found whole: a shard that has been so for less than a week, by size,
            time of change and inode, is not read again. Without it every byte is.
    """
    known = _Known(notes, folder) if notes else None
    damaged = []
    with ThreadPoolExecutor(max_workers=_READERS) as pool:  # hashing runs without Python's lock
        checks = [pool.submit(_whole, folder, entry, known) for entry in manifest.shards]
        try:
            for done, (entry, check) in enumerate(zip(manifest.shards, checks, strict=True), start=1):
                if not check.result():
                    damaged.append(entry.name)
                if on_progress is not None:
                    on_progress(done, len(manifest.shards))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C need not wait for the rest
    if known is not None:
        known.keep()
    return damaged


def leave_out(folder: Path, manifest: Manifest, damaged: Collection[str], out: Path) -> None:
    """Make the dataset `out`, which has all shards of `folder` but the damaged ones, as links, and its splits.

    An `out` that is there already is made anew.

    Raises:
        DataError: every shard is damaged, or a name is that of no shard.
    """
    unknown = sorted({*damaged} - {entry.name for entry in manifest.shards})
    if unknown:
        raise DataError(f"{folder}: data.leave_out: there is no shard {unknown[0]!r}")
    kept = [entry for entry in manifest.shards if entry.name not in damaged]
    if not kept:
        raise DataError(f"{folder}: every shard is damaged; fetch or make the dataset again")
    shutil.rmtree(out, ignore_errors=True)
    counts: Counter[tuple[str, str]] = Counter()
    tomograms: set[str] = set()
    with whole_folder(out) as temporary:
        for entry in kept:
            (temporary / entry.name).symlink_to((folder / entry.name).absolute())
            table = pq.read_table(folder / entry.name, columns=["label", "split", "tomogram"], use_threads=False)
            labels, splits, groups = (table.column(name).to_pylist() for name in ("label", "split", "tomogram"))
            counts.update(zip(labels, splits, strict=True))
            tomograms.update(filter(None, groups))
        rest = replace(
            manifest,
            fingerprint=fingerprint_of(kept),
            counts={
                name: {split: counts[name, split] for split in (*SPLITS, "") if counts[name, split]}
                for name in manifest.classes
            },
            tomograms=tuple(sorted(tomograms)),
            shards=tuple(kept),
            provenance={**manifest.provenance, "left_out_as_damaged": sorted(damaged)},
        )
        write_manifest(temporary, rest)
        whole_rows = np.repeat(
            [entry.name not in damaged for entry in manifest.shards], [entry.rows for entry in manifest.shards]
        )
        for split in list_splits(folder):
            letters = np.array(list(split.assignment))[whole_rows]
            store_split(temporary, replace(split, fingerprint=rest.fingerprint, assignment="".join(letters)))


class _Known:
    """Which shards of a folder were found whole, and when: a line of JSON each, in a file of the folder's own."""

    def __init__(self, notes: Path, folder: Path) -> None:
        place = str(folder.absolute())
        self._path = notes / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.json"
        self._now = time.time()
        self._before: dict[str, Any] = {}
        self._found: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            self._before = stored if isinstance(stored, dict) else {}

    def holds(self, path: Path, sha256: str) -> bool:
        """Whether the file is the one that was found whole, and not too long ago."""
        found = self._before.get(path.name)
        if not isinstance(found, list) or len(found) != 2 or found[0] != _identity(path, sha256):
            return False
        if not isinstance(found[1], float) or not 0 <= self._now - found[1] < _TRUSTED_SECONDS:
            return False
        self._found[path.name] = found
        return True

    def note(self, path: Path, identity: list[Any]) -> None:
        """Note that a file was whole; one changed a moment ago may change again within the same tick of its clock."""
        if self._now - identity[2] / 1e9 > _MOMENT_SECONDS:
            self._found[path.name] = [identity, self._now]

    def keep(self) -> None:
        """Write it down; if that fails everything is read again the next time."""
        if self._found != self._before:
            with suppress(OSError, DiskFullError):
                write_json(self._path, self._found)


def _identity(path: Path, sha256: str) -> list[Any]:
    there = path.stat()
    return [there.st_size, there.st_mtime_ns, there.st_ctime_ns, there.st_ino, sha256]


def _whole(folder: Path, entry: ShardEntry, known: _Known | None) -> bool:
    path = folder / entry.name
    try:
        if known is not None and known.holds(path, entry.sha256):
            return True
        identity = _identity(path, entry.sha256)
        whole = identity[0] == entry.bytes and sha256_of(path) == entry.sha256
        if whole and known is not None:
            known.note(path, identity)
        return whole
    except OSError:
        return False
