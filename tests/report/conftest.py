"""A small study that was really trained, without Ray: for what a report shows of volumes, predictions and features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fabricated_study import make_record

from studytool.data.shards import open_dataset
from studytool.data.simulate import simulate_dataset
from studytool.report.sections import StudyResults
from studytool.results import DeviceInfo, Outcome
from studytool.seeds import derive_seed
from studytool.spec import load_study
from studytool.study.folder import keep_study, read_environment
from studytool.training.loop import train_trial

STUDY = """\
name: trained
data:
  path: DATA
  simulate: {classes: 3, volumes_per_class: 20, side: 12, voxel_size_angstrom: 20.0, tomograms: [2, 2, 3], snr: 2.0}
arms:
  backbone: [r2plus1d_tiny]
  init: [random, motion]
search:
  learning_rate: {log_uniform: [1.0e-3, 2.0e-2]}
  trials_per_arm: 1
confirm: {seeds: 2}
train: {max_epochs: 2, batch_size: 8}
metric: {target: 0.4}
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> StudyResults:
    """One search and two confirm trials of two arms, with all the files that a study leaves in its folder."""
    root = tmp_path_factory.mktemp("trained")
    (root / "study.yaml").write_text(STUDY.replace("DATA", str(root / "data")))
    spec = load_study(root / "study.yaml", [f"output={root / 'studies'}"])
    simulate_dataset(spec.data.simulate, root / "data")
    keep_study(spec, {"version.torch": "2.15.0", "command": "studytool run study.yaml", "code.commit": "abc"})
    records = []
    for arm in spec.list_arms():
        for phase, number in (("search", 0), ("confirm", 0), ("confirm", 1)):
            seed = derive_seed(spec.seed, phase, number)
            source = 0 if phase == "confirm" else None
            trial = spec.trial(arm, {"learning_rate": 5e-3}, phase=phase, number=number, seed=seed, source=source)
            folder = spec.folder / "trials" / trial.trial_id
            folder.mkdir(parents=True)
            record = make_record(trial, Outcome.COMPLETE, tuple(train_trial(trial, folder, device="cpu")))
            records.append(replace(record, device=DeviceInfo("cpu", "a test's")))
    dataset = open_dataset(Path(spec.data.path), spec.data.split)
    return StudyResults(spec, records, spec.folder, read_environment(spec.folder), dataset)
