"""State files and shards with flipped bits, cut off, or deleted: noticed, and recovered from or refused."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from synthetic_study import Driver

from reliability.kills import BrokenPromiseError
from reliability.writes import particles
from studytool.data.damage import damaged_shards
from studytool.data.shards import read_manifest, write_dataset
from studytool.errors import StudytoolError
from studytool.study.ledger import Ledger


def shards_damaged(folder: Path, flips: int, cuts: int, seed: int) -> dict[str, float]:
    """Flip one bit, or cut the end off, of a shard of a dataset: the study's own check has to name that file."""
    rng = random.Random(seed)
    dataset = folder / "data"
    write_dataset(particles(seed), dataset, dtype="float16", provenance={}, volumes_per_shard=8)
    manifest = read_manifest(dataset)
    if damaged_shards(dataset, manifest):
        raise BrokenPromiseError(f"{dataset}: whole shards are called damaged")
    for i in range(flips + cuts):
        path = dataset / rng.choice(manifest.shards).name
        content = path.read_bytes()
        path.write_bytes(_flipped(content, rng) if i < flips else content[: rng.randrange(len(content))])
        if damaged_shards(dataset, manifest) != [path.name]:
            raise BrokenPromiseError(f"{path}: damage was not noticed")
        path.write_bytes(content)
    return {"flips": flips, "truncations": cuts, "not noticed": 0}


def state_damaged(folder: Path, count: int, seed: int) -> dict[str, float]:
    """Damage one state file of a finished study, or both generations of it, then open the study again.

    With one generation left everything that had been found is still there; with none the study is refused. Nothing is
    begun again in silence.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    driver = Driver(folder)
    expected = driver.outcome_of(driver.run())
    for trial in (driver.spec.folder / "trials").iterdir():
        (trial / "trial.log").touch()  # as the program leaves it
    recovered = refused = 0
    for _ in range(count):
        whole = folder / "whole"
        shutil.copytree(driver.spec.folder, whole)
        path = rng.choice(sorted(driver.spec.folder.glob("**/*.json")))
        both = rng.random() < 0.5
        for file in (path, path.with_name(f"{path.name}.previous"))[: 1 + both]:
            _damage(file, rng)
        try:
            ledger = Ledger(driver.spec, "data")
            ledger.close()
            recovered += 1
            if {r.trial_id for r in ledger.records} != {*expected}:
                raise BrokenPromiseError(f"{path}: a trial was dropped")
            driver.epochs_run.clear()
            if driver.outcome_of(driver.run()) != expected:
                raise BrokenPromiseError(f"{path}: the study ended otherwise")
            if driver.epochs_run:
                raise BrokenPromiseError(f"{path}: {len(driver.epochs_run)} epochs were run again")
        except StudytoolError:
            refused += 1
        shutil.rmtree(driver.spec.folder)
        whole.rename(driver.spec.folder)
    return {"damaged": count, "recovered": recovered, "refused": refused, "begun again in silence": 0}


def _damage(path: Path, rng: random.Random) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    kind = rng.choice(["flip", "cut", "delete"])
    if kind == "delete":
        path.unlink()
    else:
        path.write_bytes(_flipped(content, rng) if kind == "flip" else content[: rng.randrange(len(content))])


def _flipped(content: bytes, rng: random.Random) -> bytes:
    bit = rng.randrange(8 * len(content))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
