"""Datasets at an address, copied once to this machine and shared by everything that runs on it.

Training reads volumes in random order, so that every shard is needed from the first batch on: shards are fetched whole,
several at once, held against the manifest's checksums as they arrive, and then mapped like local ones. A file that
stands under its name in the cache has been checked.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from studytool.data.cachefolder import bound_bytes, cache_folder, locked, make_room
from studytool.data.damage import leave_out as make_rest
from studytool.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest
from studytool.errors import DamagedError, DataError
from studytool.files import sha256_of, whole_file, write_text
from studytool.remote import RemoteFolder, is_remote, open_remote

_AT_ONCE = 8
_MOST_JSON_BYTES = 256 * 1024 * 1024
_SPLITS = "splits"


def local_copy(address: str, *, look_again: bool = False, leave_out: Collection[str] = ()) -> Path:
    """The folder of a dataset on this machine: `address` itself where it is a path, else a checked copy in the cache.

    A copy that is there is used without asking the server, so that trials do not depend on it; with `look_again` it is
    asked whether the dataset at the address is still the same, and has new splits. Datasets used longest ago make room
    for new ones (see `studytool.data.cachefolder`). Without the shards that `leave_out` names it is a dataset of its
    own, the same wherever it is made.

    Raises:
        DamagedError: shards at the address are missing or damaged.
        DataError: the dataset cannot be fetched, or is larger than the cache may be.
    """
    if not is_remote(address):
        return _without(Path(address), None, leave_out) if leave_out else Path(address)
    there = None if look_again else _copied(address, leave_out)
    if there is not None:
        return there
    root = cache_folder("datasets")
    folder = _fetched(open_remote(address), root, leave_out)
    write_text(_pointer(address, leave_out), folder.relative_to(root).as_posix())
    return folder


def is_copied(address: str, leave_out: Collection[str] = ()) -> bool:
    """Whether a dataset at an address has been copied to this machine."""
    return _copied(address, leave_out) is not None


def _copied(address: str, leave_out: Collection[str]) -> Path | None:
    pointer = _pointer(address, leave_out)
    if pointer.is_file():
        name = pointer.read_text(encoding="ascii")
        if (pointer.parent / name / MANIFEST_NAME).is_file():
            os.utime(pointer.parent / name.split("/")[0])
            return pointer.parent / name
    return None


def _pointer(address: str, leave_out: Collection[str]) -> Path:
    """The file that says where in the cache the copy is."""
    key = "\n".join([address.rstrip("/"), *sorted(leave_out)])
    return cache_folder("datasets") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.fingerprint"


def _without(folder: Path, manifest: Manifest | None, names: Collection[str]) -> Path:
    """A dataset of links to the other shards of `folder`: in it, if its manifest is given, else in the cache."""
    parts = [str(folder.absolute()), (manifest or read_manifest(folder)).fingerprint, *sorted(names)]
    parts += [sha256_of(split) for split in sorted((folder / _SPLITS).glob("*.json"))]
    root = cache_folder("without-damage") if manifest is None else folder
    rest = root / f"without-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"
    with locked(rest):
        if not (rest / MANIFEST_NAME).is_file():
            make_rest(folder, manifest or read_manifest(folder), names, rest)
    return rest


def _fetched(remote: RemoteFolder, root: Path, leave_out: Collection[str]) -> Path:
    """The folder in the cache, after what it lacked has been fetched."""
    content = remote.read(MANIFEST_NAME, most_bytes=_MOST_JSON_BYTES)
    manifest = _checked(content, remote)
    folder = root / manifest.fingerprint
    with locked(folder):
        folder.mkdir(exist_ok=True)
        for stale in folder.glob(".*.part"):  # of a process that was killed: whoever writes here holds the lock
            stale.unlink()
        missing = [entry for entry in manifest.shards if entry.name not in leave_out and not _is_here(folder, entry)]
        _check_fits(root, manifest)
        make_room(root, folder, sum(entry.bytes for entry in manifest.shards))
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="studytool-fetch") as pool:
            fetched = [
                pool.submit(remote.fetch, entry.name, folder / entry.name, sha256=entry.sha256) for entry in missing
            ]
            try:
                damaged = [error for future in fetched for error in _damage(future)]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        if damaged:
            raise DamagedError(str(damaged[0]), [name for error in damaged for name in error.names])
        # Splits may have been added since; the manifest comes last, so that what has one is whole.
        for name in remote.names(_SPLITS):
            _write(folder / _SPLITS / name, remote.read(f"{_SPLITS}/{name}", most_bytes=_MOST_JSON_BYTES))
        if not leave_out:
            _write(folder / MANIFEST_NAME, content)
    os.utime(folder)
    return _without(folder, manifest, leave_out) if leave_out else folder


def _damage(fetched: Future[None]) -> list[DamagedError]:
    """What was found damaged; other errors are raised."""
    try:
        fetched.result()
    except DamagedError as error:
        return [error]
    return []


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
