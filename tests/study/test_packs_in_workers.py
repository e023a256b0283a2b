"""Heads trained together from the director to the files and back, with real training but without Ray's processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from studytool.data.particles import Particle
from studytool.data.shards import write_dataset
from studytool.errors import TrainingError
from studytool.remote import RemoteFolder
from studytool.results import Cost, Outcome, TrialRecord
from studytool.spec import load_study
from studytool.study.director import Director
from studytool.study.ledger import Ledger
from studytool.study.signals import Signals
from studytool.study.slots import Slots
from studytool.study.tuning import _Bridge
from studytool.study.worker import Worker
from studytool.training.trained import load_trained

STUDY = """
name: heads
data: {{path: {data}}}
arms: {{backbone: ["tiny_backbone:tiny", r2plus1d_tiny], freeze: [backbone]}}
search:
  learning_rate: {{log_uniform: [1e-3, 1e-1]}}
  trials_per_arm: 6
  sampler: random
  scheduler: {{asha: {{grace_epochs: 1, reduction_factor: 2}}}}
confirm: {{seeds: 2}}
train: {{max_epochs: 4, batch_size: 8}}
input: {{augment: []}}
resources: {{trials_at_once: 1, trials_together: {together}}}
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDYTOOL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise of 12^3 with one bright half for each of three classes, as (train, val, test) of a tomogram each."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "halves"

    def particles():
        for split, count in {"train": 8, "val": 5, "test": 5}.items():
            for label in ("z", "y", "x"):
                for i in range(count):
                    volume = rng.standard_normal((12, 12, 12)).astype(np.float32)
                    volume[tuple(slice(6) if axis == label else slice(None) for axis in "zyx")] += 0.4
                    yield Particle(f"{split}-{label}-{i}", label, f"tomogram-{split}", split, volume, 10.0, None)

    write_dataset(particles(), folder, dtype="float16", provenance={"made": "for a test"}, volumes_per_shard=64)
    return folder


def run(
    folder, data, together: int | str, *, kill_every: int | None = None
) -> tuple[dict[str, TrialRecord], list[int]]:
    """The records of the study, and how many trials were in each task of a worker; `kill_every` so many steps."""
    folder.mkdir(exist_ok=True)
    (folder / "a.yaml").write_text(STUDY.format(data=data, together=together))
    spec = load_study(folder / "a.yaml", [f"output={folder}"])
    sizes: list[int] = []
    while True:
        ledger = Ledger(spec, "data")
        try:
            with Signals() as signals:
                director = Director(spec, ledger, "data")
                bridge = _Bridge(director, ledger.trial_folder, Slots(1, 1, 0.0), signals, lambda: None, None, None)
                walk_tasks(director, bridge, sizes, kill_every)
                if director.finished:
                    return {r.trial_id: r for r in ledger.records}, sizes
        finally:
            ledger.close()


def walk_tasks(director: Director, bridge: _Bridge, sizes: list[int], most_steps: int | None) -> None:
    """Do what Ray Tune does with one slot, for so many steps."""
    steps = 0
    for number in itertools.count():
        if director.finished:
            return
        task_id = str(number)
        task = bridge.ask(task_id)
        assert isinstance(task, dict)
        if task["trials"] is None:
            assert bridge.tell(task_id, {"ready": True})
            continue
        sizes.append(len(task["trials"]))
        worker, stopped = Worker(task), False
        while not stopped:
            if steps == most_steps:
                return
            result = worker.step()
            stopped = bridge.tell(task_id, result)
            assert stopped or not result["done"]
            steps += 1
        worker.cleanup()


def timeless(record: TrialRecord) -> tuple[object, ...]:
    curve = [dataclasses.replace(epoch, cost=Cost()) for epoch in record.epochs]
    return record.outcome, record.parameters, curve


def test_the_same_is_found_as_one_by_one(tmp_path, data):
    found, sizes = run(tmp_path / "packed", data, "auto")
    expected, singles = run(tmp_path / "single", data, 1)
    assert max(sizes) == 6
    assert len(sizes) < len(singles) == 16
    assert {r.outcome for r in found.values()} == {Outcome.COMPLETE, Outcome.PRUNED}
    assert found.keys() == expected.keys()
    for trial_id, record in expected.items():
        other = found[trial_id]
        assert (other.outcome, other.parameters, other.attempts) == (record.outcome, record.parameters, 1)
        for mine, theirs in zip(other.epochs, record.epochs, strict=True):
            assert mine.train_loss == pytest.approx(theirs.train_loss, rel=1e-5)
            assert mine.val.loss == pytest.approx(theirs.val.loss, rel=1e-5)
            assert mine.val.confusion == theirs.val.confusion
            assert (mine.best_epoch, mine.steps, mine.is_last) == (theirs.best_epoch, theirs.steps, theirs.is_last)
            assert mine.cost.samples == theirs.cost.samples
        assert (other.test and other.test.confusion) == (record.test and record.test.confusion)


