"""Volumes that are skipped, and options that a source has no use for."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from lab import plan, refused, run, volume, write_mrc
from typer.testing import CliRunner

from studytool.cli_data import data
from studytool.data.importing import recognize
from studytool.data.readers.source import ReadOptions
from studytool.data.shards import open_dataset, verify_dataset

SHARDS = {"volumes_per_shard": 8}


@pytest.fixture
def lab(tmp_path):
    """Forty volumes of two classes: one cut off, one empty, one with a voxel that is no number."""
    for number in range(40):
        write_mrc(tmp_path / "lab" / "ab"[number % 2] / f"p{number:02d}.mrc", volume(number))
    cut, empty, nan = (tmp_path / "lab" / name for name in ("a/p00.mrc", "a/p06.mrc", "b/p11.mrc"))
    cut.write_bytes(cut.read_bytes()[:-9])
    empty.write_bytes(b"")
    content = bytearray(nan.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    nan.write_bytes(content)
    return tmp_path / "lab"


def import_skipping(lab, out, workers=1, on_progress=None, options=None, **changes):
    return run(lab, out, options, workers=workers, on_progress=on_progress, skip_bad=True, **{**SHARDS, **changes})


def test_bad_volumes_are_left_out_counted_and_named(lab, tmp_path):
    refused(lambda: run(lab, tmp_path / "out", **SHARDS), "a/p00.mrc")
    manifest = import_skipping(lab, tmp_path / "out")
    assert verify_dataset(tmp_path / "out") == manifest
    assert manifest.num_volumes == 37
    assert manifest.counts == {"a": {"": 18}, "b": {"": 19}}
    assert [shard.rows for shard in manifest.shards] == [6, 8, 8, 7, 8]
    assert not {"a/p00", "a/p06", "b/p11"} & set(open_dataset(tmp_path / "out").particle_ids.tolist())
    said = manifest.provenance["skipped"]
    assert (said["volumes"], said["file"]) == (3, "skipped.csv")
    with (tmp_path / "out" / "skipped.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["particle_id"], row["label"]) for row in rows] == [("a/p00", "a"), ("a/p06", "a"), ("b/p11", "b")]
    assert [row["reason"] for row in rows] == said["first"]
    assert "1 of 216 voxels are NaN or infinite" in rows[2]["reason"]


def test_without_bad_volumes_nothing_is_said(tmp_path):
    write_mrc(tmp_path / "lab" / "a" / "p.mrc", volume(1))
    assert "skipped" not in import_skipping(tmp_path / "lab", tmp_path / "out").provenance
    assert not (tmp_path / "out" / "skipped.csv").exists()


def test_an_interrupted_import_remembers_what_it_has_skipped(lab, tmp_path):
    whole = import_skipping(lab, tmp_path / "whole")

    def stop(done, total):
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_skipping(lab, tmp_path / "out", on_progress=stop)
    assert import_skipping(lab, tmp_path / "out") == whole


@pytest.mark.slow
def test_skipping_does_not_depend_on_the_number_of_workers(lab, tmp_path):
    assert import_skipping(lab, tmp_path / "a") == import_skipping(lab, tmp_path / "b", workers=2)


def test_a_shard_of_bad_volumes_alone_is_not_written(lab, tmp_path):
    manifest = import_skipping(lab, tmp_path / "out", volumes_per_shard=1)
    assert [shard.name for shard in manifest.shards] == [f"part-{number:05d}.parquet" for number in range(37)]


def test_too_many_bad_volumes_or_a_class_of_them_are_refused(lab, tmp_path):
    for number in (1, 3):
        (lab / "b" / f"p{number:02d}.mrc").write_bytes(b"")
    refused(lambda: import_skipping(lab, tmp_path / "out"), "5 of 40 volumes", "10% is the most", "a/p00.mrc")
    for number in (1, 3):
        write_mrc(lab / "b" / f"p{number:02d}.mrc", volume(number))
    (lab / "c").mkdir()
    (lab / "c" / "p50.mrc").write_bytes(b"")
    refused(lambda: import_skipping(lab, tmp_path / "out"), "none of the 1 volumes of class 'c'", "--exclude", "p50")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lab"]
    assert import_skipping(lab, tmp_path / "out", exclude=("c",)).num_volumes == 37


def test_a_plan_says_what_it_has_found_to_be_bad(lab):
    assert plan(lab, skip_bad=True).first.particle_id != "a/p00"
    assert any("a/p00.mrc" in reason for reason in plan(lab, skip_bad=True).bad)
    for path in lab.glob("*/*.mrc"):
        path.write_bytes(b"")
    refused(lambda: plan(lab, skip_bad=True), "so it is with all 16 volumes looked at")


def test_other_readers_skip_too(tmp_path):
    volumes = np.stack([volume(number) for number in range(30)])
    volumes[7] = np.inf
    np.savez(tmp_path / "p.npz", volumes=volumes, labels=np.array(["a", "b"] * 15))
    manifest = import_skipping(tmp_path / "p.npz", tmp_path / "out", voxel_size_angstrom=10.0)
    assert (manifest.num_volumes, manifest.provenance["skipped"]["volumes"]) == (29, 1)


def test_the_command_tells_what_was_skipped(lab, tmp_path):
    words = ["import", str(lab), "--out", str(tmp_path / "out"), "--skip-bad"]
    said = CliRunner().invoke(data, words, catch_exceptions=False).stdout
    assert f"skipped in all: 3; all of them stand in {tmp_path / 'out' / 'skipped.csv'}" in said
    assert said.count("skipped: ") == 3
    assert "37 volumes of 2 classes" in said


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"label_column": "x"}, "--label-column"),
        ({"group_column": "x"}, "--group-column"),
        ({"label": "x"}, "--label"),
        ({"volumes": Path("x")}, "--volumes"),
        ({"cut": 8}, "--cut"),
        ({"tomogram_type": "wbp"}, "--tomogram-type"),
        ({"picks_of": "me/1", "label": "x"}, "--label, --picks-of"),
    ],
)
def test_options_that_a_source_has_no_use_for_are_refused(lab, given, option):
    refused(lambda: recognize(lab, ReadOptions(**given)), lab, "which has no use for " + option)


def test_options_that_it_has_a_use_for_are_not(lab, tmp_path):
    recognize(lab, ReadOptions(root=lab, box=8, voxel_size_angstrom=3.0))
    recognize(lab / "a", ReadOptions(label="x"))
    (tmp_path / "p.csv").write_text("path,kind,grid\nlab/a/p02.mrc,x,t1\n")
    entry = recognize(tmp_path / "p.csv", ReadOptions(label_column="kind", group_column="grid")).entries[0]
    assert (entry.label, entry.tomogram) == ("x", "t1")
    refused(lambda: recognize(tmp_path / "p.csv", ReadOptions(label="a", label_column="kind", cut=4)), "--cut")
