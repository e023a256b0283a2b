from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch
from labelling_run import run

from studytool.data.readers.source import ReadOptions
from studytool.data.shards import open_dataset
from studytool.errors import DataError, SpecError
from studytool.labelling.label import find_trial
from studytool.training.trained import load_trained, read_best

TBL_COLUMNS = 36


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_test_split_gives_the_logged_accuracy_to_the_last_digit(trial: Path, home: Path, tmp_path: Path):
    labels, said = run(trial, home / "data", tmp_path / "t.csv", split="test")
    logged = read_best(trial).result.test
    line = next(line for line in said if line.startswith("accuracy"))
    assert line == (
        f"accuracy {logged.accuracy!r}, balanced {logged.balanced_accuracy!r}, against the labels of the dataset; "
        f"logged were {logged.accuracy!r} and {logged.balanced_accuracy!r}"
    )
    rows = rows_of(tmp_path / "t.csv")
    dataset = open_dataset(home / "data")
    assert [row["particle"] for row in rows] == dataset.particle_ids[dataset.rows("test")].tolist()
    assert [row["class_name"] for row in rows] == labels.names
    assert all(abs(sum(float(row[f"probability of {name}"]) for name in labels.classes) - 1) < 1e-5 for row in rows)


def test_a_star_file_of_the_same_volumes_gets_the_same_labels(trial: Path, home: Path, tmp_path: Path):
    from_data, _ = run(trial, home / "data", tmp_path / "t.csv", embed=tmp_path / "a.npz")
    out = tmp_path / "labelled.star"
    from_star, said = run(trial, home / "mrc" / "particles.star", out, embed=tmp_path / "b.parquet", per_class=True)
    np.testing.assert_allclose(from_star.probabilities, from_data.probabilities, atol=1e-3)
    table = starfile.read(out)
    assert table["rlnClassNumber"].tolist() == from_star.numbers.tolist()
    assert table["studytoolId"].tolist() == open_dataset(home / "data").particle_ids.tolist()
    assert [line for line in said if "rlnClassNumber" in line] == [
        f"  rlnClassNumber {number} = {name}: {from_star.names.count(name)}"
        for number, name in enumerate(("ball", "long rod"), start=1)
    ]
    assert sum(len(starfile.read(path)) for path in tmp_path.glob("labelled_*.star")) == len(table)

    features = np.load(tmp_path / "a.npz")["features"]
    head = load_trained(trial).model.head.linear
    with torch.no_grad():
        logits = head(torch.from_numpy(features)).numpy()
    np.testing.assert_array_equal(logits.argmax(axis=1) + 1, from_data.numbers)
    import pyarrow.parquet as pq

    kept = np.stack(pq.read_table(tmp_path / "b.parquet")["features"].to_numpy())
    assert kept.shape == features.shape


def test_particles_below_a_probability_are_rejected_and_counted(trial: Path, home: Path, tmp_path: Path):
    plain, _ = run(trial, home / "data", tmp_path / "a.csv", split="val")
    threshold = float(np.median(plain.probability))
    labels, said = run(trial, home / "data", tmp_path / "b.csv", split="val", reject_below=threshold)
    rejected = int((plain.probability < threshold).sum())
    assert 0 < rejected == int((labels.numbers == 0).sum()) == labels.names.count("rejected")
    assert f"  class 0 = rejected, probability below {threshold:g}: {rejected}" in said


