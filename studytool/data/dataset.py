"""An opened dataset: labels and groups as arrays, volumes by row number, copied straight from the mapped files."""

from __future__ import annotations

import mmap
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studytool.data.manifest import Manifest
from studytool.data.particles import SPLITS
from studytool.data.shardfile import ShardFile
from studytool.errors import DataError, unknown_name

Array = np.ndarray[Any, Any]

_DECODED_BYTES = 128 * 1024 * 1024


class Dataset:
    """An opened dataset of N volumes; row numbers count through the shards in their order.

    `labels` int64 [N] are indices into `manifest.classes`; `splits`, `tomograms` and `particle_ids` are text [N]; `snr`
    float64 [N] and `positions_zyx` float64 [N, 3] (voxels in the tomogram) are NaN where not known. Volumes may be
    read from several threads at once. `fingerprint` is equal for two datasets whose volumes and splits are.
    """

    def __init__(self, folder: Path, manifest: Manifest, shards: Sequence[ShardFile]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shards = shards
        self._first_rows = np.cumsum([0, *(shard.rows for shard in shards)])
        self._starts = np.concatenate([shard.starts for shard in shards])
        self._some_decoded = bool((self._starts < 0).any())
        self._decoded = _DecodedGroups(shards, manifest.volume_bytes)
        columns = [shard.columns for shard in shards]
        self.labels = np.concatenate([_label_indices(shard, manifest.classes) for shard in shards])
        self.splits = self.stored_splits = np.concatenate([part.split for part in columns])
        self.tomograms = np.concatenate([part.tomogram for part in columns])
        self.particle_ids = np.concatenate([part.particle_id for part in columns])
        self.snr = np.concatenate([part.snr for part in columns])
        self.positions_zyx = np.concatenate([part.position_zyx for part in columns])
        self.fingerprint = manifest.fingerprint
        self._check_counts()
        self._warn_if_slow()

    def __len__(self) -> int:
        return len(self._starts)

    def use_splits(self, splits: Array, fingerprint: str) -> None:
        """Use other splits [N] than the stored ones; `fingerprint` is of the dataset with them."""
        if splits.shape != self.splits.shape:
            raise ValueError(f"{len(splits)} splits for {len(self)} volumes")
        self.splits = splits
        self.fingerprint = fingerprint

    def place(self, row: int) -> str:
        """Where a row stands, for a person: "DIR/part-00001.parquet: row 12"."""
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return f"{self._shards[number].path}: row {row - int(self._first_rows[number])}"

    def rows(self, split: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Row numbers of one split ("train", "val" or "test"), rising.

        Raises:
            DataError: the split is unknown or has no volumes.
        """
        if split not in SPLITS:
            raise DataError(f"{self.folder}: {unknown_name('split', split, SPLITS)}")
        rows = np.flatnonzero(self.splits == split)
        if not len(rows):
            held = ", ".join(f"{name or 'no split'}: {count}" for name, count in Counter(self.splits.tolist()).items())
            raise DataError(
                f"{self.folder}: no volume is in the split {split!r} (found {held}); split the dataset first"
            )
        return rows

    def gather(self, rows: Array, out: Any) -> None:
        """Copy the volumes of `rows` into `out`, a contiguous array or CPU tensor [n, D, H, W] or [n, 1, D, H, W].

        `out` has to be of the stored dtype (`manifest.dtype`).

        Raises:
            IndexError: a row number is out of range.
            ValueError: `out` is of another shape or dtype, or not contiguous.
            DataError: a row group that has to be decoded is damaged.
        """
        rows = np.asarray(rows, dtype=np.int64)
        target = self._as_bytes(out, len(rows))
        shard_numbers, starts = self._locate(rows)
        width = self.manifest.volume_bytes
        for slot, (number, start) in enumerate(zip(shard_numbers.tolist(), starts.tolist(), strict=True)):
            if start >= 0:
                target[slot] = self._shards[number].content[start : start + width]  # numpy lets other threads run here
        if self._some_decoded:
            for slot in np.flatnonzero(starts < 0)[np.argsort(rows[starts < 0])]:  # sorted: each group is decoded once
                number = shard_numbers[slot]
                target[slot] = self._decoded.volume(number, int(rows[slot] - self._first_rows[number]))

    def announce(self, rows: Array) -> None:
        """Ask the kernel to read the volumes of `rows` from the disk soon."""
        shard_numbers, starts = self._locate(np.asarray(rows, dtype=np.int64))
        width = self.manifest.volume_bytes
        for number, start in zip(shard_numbers.tolist(), starts.tolist(), strict=True):
            if start >= 0:
                page = start // mmap.PAGESIZE * mmap.PAGESIZE
                self._shards[number].memory.madvise(mmap.MADV_WILLNEED, page, start + width - page)

    def _locate(self, rows: Array) -> tuple[Array, Array]:
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a dataset of {len(self)} volumes")
        return np.searchsorted(self._first_rows, rows, side="right") - 1, self._starts[rows]

    def _as_bytes(self, out: Any, count: int) -> Array:
        array: Array = out if isinstance(out, np.ndarray) else out.numpy()
        shape = self.manifest.shape_dhw
        if array.shape not in ((count, *shape), (count, 1, *shape)) or array.dtype != np.dtype(self.manifest.dtype):
            raise ValueError(
                f"out is {array.dtype} {list(array.shape)}, "
                f"it has to be {self.manifest.dtype} [{count}, {', '.join(map(str, shape))}]"
            )
        if not array.flags.c_contiguous:
            raise ValueError("out has to be contiguous")
        return array.reshape(-1).view(np.uint8).reshape(count, self.manifest.volume_bytes)

    def _check_counts(self) -> None:
        pairs = Counter(zip(self.labels.tolist(), self.splits.tolist(), strict=True))
        for index, name in enumerate(self.manifest.classes):
            for split in (*SPLITS, ""):
                stated = self.manifest.counts[name].get(split, 0)
                if pairs[index, split] != stated:
                    raise DataError(
                        f"{self.folder}: class {name!r} has {pairs[index, split]} volumes in split {split!r}, "
                        f"the manifest says {stated}"
                    )

    def _warn_if_slow(self) -> None:
        slow = [shard.path.name for shard in self._shards if (shard.starts < 0).any()]
        if slow:
            warnings.warn(
                f"{self.folder}: {len(slow)} of {len(self._shards)} shards (first: {slow[0]}) are compressed or of "
                "another layout and are decoded at every read, which is slow; write them again with this studytool",
                stacklevel=4,
            )


class _DecodedGroups:
    """The row groups that had to be decoded last, up to a number of bytes."""

    def __init__(self, shards: Sequence[ShardFile], volume_bytes: int) -> None:
        self._shards = shards
        self._volume_bytes = volume_bytes
        self._groups: OrderedDict[tuple[int, int], Array] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def volume(self, number: int, row: int) -> Array:
        """The bytes of volume `row` of shard `number`."""
        shard = self._shards[number]
        group = int(np.searchsorted(shard.groups, row, side="right")) - 1
        with self._lock:
            volumes = self._groups.pop((number, group), None)
            if volumes is None:
                volumes = shard.decode_group(group, self._volume_bytes)
                self._bytes += volumes.nbytes
            self._groups[number, group] = volumes
            while self._bytes > _DECODED_BYTES and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1].nbytes
        return volumes[row - shard.groups[group]]  # type: ignore[no-any-return]


def _label_indices(shard: ShardFile, classes: Sequence[str]) -> Array:
    index = {name: number for number, name in enumerate(classes)}
    names, inverse = np.unique(shard.columns.label, return_inverse=True)
    unknown = [name for name in names.tolist() if name not in index]
    if unknown:
        row = int(np.flatnonzero(shard.columns.label == unknown[0])[0])
        raise DataError(f"{shard.path}: row {row} has the label {unknown[0]!r}, which the manifest does not list")
    return np.array([index[name] for name in names.tolist()], dtype=np.int64)[inverse]
