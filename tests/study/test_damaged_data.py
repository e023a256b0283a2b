"""What a study does about damaged shards: decided once by the driver, the same on every machine."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from studytool.data.particles import Particle
from studytool.data.remote_copy import local_copy
from studytool.data.shards import open_dataset, read_manifest, write_dataset
from studytool.data.splits import Recipe, store_split
from studytool.data.splitting import make_split
from studytool.errors import DataError
from studytool.spec import StudySpec, load_study
from studytool.study.folder import STUDY_FILE, keep_study
from studytool.study.run import _without_damage

DAMAGED = "part-00001.parquet"


@pytest.fixture
def data(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    particles = [
        Particle(f"p{i}", "ab"[i % 2], f"t{i}", ("train", "val", "test", "train")[i % 4],
                 rng.normal(size=(8, 8, 8)).astype(np.float32), 10.0)
        for i in range(40)
    ]  # fmt: skip
    write_dataset(particles, tmp_path / "data", dtype="float32", provenance={}, volumes_per_shard=16)
    return tmp_path / "data"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


def on_machine(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("STUDYTOOL_CACHE", str(tmp_path / name))


def study(tmp_path: Path, path: str, on_damage: str) -> StudySpec:
    return StudySpec.model_validate(
        {"name": "s", "output": str(tmp_path / "studies"), "data": {"path": path, "on_damage": on_damage}}
    )


def opened_by_a_trial(spec: StudySpec):
    trial = spec.trial(spec.list_arms()[0], {}, phase="search", number=0, seed=0)
    return open_dataset(local_copy(trial.data_path, leave_out=trial.data_leave_out), trial.data_split)


@pytest.mark.parametrize("kind", ["address", "folder"])
def test_every_machine_leaves_out_what_the_driver_found(kind, data, tmp_path, monkeypatch):
    whole = read_manifest(data)
    flip_a_bit(data / DAMAGED)
    path = f"file://{data}" if kind == "address" else str(data)
    said = io.StringIO()

    on_machine("driver", tmp_path, monkeypatch)
    with pytest.raises(DataError, match=DAMAGED):
        _without_damage(study(tmp_path, path, "stop"), Console(file=said))
    spec, folder, notes = _without_damage(study(tmp_path, path, "skip"), Console(file=said, width=200))
    assert spec.data.leave_out == (DAMAGED,)
    assert notes == (f"left out as damaged: 1 of 3 shards of {path}, the first of them {DAMAGED}",)
    assert notes[0] in said.getvalue()
    fingerprint = open_dataset(folder).fingerprint
    assert fingerprint != whole.fingerprint

    on_machine("node", tmp_path, monkeypatch)
    dataset = opened_by_a_trial(spec)
    assert dataset.fingerprint == fingerprint
    assert len(dataset) == 24
    assert tmp_path / "node" in dataset.folder.parents
    assert opened_by_a_trial(spec).folder == dataset.folder

    # Whoever comes back to the study knows it, too.
    spec.folder.mkdir(parents=True)
    keep_study(spec, {})
    on_machine("elsewhere", tmp_path, monkeypatch)
    assert opened_by_a_trial(load_study(spec.folder / STUDY_FILE)).fingerprint == fingerprint


def test_a_damaged_copy_is_fetched_again_and_nothing_is_left_out(data, tmp_path, monkeypatch):
    on_machine("driver", tmp_path, monkeypatch)
    copy = local_copy(f"file://{data}")
    flip_a_bit(copy / DAMAGED)
    spec, folder, notes = _without_damage(study(tmp_path, f"file://{data}", "stop"), Console(file=io.StringIO()))
    assert (folder, spec.data.leave_out, notes) == (copy, (), ())
    assert (copy / DAMAGED).read_bytes() == (data / DAMAGED).read_bytes()


def test_a_split_that_was_made_since_is_there_without_the_shard(data, tmp_path, monkeypatch):
    on_machine("driver", tmp_path, monkeypatch)
    before = local_copy(str(data), leave_out=[DAMAGED])
    store_split(data, make_split(open_dataset(data), Recipe("fractions", (0.5, 0.25, 0.25)), "mine"))
    after = local_copy(str(data), leave_out=[DAMAGED])
    assert len(open_dataset(after, "mine")) == len(open_dataset(before)) == 24


def test_a_shard_that_there_is_not_is_one_line(data, tmp_path, monkeypatch):
    on_machine("driver", tmp_path, monkeypatch)
    with pytest.raises(DataError, match=r"data\.leave_out: there is no shard 'part-9'"):
        local_copy(str(data), leave_out=["part-9"])
