"""Heads trained together in a real study: what is found, and what MLflow has of it, is as one by one.

And so is what is found in processes that are kept for one trial after another, compared with one for each.
"""

from __future__ import annotations

import itertools
import shutil

import pytest
from whole_study import TINY, Study

from studytool.results import Outcome

HEADS = TINY.replace("freeze: [none, backbone]", "freeze: [backbone]").replace(
    "  trials_per_arm: 4", "  trials_per_arm: 6\n  sampler: random"
)
# A loss has no ties, and so some trials are pruned.
HEADS = HEADS.replace("metric: {target: 0.5}", "metric: {name: val/loss, mode: min}") + "input: {augment: []}\n"


def overlaps(study: Study) -> int:
    """How many trials began, as MLflow has it, before the one before them had ended."""
    runs = [run for run in study.runs_in_mlflow() if run.data.tags["studytool.kind"] == "trial"]
    times = sorted((run.info.start_time, run.info.end_time) for run in runs)
    return sum(later[0] < before[1] for before, later in itertools.pairwise(times))


@pytest.mark.end_to_end
@pytest.mark.timeout(600)
def test_together_in_kept_workers_or_each_in_its_own_a_study_finds_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDYTOOL_CACHE", str(tmp_path / "cache"))
    together, alone = (
        Study(tmp_path / name, HEADS.replace("trials_at_once: 1", f"trials_at_once: 1, {resources}"))
        for name, resources in {"together": "cpu: 1", "alone": "trials_together: 1, keep_workers: false"}.items()
    )
    together.run()
    shutil.copytree(together.folder / "data", alone.folder / "data")
    alone.run()
    assert overlaps(together) > 0
    assert overlaps(alone) == 0
    outcomes = {trial_id: record.outcome for trial_id, record in alone.records.items()}
    assert {trial_id: record.outcome for trial_id, record in together.records.items()} == outcomes
    assert {Outcome.COMPLETE, Outcome.PRUNED} == set(outcomes.values())
    for trial_id, record in alone.records.items():
        other = together.records[trial_id]
        assert other.parameters == record.parameters
        assert len(other.epochs) == len(record.epochs)
        for theirs, ours in zip(other.epochs, record.epochs, strict=True):
            assert theirs.val.loss == pytest.approx(ours.val.loss, abs=1e-5)
            assert theirs.val.confusion == ours.val.confusion
        assert (other.test is None) == (record.test is None)
    for study in (together, alone):
        assert study.problems_in_mlflow() == []
        study.seconds_until_gone()
