"""A study from its first trial to labels for particles, all from the command line."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import starfile
from whole_study import TINY, Study

from studytool.data.shards import open_dataset

pytestmark = pytest.mark.end_to_end

SMALL = (
    TINY.replace("  freeze: [none, backbone]\n", "  freeze: [none]\n")
    .replace("trials_per_arm: 4", "trials_per_arm: 1")
    .replace("max_epochs: 4", "max_epochs: 3")
)


def studytool(folder: Path, *words: str) -> list[str]:
    """The lines that a command printed."""
    done = subprocess.run(
        [sys.executable, "-m", "studytool.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_winner_labels_particles_and_reproduces_its_logged_test_accuracy(tmp_path: Path):
    study = Study(tmp_path / "study", SMALL)
    try:
        study.run()
    finally:
        study.kill_what_runs()
    folder = study.folder
    status = json.loads("\n".join(studytool(folder, "status", "tiny", "--json")))
    assert status["state"] == "finished"
    assert status["trials_left"] == 0

    said = studytool(folder, "predict", "tiny", "data", "--split", "test", "--out", "test.csv")
    winner = study.records[Path(said[0].rpartition(" of ")[2]).name]
    logged = winner.test.accuracy
    assert any(line.startswith(f"accuracy {logged!r}, ") and f"; logged were {logged!r} " in line for line in said)
    dataset = open_dataset(folder / "data")
    rows = dataset.rows("test")
    with (folder / "test.csv").open(encoding="utf-8", newline="") as file:
        found = [row["class_name"] for row in csv.DictReader(file)]
    true = [dataset.manifest.classes[label] for label in dataset.labels[rows].tolist()]
    assert sum(a == b for a, b in zip(found, true, strict=True)) / len(true) == logged

    studytool(folder, "data", "export", "data", "--out", "mrc")
    studytool(folder, "predict", "tiny", "mrc/particles.star", "--out", "labelled.star", "--reject-below", "0.1")
    table = starfile.read(folder / "labelled.star")
    in_test = table[table["studytoolSplit"] == "test"]
    assert (in_test["studytoolClassName"] == in_test["studytoolLabel"]).mean() == pytest.approx(logged, abs=0.05)
    assert set(table["rlnClassNumber"]) <= {1, 2, 3}

    assert studytool(folder, "show", "tiny", "--out", "trial.png")[1].startswith("trial.png: 12 of ")
    assert "checked on" in studytool(folder, "export", "tiny", "--to", "torchscript", "--out", "net.pt")[1]
