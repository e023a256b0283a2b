"""Datasets as a source: which volumes a split means, what was done to them before, and what is said of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from labelling_run import run
from trained_trial import particles, train_small_trial
from typer.testing import CliRunner

from studytool.cli import app
from studytool.data.export import export_dataset
from studytool.data.particles import Particle
from studytool.data.readers.source import ReadOptions
from studytool.data.remote_copy import local_copy
from studytool.data.shards import open_dataset, write_dataset
from studytool.data.splits import Recipe, store_split
from studytool.data.splitting import make_split
from studytool.errors import DataError


def write(folder: Path, volumes: Iterator[Particle], **settings) -> Path:
    """A dataset that says it is the import with these settings."""
    provenance = {"kind": "import", "source": {"kind": "for a test"}, "settings": settings}
    write_dataset(volumes, folder, dtype="float16", provenance=provenance, volumes_per_shard=64)
    return folder


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and a trial on another split of it, whose test part is the stored training part."""
    folder = tmp_path_factory.mktemp("turned")
    data = write(folder / "data", particles(), invert=False, normalize="standard")
    store_split(data, make_split(open_dataset(data), Recipe("fractions", (0.3, 0.23, 0.47)), "turned"))
    rows = open_dataset(data, "turned").rows("test")
    assert {*open_dataset(data).splits[rows].tolist()} == {"train"}
    train_small_trial(folder, data_split="turned")
    return folder