def test_the_temperature_is_fitted_once_and_kept(trial: Path, home: Path, tmp_path: Path):
    (trial / "calibration.json").unlink(missing_ok=True)
    _, said = run(trial, home / "data", tmp_path / "a.csv", split="val")
    kept = json.loads((trial / "calibration.json").read_text())
    assert kept["count"] == 16
    assert kept["loss_after"] <= kept["loss_before"]
    assert any(line.startswith(f"temperature of the probabilities: {kept['temperature']:.3g}") for line in said)
    raw, _ = run(trial, home / "data", tmp_path / "b.csv", split="val", calibrate=False)
    logged = read_best(trial).result.val
    dataset = open_dataset(home / "data")
    of_label = raw.probabilities[np.arange(16), dataset.labels[dataset.rows("val")]]
    assert float(-np.log(of_label).mean()) == pytest.approx(logged.loss, rel=1e-12)
    assert kept["loss_before"] == pytest.approx(logged.loss, rel=1e-12)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_trial_that_cannot_be_written_to_is_calibrated_all_the_same(
    trial: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    (trial / "calibration.json").unlink(missing_ok=True)

    def refused(folder, _calibration):
        raise OSError(number, os.strerror(number), str(folder))

    monkeypatch.setattr("studytool.predict.write_calibration", refused)
    _, said = run(trial, home / "data", tmp_path / "a.csv", split="val")
    assert any(line.startswith("temperature of the probabilities: ") for line in said)
    assert not (trial / "calibration.json").exists()


def test_dark_particles_are_noticed(trial: Path, home: Path, tmp_path: Path):
    _, said = run(trial, home / "mrc", tmp_path / "a.csv")
    assert not [line for line in said if line.startswith("warning")]
    _, said = run(trial, home / "mrc", tmp_path / "b.csv", invert=True)
    assert any(line.startswith("warning: these particles are dark") and "--no-invert" in line for line in said)
    assert "unlike the training volumes, which were not inverted" in "\n".join(said)


def test_a_dynamo_table_keeps_its_numbers_and_gets_its_classes(trial: Path, home: Path, tmp_path: Path):
    volumes = sorted((home / "mrc" / "ball").glob("*.mrc"))[:3]
    (tmp_path / "particles").mkdir()
    lines = []
    for tag, volume in enumerate(volumes, start=4):
        shutil.copy(volume, tmp_path / "particles" / f"particle_{tag:06d}.mrc")
        row = [str(tag), "1", "1", *["0.25"] * (TBL_COLUMNS - 3)]
        row[19], row[21], row[35] = "2", "5", "10"
        lines.append(" ".join(row))
    (tmp_path / "in.tbl").write_text("\n".join(lines) + "\n")
    labels, _ = run(trial, tmp_path / "in.tbl", tmp_path / "out.tbl")
    found = [line.split() for line in (tmp_path / "out.tbl").read_text().splitlines()]
    assert [row[21] for row in found] == [str(number) for number in labels.numbers]
    for row, before in zip(found, lines, strict=True):
        assert [v for i, v in enumerate(row) if i != 21] == [v for i, v in enumerate(before.split()) if i != 21]
    run(trial, tmp_path / "in.tbl", tmp_path / "out.csv")
    assert [row["particle"] for row in rows_of(tmp_path / "out.csv")] == ["4", "5", "6"]


def test_unlabelled_files_of_another_size_are_rescaled_in_one_line(trial: Path, tmp_path: Path):
    (tmp_path / "loose").mkdir()
    for number in range(3):
        with mrcfile.new(tmp_path / "loose" / f"{number}.mrc") as file:
            file.set_data(np.random.default_rng(number).standard_normal((40, 40, 40)).astype(np.float32))
            file.voxel_size = 5.0
    labels, said = run(trial, tmp_path / "loose", tmp_path / "a.csv", workers=2)
    assert len(labels.numbers) == 3
    assert any("40 x 40 x 40 voxels of 5 Å: rescaled to 10 Å, cropped to 16 x 16 x 16" in line for line in said)


@pytest.mark.parametrize(
    ("source", "out", "options", "message"),
    [
        ("data", "a.star", {}, "STAR files can be written of a STAR file, this is a studytool dataset"),
        ("mrc", "a.tbl", {}, "a Dynamo table can be written of a Dynamo table"),
        ("mrc", "a.txt", {}, "labels are written as .csv"),
        ("mrc", "a.csv", {"per_class": True}, "STAR files can be written of a STAR file"),
        ("mrc", "a.csv", {"embed": Path("a.npy")}, "features are written as .npz or .parquet"),
        ("mrc", "a.csv", {"split": "test"}, "no particle is in the split 'test'"),
        ("mrc/particles.star", "a.star", {"split": "test"}, "--split leaves particles out"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(trial, home, tmp_path, source, out, options, message):
    with pytest.raises(DataError, match=message) as caught:
        run(trial, home / source, tmp_path / out, **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_without_its_dataset_a_network_still_labels_and_says_what_it_cannot(trial: Path, home: Path, tmp_path: Path):
    moved = tmp_path / "trial"
    shutil.copytree(trial, moved)
    (moved / "calibration.json").unlink(missing_ok=True)
    record = json.loads((moved / "best.json").read_text())
    record["trial"]["data_path"] = str(tmp_path / "gone")
    (moved / "best.json").write_text(json.dumps(record))
    _, said = run(moved, home / "mrc", tmp_path / "a.csv", options=ReadOptions(label=""))
    assert any(line.startswith("note: probabilities are not calibrated") for line in said)
    assert not (moved / "calibration.json").exists()


def test_a_trial_or_a_study_is_named(trial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_trial(str(trial)) == trial
    with pytest.raises(SpecError, match="nothing: no study file"):
        find_trial("nothing")
