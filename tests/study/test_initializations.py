"""The study of initializations as it ships, shortened, through real Ray Tune on stand-ins of the published weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from studytool.models.stand_in import write_stand_in
from studytool.results import Outcome
from studytool.spec import load_study
from studytool.study.records import read_records

STUDY = Path(__file__).parents[2] / "search_spaces" / "initialization.yaml"
SHORT = (
    "train.max_epochs=1",
    "search.trials_per_arm=1",
    "confirm.seeds=0",
    "data.simulate.volumes_per_class=4",
    "data.simulate.tomograms=[2,1,1]",
    "data.simulate.classes=3",
    "data.simulate.side=16",
    "train.batch_size=2",
)


@pytest.mark.end_to_end
@pytest.mark.timeout(1500)
def test_the_study_of_initializations_runs_on_a_cpu(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    spec = load_study(STUDY)
    for arm in spec.list_arms():
        model = spec.trial(arm, {}, phase="search", number=0, seed=0).model
        if model.init in ("kinetics400", "imagenet_inflated"):
            write_stand_in(model.backbone, model.init, weights, seed=0)
    command = [sys.executable, "-m", "studytool.cli", "run", str(STUDY)]
    for value in SHORT:
        command += ["--set", value]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "STUDYTOOL_WEIGHTS": str(weights)},
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "studies" / spec.name)
    assert {r.outcome for r in records} == {Outcome.COMPLETE}
    assert len(records) == len(spec.list_arms())
    inits = {str(r.parameters["init"]) for r in records}
    assert inits == {"random", "shuffled", "imagenet_inflated", "kinetics400"}
    assert "imagenet_inflated" in done.stdout
