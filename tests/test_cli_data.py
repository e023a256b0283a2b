"""The commands on datasets, from the words of the command line to what stands on the disk."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner
from whole_study import Study

from studytool.cli_data import data
from studytool.data.particles import Particle
from studytool.data.shards import open_dataset, write_dataset
from studytool.errors import DataError
from studytool.spec import load_study
from studytool.study.run import run_study


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 volumes of noise of two classes in ten tomograms, six of them for training."""
    rng = np.random.default_rng(0)
    particles = (
        Particle(
            particle_id=f"p{number:02d}",
            label=("a", "b")[number % 2],
            tomogram=f"t{number // 2 % 10}",
            split=("train", "train", "train", "val", "test")[number // 2 % 5],
            volume_DHW=rng.standard_normal((8, 8, 8), dtype=np.float32),
            voxel_size_angstrom=10.0,
        )
        for number in range(60)
    )
    write_dataset(particles, tmp_path / "d", dtype="float16", provenance={}, volumes_per_shard=100)
    return tmp_path / "d"


_WITHOUT_TOMOGRAMS = """
name: tiny
data: {path: data, split: made}
arms:
  backbone: ["tiny_backbone:tiny"]
search: {trials_per_arm: 1}
confirm: {seeds: 1}
train: {max_epochs: 1, batch_size: 8}
resources: {trials_at_once: 1}
"""


def run(*words: object) -> str:
    result = CliRunner().invoke(data, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_split_stores_and_tells_how_to_use_it(folder):
    text = run("split", folder, "--seed", 1)
    assert f"in a study file: data: {{path: {folder}, split: seed1}}" in text
    assert ["a", "18", "6", "6"] in [line.split() for line in text.splitlines()]
    assert len(open_dataset(folder, "seed1").rows("train")) == 36
    assert "the other folds: five/1, five/2, five/3, five/4" in run("split", folder, "--folds", 5, "--name", "five")
    assert len(open_dataset(folder, "five/4").rows("test")) == 12
    assert "unused" in run("split", folder, "--counts", "24,12,12", "--name", "few")
    with pytest.raises(DataError, match="--fractions and --folds: give one of them"):
        run("split", folder, "--folds", 5, "--fractions", "0.6,0.2,0.2")


def test_info_tells_of_the_split_it_is_asked_for(folder):
    run("split", folder, "--fractions", "0.5,0.5,0", "--name", "half")
    text = run("info", folder, "--split", "half")
    assert ["half", "30", "30", "0", "0", "none", "found"] in [line.split() for line in text.splitlines()]
    assert "brightness alone" in text
    with pytest.raises(DataError, match="unknown split 'hlaf'; there are: stored, half;"):
        run("info", folder, "--split", "hlaf")


def test_show_export_and_verify(folder, tmp_path):
    assert run("show", folder, "--out", tmp_path / "m.png", "--per-class", 2).strip() == str(tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    out = tmp_path / "mrc"
    assert run("export", folder, "--out", out).strip() == f"{out / 'particles.star'}: 60 volumes"
    assert len(list((out / "a").glob("*.mrc"))) == 30
    run("verify", folder)


def test_a_study_on_a_split_that_is_not_there_ends_before_anything_is_made(folder, tmp_path):
    text = f"name: a\noutput: {tmp_path / 'studies'}\ndata: {{path: {folder}, split: kfold5/0}}\n"
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(DataError, match="unknown split 'kfold5/0'; there are: stored; `studytool data split` makes"):
        run_study(load_study(tmp_path / "a.yaml"), text, Console())
    assert not (tmp_path / "studies").exists()


def test_a_study_on_a_leaking_dataset_ends_before_anything_is_made(tmp_path):
    """Two particles of one name at two signal-to-noise ratios, one to learn from and one to be judged by."""
    rng = np.random.default_rng(0)
    particles = (
        Particle(f"{name}_snr{snr}", "a", "", split, rng.standard_normal((8, 8, 8), dtype=np.float32), 10.0)
        for name, snr, split in (("p1", 0.1, "train"), ("p2", 0.1, "val"), ("p1", 0.05, "val"))
    )
    write_dataset(particles, tmp_path / "d", dtype="float16", provenance={}, volumes_per_shard=100)
    text = f"name: a\noutput: {tmp_path / 'studies'}\ndata: {{path: {tmp_path / 'd'}}}\n"
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(DataError, match=r"'p1_snr0\.1' in 'train' and 'p1_snr0\.05' in 'val' are the same"):
        run_study(load_study(tmp_path / "a.yaml"), text, Console())
    assert not (tmp_path / "studies").exists()


@pytest.mark.end_to_end
def test_a_study_of_volumes_without_tomograms_says_so_in_its_output_and_in_its_table(tmp_path):
    """From MRC files in a folder per class, over a split made afterwards, to the table."""
    rng = np.random.default_rng(0)
    for number in range(60):
        path = tmp_path / "lab" / "ab"[number % 2] / f"p{number:02d}.mrc"
        path.parent.mkdir(parents=True, exist_ok=True)
        mrcfile.write(path, rng.standard_normal((16, 16, 16), dtype=np.float32), voxel_size=10.0)
    assert "no tomogram is known" in run("import", tmp_path / "lab", "--out", tmp_path / "data")
    run("split", tmp_path / "data", "--name", "made")
    study = Study(tmp_path, _WITHOUT_TOMOGRAMS)
    note = "data: the tomogram of all volumes is not known, so that volumes of one tomogram may stand in two splits"
    assert note in " ".join(study.run().split())
    assert note in (tmp_path / "studies" / "tiny" / "table.txt").read_text()
