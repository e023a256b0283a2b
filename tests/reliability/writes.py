"""Writers killed in the middle of writing, and system calls that fail: what stands under a final name is whole."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from synthetic_study import STUDY, synthetic_epochs

from reliability.kills import BrokenPromiseError
from studytool import remote
from studytool.data.particles import Particle
from studytool.data.remote_copy import local_copy
from studytool.data.shards import verify_dataset, write_dataset
from studytool.errors import StudytoolError
from studytool.spec import TrialSpec, load_study
from studytool.study.director import Director
from studytool.study.ledger import Ledger
from studytool.study.records import read_records
from studytool.training import trained
from studytool.training.checkpoint import TrialState, load_last, save_last

CALLS = ("fsync", "rename", "replace", "link")


class Kept:
    """A kind of file: how it is written again and again, and how it is checked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, number: int) -> None:
        raise NotImplementedError

    def check(self) -> None:
        """Read everything that stands under a final name; an exception if it is not whole."""
        raise NotImplementedError


class LedgerFiles(Kept):
    """The record of one trial, replaced after every epoch."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "a.yaml").write_text(STUDY)
        self.spec = load_study(folder / "a.yaml", [f"output={folder / 'studies'}"])
        self.epochs = list(synthetic_epochs(_trial(self.spec)))

    def write(self, number: int) -> None:
        ledger = Ledger(self.spec, "data")
        try:
            if not ledger.records:
                Director(self.spec, ledger, "data").next_trial()
            record = ledger.records[0]
            ledger.put(replace(record, epochs=tuple(self.epochs[: 1 + number % 3]), message=str(number)))
        finally:
            ledger.close()

    def check(self) -> None:
        if self.spec.folder.exists():
            Ledger(self.spec, "data").close()
            for record in read_records(self.spec.folder):
                if record.message and len(record.epochs) != 1 + int(record.message) % 3:
                    raise BrokenPromiseError(f"{self.spec.folder}: a record of two writes")


class CheckpointFiles(Kept):
    """`last.pt` and the selected weights."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "a.yaml").write_text(STUDY)
        self.trial = _trial(load_study(folder / "a.yaml"))
        self.epochs = list(synthetic_epochs(self.trial))

    def write(self, number: int) -> None:
        weights = {"weight": torch.full((64, 64), float(number))}
        epochs = tuple(self.epochs[: 1 + number % 3])
        save_last(self.folder, TrialState(epochs, False, weights, {}), self.trial, "data")
        model = torch.nn.Linear(64, 64)
        torch.nn.init.constant_(model.weight, number)
        record = trained.BestRecord(self.trial, ("a", "b"), (16, 16, 16), 10.0, "data", "float32", epochs[-1])
        trained.save_best(self.folder, model, record)

    def check(self) -> None:
        state = load_last(self.folder, self.trial, "data") if (self.folder / "last.pt").exists() else None
        if state is not None and len(state.model["weight"].unique()) != 1:
            raise BrokenPromiseError(f"{self.folder}: weights of two writes")
        if (self.folder / "best.json").exists() and (self.folder / "best.safetensors").exists():
            load_file(self.folder / "best.safetensors")
            trained.read_best(self.folder)


class ShardFiles(Kept):
    """Datasets, one after the other."""

    def write(self, number: int) -> None:
        write_dataset(
            particles(number), self.folder / f"set-{number}", dtype="float16", provenance={}, volumes_per_shard=8
        )

    def check(self) -> None:
        for folder in self.folder.glob("set-*"):
            verify_dataset(folder)


