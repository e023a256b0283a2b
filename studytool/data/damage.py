"""Whether a dataset's shards are what its manifest says, to the last bit, before a study relies on them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from studytool.data.manifest import Manifest, ShardEntry, fingerprint_of, write_manifest
from studytool.data.partial import whole_folder
from studytool.data.particles import SPLITS
from studytool.data.splits import list_splits, store_split
from studytool.errors import DataError
from studytool.files import sha256_of

_READERS = 4


def damaged_shards(
    folder: Path, manifest: Manifest, on_progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """The names of the shards that are missing, cut off, or of another SHA-256 than the manifest says.

    Every byte is read once, so that the files are in the machine's cache afterwards as far as they fit.
    """
    damaged = []
    with ThreadPoolExecutor(max_workers=_READERS) as pool:  # hashing runs without Python's lock
        checks = pool.map(lambda entry: _whole(folder, entry), manifest.shards)
        for done, (entry, whole) in enumerate(zip(manifest.shards, checks, strict=True), start=1):
            if not whole:
                damaged.append(entry.name)
            if on_progress is not None:
                on_progress(done, len(manifest.shards))
    return damaged


def leave_out(folder: Path, manifest: Manifest, damaged: Collection[str], out: Path) -> None:
    """Make the dataset `out`, which has all shards of `folder` but the damaged ones, as links, and its splits.

    An `out` that is there already is made anew.

    Raises:
        DataError: every shard is damaged.
    """
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


def _whole(folder: Path, entry: ShardEntry) -> bool:
    path = folder / entry.name
    try:
        return path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256
    except OSError:
        return False