@pytest.fixture(scope="module")
def inverted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, whose contrast was inverted at its import, and a trial on it."""
    folder = tmp_path_factory.mktemp("inverted")
    train_small_trial(folder, inverted=True)
    return folder


def trial_of(folder: Path) -> Path:
    return folder / "studies" / "trials" / "a.confirm-seed-0"


def test_a_split_is_the_trials_own_whatever_is_done_to_the_volumes(turned: Path, tmp_path: Path):
    data = turned / "data"
    plain, said = run(trial_of(turned), data, tmp_path / "a.csv", split="test")
    assert any("; logged were" in line for line in said)
    for number, options in enumerate([{"invert": False}, {"options": ReadOptions(label="", voxel_size_angstrom=10.0)}]):
        out = tmp_path / f"{number}.csv"
        labels, _ = run(trial_of(turned), data, out, split="test", **options)
        assert labels.numbers.tolist() == plain.numbers.tolist()
        assert all(row.startswith("train-") for row in out.read_text().splitlines()[1:])


def test_training_volumes_are_said_to_be_that_whatever_the_split_and_the_place(turned: Path, tmp_path: Path):
    moved = shutil.copytree(turned / "data", tmp_path / "moved")
    for number, data in enumerate([turned / "data", moved]):
        _, said = run(trial_of(turned), data, tmp_path / f"{number}.csv")
        assert any(line.startswith("this is the dataset that the network was trained on") for line in said)
        assert not any(line.startswith("accuracy") for line in said)
    other = write(tmp_path / "other", particles(seed=7), invert=False, normalize="standard")
    _, said = run(trial_of(turned), other, tmp_path / "other.csv")
    assert any(line.startswith("accuracy") for line in said)


def test_so_are_they_where_the_study_left_out_a_shard(trial: Path, home: Path, tmp_path: Path):
    moved = shutil.copytree(trial, tmp_path / "trial")
    left_out = [open_dataset(home / "data").manifest.shards[-1].name]
    record = json.loads((moved / "best.json").read_text())
    record["trial"]["data_leave_out"] = left_out
    record["data_fingerprint"] = open_dataset(local_copy(str(home / "data"), leave_out=left_out)).fingerprint
    (moved / "best.json").write_text(json.dumps(record))
    assert record["data_fingerprint"] != open_dataset(home / "data").fingerprint
    _, said = run(moved, home / "data", tmp_path / "a.csv")
    assert any(line.startswith("this is the dataset that the network was trained on") for line in said)


@pytest.mark.parametrize("invert", [None, False])
def test_a_split_that_is_not_there_is_refused(trial: Path, tmp_path: Path, invert: bool | None):
    unsplit = write(tmp_path / "unsplit", (replace(one, split="") for one in particles()), normalize="standard")
    with pytest.raises(DataError, match="no volume is in the split 'test'") as caught:
        run(trial, unsplit, tmp_path / "a.csv", split="test", invert=invert)
    assert "\n" not in str(caught.value)


def test_another_contrast_at_the_import_has_to_be_settled_by_the_user(inverted: Path, tmp_path: Path):
    as_it_was = ({**vars(one), "volume_DHW": -one.volume_DHW} for one in particles())
    dark = write(tmp_path / "dark", (Particle(**one) for one in as_it_was), invert=False, normalize="standard")
    with pytest.raises(DataError, match=r"its import did not invert the contrast.* did; give --invert, or --no-inv"):
        run(trial_of(inverted), dark, tmp_path / "a.csv")
    wanted, _ = run(trial_of(inverted), inverted / "data", tmp_path / "wanted.csv")
    labels, said = run(trial_of(inverted), dark, tmp_path / "b.csv", invert=True)
    assert labels.numbers.tolist() == wanted.numbers.tolist()
    assert "unlike" not in "\n".join(said)
    for name, source, invert in (("c", dark, False), ("d", inverted / "data", True)):
        _, said = run(trial_of(inverted), source, tmp_path / f"{name}.csv", invert=invert)
        assert "unlike the training volumes, which were inverted" in "\n".join(said)


def test_what_was_not_normalized_is(trial: Path, home: Path, tmp_path: Path):
    loud = (replace(one, volume_DHW=40 * one.volume_DHW + 100) for one in particles())
    _, said = run(trial, write(tmp_path / "loud", loud, normalize="none"), tmp_path / "a.csv")
    assert any("mean 0 and deviation 1" in line for line in said)


def test_what_was_normalized_and_should_not_be_is_said(tmp_path: Path):
    write(tmp_path / "data", particles(), normalize="none")
    trial = train_small_trial(tmp_path, normalize="none")
    warning = "was normalized at its import, the training volumes never"
    _, said = run(trial, write(tmp_path / "other", particles(), normalize="standard"), tmp_path / "a.csv")
    assert any(line.startswith("warning: ") and warning in line for line in said)
    _, said = run(trial, tmp_path / "data", tmp_path / "b.csv")
    assert not any(warning in line for line in said)


def test_the_exported_training_volumes_are_not_called_unlike_them(inverted: Path, tmp_path: Path):
    export_dataset(open_dataset(inverted / "data"), tmp_path / "mrc")
    _, said = run(trial_of(inverted), tmp_path / "mrc" / "particles.star", tmp_path / "a.csv")
    assert "unlike" not in "\n".join(said)


def test_options_count_for_a_dataset_too(trial: Path, home: Path, tmp_path: Path):
    _, said = run(trial, home / "data", tmp_path / "a.csv", transpose="xyz->zyx")
    assert any("axes xyz->zyx" in line for line in said)
    sized = ReadOptions(label="", voxel_size_angstrom=20.0)
    _, said = run(trial, home / "data", tmp_path / "b.csv", options=sized)
    assert any("voxels of 20 Å: rescaled to 10 Å" in line for line in said)
    for option in ({"root": tmp_path}, {"tomograms": tmp_path}, {"cut": 16}):
        with pytest.raises(DataError, match=f"has no use for --{next(iter(option))}; leave it out"):
            run(trial, home / "data", tmp_path / "c.csv", options=ReadOptions(label="", **option))
    assert not (tmp_path / "c.csv").exists()


def test_the_command_line_asks_for_a_cut_as_an_import_does(trial: Path, home: Path, tmp_path: Path):
    words = ["predict", str(trial), str(home / "data"), "--out", str(tmp_path / "a.csv"), "--cut", "16"]
    with pytest.raises(DataError, match="has no use for --cut; leave it out"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_a_folder_with_another_programs_manifest_is_no_dataset(trial: Path, home: Path, tmp_path: Path):
    copy = shutil.copytree(home / "mrc" / "ball", tmp_path / "loose")
    (copy / "manifest.json").write_text('{"made by": "another program"}')
    labels, _ = run(trial, copy, tmp_path / "a.csv")
    assert len(labels.numbers) == len([*copy.glob("*.mrc")])