def test_a_driver_killed_after_every_few_steps_finds_the_same_to_the_last_bit(tmp_path, data):
    whole, _ = run(tmp_path / "whole", data, "auto")
    killed, sizes = run(tmp_path / "killed", data, "auto", kill_every=5)
    assert {i: timeless(r) for i, r in killed.items()} == {i: timeless(r) for i, r in whole.items()}
    assert max(sizes) == 6


class KilledError(BaseException):
    """Ends a worker, whatever it catches."""


@pytest.mark.parametrize("together", [1, 2])
def test_a_worker_killed_between_any_two_files_for_the_address_loses_nothing(tmp_path, data, monkeypatch, together):
    text = STUDY.format(data=data, together=together).replace("max_epochs: 4", "max_epochs: 2")
    (tmp_path / "a.yaml").write_text(text)
    spec = load_study(tmp_path / "a.yaml", [f"output={tmp_path}"])
    arm = spec.list_arms()[0]
    trials = [spec.trial(arm, {}, phase="confirm", number=k, seed=0, source=0) for k in range(together)]
    for most in itertools.count():
        there = tmp_path / f"there-{most}"
        with monkeypatch.context() as patched:
            patched.setattr(RemoteFolder, "put", dying_after(most, RemoteFolder.put))
            killed = not trained_to_the_end(trials, there)
        trained_to_the_end(trials, there)
        for trial in trials:
            assert load_trained(there / "trials" / trial.trial_id).record.result.test is not None
        if not killed:
            break
    assert most == 5 * together, "last.pt, then best.safetensors, test_predictions, best.json, last.pt"


def test_a_used_worker_can_stand_by_before_its_next_trial(tmp_path, data):
    """As when Ray Tune has it stand in for one that it is still starting."""
    (tmp_path / "a.yaml").write_text(STUDY.format(data=data, together=1).replace("max_epochs: 4", "max_epochs: 1"))
    spec = load_study(tmp_path / "a.yaml", [f"output={tmp_path}"])
    trial = spec.trial(spec.list_arms()[0], {}, phase="confirm", number=0, seed=0, source=0)
    task = task_of([trial], f"file://{tmp_path / 'there'}")
    worker = Worker(task)
    assert worker.step()["done"]
    worker.reset_config({**task, "trials": None})
    assert worker.step() == {"ready": True}
    worker.reset_config(task)
    assert worker.step()["done"]
    worker.cleanup()


def test_what_an_epoch_took_that_broke_off_is_told(tmp_path, data, monkeypatch):
    def diverge(*_words):
        raise TrainingError("epoch 1, step 3: the loss is nan; lower learning_rate")

    monkeypatch.setattr("studytool.training.course.Course.check_finite", diverge)
    (tmp_path / "a.yaml").write_text(STUDY.format(data=data, together=1))
    spec = load_study(tmp_path / "a.yaml", [f"output={tmp_path}"])
    arm = spec.list_arms()[0]
    trials = [spec.trial(arm, {}, phase="confirm", number=k, seed=0, source=0) for k in range(2)]
    for count in (1, 2):
        worker = Worker(task_of(trials[:count], f"file://{tmp_path / f'there-{count}'}"))
        begun, told = time.perf_counter(), []
        while not told:
            result = worker.step()
            told = [result] if "failure" in result else [*json.loads(result["failures"]).values()]
        assert len(told) == count
        assert 0 < sum(failure["device_seconds"] for failure in told) < time.perf_counter() - begun
        assert "lower learning_rate" in told[0]["failure"]
        worker.cleanup()


def dying_after(count: int, put):
    puts = itertools.count()

    def put_or_die(*words: object) -> None:
        if next(puts) == count:
            raise KilledError
        put(*words)

    return put_or_die


def trained_to_the_end(trials, there) -> bool:
    worker = Worker(task_of(trials, f"file://{there}"))
    try:
        while not worker.step()["done"]:
            pass
    except KilledError:
        return False
    finally:
        worker.cleanup()
    return True


def task_of(trials, address: str) -> dict[str, object]:
    """What a worker is given to train these trials in one place, with their files at an address."""
    return {
        "trials": [trial.model_dump_json() for trial in trials],
        "folders": ["" for _ in trials],
        "storage": address,
        "backbones": [trials[0].model.backbone],
        "needs": None,
        "cpu": 1,
        "side_by_side": 1,
    }
