"""Datasets at an address, copied once to this machine and shared by everything that runs on it.

Training reads volumes in random order, so that every shard is needed from the first batch on: shards are fetched whole,
several at once, held against the manifest's checksums as they arrive, and then mapped like local ones. A file that
stands under its name in the cache has been checked.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from studytool.data.cachefolder import bound_bytes, cache_folder, locked, make_room
from studytool.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest
from studytool.errors import DataError
from studytool.files import whole_file, write_text
from studytool.remote import RemoteFolder, is_remote, open_remote

_AT_ONCE = 8
_MOST_JSON_BYTES = 256 * 1024 * 1024
_SPLITS = "splits"


def local_copy(address: str, *, look_again: bool = False) -> Path:
    """The folder of a dataset on this machine: `address` itself where it is a path, else a checked copy in the cache.

    A copy that is there is used without asking the server, so that trials do not depend on it; with `look_again` it is
    asked whether the dataset at the address is still the same, and has new splits. Datasets used longest ago make room
    for new ones (see `studytool.data.cachefolder`).

    Raises:
        DataError: the dataset cannot be fetched, is damaged, or is larger than the cache may be.
    """
    if not is_remote(address):
        return Path(address)
    root = cache_folder("datasets")
    pointer = root / f"{hashlib.sha256(address.rstrip('/').encode()).hexdigest()[:32]}.fingerprint"
    if not look_again and pointer.is_file():
        folder = root / pointer.read_text(encoding="ascii")
        if (folder / MANIFEST_NAME).is_file():
            os.utime(folder)
            return folder
    folder = _fetched(open_remote(address), root)
    write_text(pointer, folder.name)
    return folder


def _fetched(remote: RemoteFolder, root: Path) -> Path:
    """The folder in the cache, after what it lacked has been fetched."""
    content = remote.read(MANIFEST_NAME, most_bytes=_MOST_JSON_BYTES)
    manifest = _checked(content, remote)
    folder = root / manifest.fingerprint
    with locked(folder):
        folder.mkdir(exist_ok=True)
        for stale in folder.glob(".*.part"):  # of a process that was killed: whoever writes here holds the lock
            stale.unlink()
        missing = [entry for entry in manifest.shards if not _is_here(folder, entry)]
        _check_fits(root, manifest)
        make_room(root, folder, sum(entry.bytes for entry in manifest.shards))
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="studytool-fetch") as pool:
            fetched = [
                pool.submit(remote.fetch, entry.name, folder / entry.name, sha256=entry.sha256) for entry in missing
            ]
            try:
                for future in fetched:
                    future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        # Splits may have been added since; the manifest comes last, so that what has one is whole.
        for name in remote.names(_SPLITS):
            _write(folder / _SPLITS / name, remote.read(f"{_SPLITS}/{name}", most_bytes=_MOST_JSON_BYTES))
        _write(folder / MANIFEST_NAME, content)
    os.utime(folder)
    return folder


def _checked(content: bytes, remote: RemoteFolder) -> Manifest:
    """The remote manifest, checked like a local one."""
    with tempfile.TemporaryDirectory(prefix="studytool-") as name:
        (Path(name) / MANIFEST_NAME).write_bytes(content)
        try:
            return read_manifest(Path(name))
        except DataError as error:
            raise DataError(str(error).replace(name, remote.address)) from error


def _check_fits(root: Path, manifest: Manifest) -> None:
    needed, bound = sum(entry.bytes for entry in manifest.shards), bound_bytes()
    if needed > bound:
        raise DataError(
            f"the dataset has {needed / 1e9:.1f} GB, the cache {root} may have {bound / 1e9:.1f}; "
            "set STUDYTOOL_CACHE_GB to more, or copy the dataset to this machine"
        )


def _is_here(folder: Path, entry: ShardEntry) -> bool:
    path = folder / entry.name
    return path.is_file() and path.stat().st_size == entry.bytes


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