class CacheFiles(Kept):
    """The copy of a dataset at an address."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.address = f"file://{folder}/origin"
        remote.RETRY_AFTER_SECONDS = (0.0,) * len(remote.RETRY_AFTER_SECONDS)  # what fails here fails for good
        if not (folder / "origin").exists():
            write_dataset(particles(0), folder / "origin", dtype="float16", provenance={}, volumes_per_shard=8)

    def write(self, number: int) -> None:
        os.environ["STUDYTOOL_CACHE"] = str(self.folder / f"cache-{number}")
        local_copy(self.address, look_again=True)

    def check(self) -> None:
        for manifest in self.folder.glob("cache-*/**/manifest.json"):
            if not any(part.startswith(".") for part in manifest.relative_to(self.folder).parts):
                verify_dataset(manifest.parent)
        for shard in self.folder.glob("cache-*/**/part-*.parquet"):
            size = (self.folder / "origin" / shard.name).stat().st_size
            if shard.stat().st_size != size:
                raise BrokenPromiseError(f"{shard} is cut off")


KINDS: dict[str, type[Kept]] = {
    "ledger": LedgerFiles,
    "checkpoints": CheckpointFiles,
    "shards": ShardFiles,
    "cache": CacheFiles,
}


def writers_killed(kind: str, folder: Path, count: int, seed: int) -> dict[str, float]:
    """Kill a writer `count` times at a random moment; after each kill everything under a final name is read."""
    kept, rng = KINDS[kind](folder), random.Random(seed)
    begun = time.monotonic()
    kept.write(0)
    longest, written = max(2 * (time.monotonic() - begun), 0.02), 1
    for _ in range(count):
        child = os.fork()
        if child == 0:
            _write_forever(kept, written)
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        written += 1000  # other names than those the killed one may have left
        _checked(kept)
        _sweep(kept, rng)
    return {"kills": count}


def calls_failing(kind: str, folder: Path, most: int) -> dict[str, float]:
    """Make the n-th fsync, rename, replace and link fail, and the write that comes to byte n of a file.

    Every n there is, but at most `most` of each call; for writes `most` sizes up to beyond that of the largest file.
    """
    kept = KINDS[kind](folder)
    kept.write(0)
    failures, number = 0, 1
    for call in CALLS:
        for n in range(most):
            with _failing(call, n) as happened, suppress(OSError, StudytoolError, RuntimeError):
                kept.write(number)
            number += 1
            if not happened:
                break
            failures += 1
            _checked(kept)
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for size in np.unique(np.geomspace(1, 1.2 * largest, most).astype(int)).tolist():
        child = os.fork()
        if child == 0:
            _write_at_most(kept, number, size)
        _, status = os.waitpid(child, 0)
        failures += os.waitstatus_to_exitcode(status) != 0
        number += 1
        _checked(kept)
    kept.write(number + 1)
    _checked(kept)
    return {"failures": failures}


def _write_at_most(kept: Kept, number: int, size: int) -> None:
    """In a child: no file may grow beyond `size` bytes."""
    code = 1
    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        kept.write(number)
        code = 0
    finally:
        os._exit(code)


def particles(seed: int) -> Iterator[Particle]:
    """Sixteen small volumes in two classes and three splits."""
    rng = np.random.default_rng(seed)
    for i in range(16):
        split = ("train", "train", "val", "test")[i // 2 % 4]
        yield Particle(
            volume_DHW=rng.standard_normal((8, 8, 8), dtype=np.float32),
            label="ab"[i % 2],
            voxel_size_angstrom=10.0,
            tomogram=f"tomogram-{split}",
            split=split,
            particle_id=f"{seed}-{i}",
        )


def _write_forever(kept: Kept, number: int) -> None:
    try:
        while True:
            kept.write(number)
            number += 1
    finally:
        os._exit(1)


def _checked(kept: Kept) -> None:
    try:
        kept.check()
    except StudytoolError as error:
        raise BrokenPromiseError(f"torn: {error}") from error


def _sweep(kept: Kept, rng: random.Random) -> None:
    """Keep the folder small: what has been checked may go."""
    for pattern in ("set-*", "cache-*"):
        for folder in kept.folder.glob(pattern):
            if rng.random() < 0.9:
                shutil.rmtree(folder)


@contextmanager
def _failing(call: str, n: int) -> Iterator[list[str]]:
    """Let the n-th call of os.`call` raise EIO; the list holds its name once it has."""
    real: Callable[..., Any] = getattr(os, call)
    calls, happened = 0, list[str]()

    def failing(*words: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n + 1:
            happened.append(call)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*words, **options)

    setattr(os, call, failing)
    try:
        yield happened
    finally:
        setattr(os, call, real)


def _trial(spec: Any) -> TrialSpec:
    (arm, *_) = spec.list_arms()
    trial: TrialSpec = spec.trial(arm, {"learning_rate": 0.01}, phase="search", number=0, seed=0)
    return trial
