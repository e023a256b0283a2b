from __future__ import annotations

import os
import time

import numpy as np
import pytest

from studytool.data import damage
from studytool.data.damage import damaged_shards, leave_out
from studytool.data.particles import Particle
from studytool.data.shards import open_dataset, read_manifest, verify_dataset, write_dataset
from studytool.data.splits import Recipe, store_split
from studytool.data.splitting import make_split
from studytool.errors import DataError
from studytool.files import sha256_of


def _particles():
    rng = np.random.default_rng(0)
    for i in range(24):
        split = ("train", "val", "test")[i // 2 % 3]
        yield Particle(
            volume_DHW=rng.standard_normal((4, 4, 4), dtype=np.float32),
            label="ab"[i % 2],
            voxel_size_angstrom=10.0,
            tomogram=f"{split}-{i // 6}",
            split=split,
            particle_id=str(i),
        )


@pytest.fixture
def dataset(tmp_path):
    write_dataset(_particles(), tmp_path / "data", dtype="float32", provenance={"kind": "made"}, volumes_per_shard=6)
    return tmp_path / "data"


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_a_cut_and_a_missing_file_are_named(dataset):
    manifest = read_manifest(dataset)
    assert damaged_shards(dataset, manifest) == []
    _flip(dataset / "part-00001.parquet")
    (dataset / "part-00002.parquet").write_bytes((dataset / "part-00002.parquet").read_bytes()[:-1])
    (dataset / "part-00003.parquet").unlink()
    told = []
    found = damaged_shards(dataset, manifest, on_progress=lambda *counts: told.append(counts))
    assert found == ["part-00001.parquet", "part-00002.parquet", "part-00003.parquet"]
    assert told[-1] == (4, 4)


def test_what_was_found_whole_is_not_read_again_unless_it_has_changed_or_a_week_has_passed(
    dataset, tmp_path, monkeypatch
):
    manifest, notes = read_manifest(dataset), tmp_path / "notes"
    read = []
    monkeypatch.setattr(damage, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))

    def look() -> tuple[list[str], int]:
        read.clear()
        return damaged_shards(dataset, manifest, notes=notes), len(read)

    assert look() == ([], 4)
    assert look() == ([], 4)  # changed less than a moment ago: not trusted yet
    now = time.time()
    monkeypatch.setattr(damage.time, "time", lambda: now + 10)
    assert look() == ([], 4)
    assert look() == ([], 0)
    before = (dataset / "part-00001.parquet").stat()
    _flip(dataset / "part-00001.parquet")
    assert look() == (["part-00001.parquet"], 1)
    os.utime(dataset / "part-00001.parquet", (before.st_atime, before.st_mtime))
    assert look() == (["part-00001.parquet"], 1)
    monkeypatch.setattr(damage.time, "time", lambda: now + 8 * 24 * 3600)
    assert look() == (["part-00001.parquet"], 4)


def test_without_the_damaged_shards_the_rest_is_a_whole_dataset_with_its_splits(dataset, tmp_path):
    whole = open_dataset(dataset)
    store_split(dataset, make_split(whole, Recipe("fractions", (0.5, 0.25, 0.25)), "mine"))
    named = open_dataset(dataset, "mine")
    _flip(dataset / "part-00001.parquet")
    leave_out(dataset, whole.manifest, ["part-00001.parquet"], tmp_path / "rest")
    rest = open_dataset(tmp_path / "rest")
    kept = [*range(6), *range(12, 24)]
    assert rest.particle_ids.tolist() == [str(i) for i in kept]
    assert rest.splits.tolist() == whole.splits[kept].tolist()
    assert open_dataset(tmp_path / "rest", "mine").splits.tolist() == named.splits[kept].tolist()
    assert rest.fingerprint != whole.fingerprint
    verify_dataset(tmp_path / "rest")
    leave_out(dataset, whole.manifest, ["part-00001.parquet"], tmp_path / "rest")
    assert open_dataset(tmp_path / "rest").fingerprint == rest.fingerprint


def test_nothing_is_left_of_a_dataset_that_is_damaged_throughout(dataset, tmp_path):
    manifest = read_manifest(dataset)
    with pytest.raises(DataError, match="every shard is damaged"):
        leave_out(dataset, manifest, [entry.name for entry in manifest.shards], tmp_path / "rest")
