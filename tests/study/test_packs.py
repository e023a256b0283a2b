"""Trials that are trained together: who goes with whom, and that no decision comes out otherwise than one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_study import STUDY, Driver, synthetic_epochs

from studytool.results import Outcome, TrialRecord
from studytool.spec import TrialSpec, load_study
from studytool.study.budget import device_seconds_spent
from studytool.study.choices import Choices
from studytool.study.director import RETRIES, Director
from studytool.study.events import Cause, Observer
from studytool.study.ledger import Ledger

RANGE = "learning_rate: {log_uniform: [1e-4, 1e-1]}"
ASHA = "scheduler: {asha: {grace_epochs: 1, reduction_factor: 2}}"
HEADS = STUDY.replace("trials_per_arm: 6", "trials_per_arm: 12") + "input: {augment: []}\nmodel: {init: kinetics400}\n"
RANDOM = HEADS.replace(ASHA, f"{ASHA}\n  sampler: random")
GRID = HEADS.replace(RANGE, "learning_rate: {choice: [1.0e-4, 3.0e-4, 1.0e-3, 3.0e-3, 1.0e-2, 3.0e-2]}").replace(
    f"  trials_per_arm: 12\n  {ASHA}", f"  {ASHA}\n  sampler: grid"
)
STUDIES = {
    "random": RANDOM,
    "grid": GRID,
    "tpe": HEADS,
    "hyperband": RANDOM.replace("asha:", "hyperband:"),
    "median": RANDOM.replace("{asha: {grace_epochs: 1, reduction_factor: 2}}", "{median: {grace_epochs: 2}}"),
    "none": RANDOM.replace("{asha: {grace_epochs: 1, reduction_factor: 2}}", "none"),
    "duplicates": RANDOM.replace(RANGE, "learning_rate: {choice: [1.0e-4, 1.0e-3, 1.0e-2]}"),
    "another factor": RANDOM.replace(RANGE, RANGE + "\n  batch_size: {choice: [16, 32]}"),
    "cmaes": HEADS.replace(RANGE, RANGE + "\n  weight_decay: {uniform: [0.0, 0.1]}").replace(
        ASHA, f"{ASHA}\n  sampler: cmaes"
    ),
}


def with_most(text: str, together: int) -> str:
    return f"{text}resources: {{trials_together: {together}}}\n"


def begun(folder: Path, text: str) -> Driver:
    folder.mkdir()
    return Driver(folder, text)


@pytest.fixture
def ledger(tmp_path):
    driver = Driver(tmp_path, RANDOM.replace("[none, backbone]", "[backbone]"))
    ledger = Ledger(driver.spec, "data")
    yield ledger
    ledger.close()


def director_of(ledger: Ledger, observer: Observer | None = None) -> Director:
    spec = load_study(ledger.folder.parent.parent / "a.yaml")
    return Director(spec, ledger, "data", [observer] if observer else [])


@pytest.mark.parametrize("name", STUDIES)
def test_no_decision_comes_out_otherwise_than_one_by_one(tmp_path, name):
    packed, single = begun(tmp_path / "a", STUDIES[name]), begun(tmp_path / "b", with_most(STUDIES[name], 1))
    assert packed.outcome_of(packed.run()) == single.outcome_of(single.run())
    assert all(len(pack) == 1 for pack in single.packs)
    sizes = {len(pack) for pack in packed.packs if ".search" in pack[0]}
    most = {"tpe": 4, "grid": 6, "median": 1, "cmaes": 1, "duplicates": 2, "another factor": 5}
    assert max(sizes) == most.get(name, 8)
    assert max(sizes) <= 8
    assert max(len(pack) for pack in packed.packs if ".confirm" in pack[0]) == 2
    assert all(len(pack) == 1 for pack in packed.packs if pack[0].startswith("none"))


@pytest.mark.parametrize(
    ("setting", "choices", "together"),
    [
        ("batch_factor: 2", None, 8),
        ("batch_factor: auto", Choices(batch_factor=2), 8),
        ("compile: auto", Choices(compile="off"), 8),
        ("compile: auto", Choices(compile="on"), 1),
    ],
)
def test_what_is_chosen_for_all_trials_keeps_none_of_them_apart(tmp_path, setting, choices, together):
    text = RANDOM.replace("[none, backbone]", "[backbone]").replace("max_epochs: 4", f"max_epochs: 4, {setting}")
    ledger = Ledger(Driver(tmp_path, text).spec, "data")
    if choices is not None:
        ledger.keep_choices(choices)
    assert len(director_of(ledger).next_trials()) == together
    ledger.close()


@pytest.mark.parametrize("text", [RANDOM, GRID, HEADS, with_most(HEADS, 5)], ids=["random", "grid", "tpe", "tpe by 5"])
def test_a_study_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path, text):
    whole, killed = begun(tmp_path / "whole", text), begun(tmp_path / "killed", text)
    expected = whole.outcome_of(whole.run())
    for kill_after in range(0, len(whole.epochs_run), 3):
        killed.run(kill_after=kill_after)
    assert killed.outcome_of(killed.run()) == expected
    assert killed.epochs_run == whole.epochs_run


@pytest.mark.parametrize("text", [RANDOM, with_most(HEADS, 5)], ids=["random", "tpe by 5"])
@pytest.mark.parametrize("write", [*range(20, 200, 9)])
def test_a_study_killed_as_something_is_written_down_ends_as_if_it_had_not_been(tmp_path, monkeypatch, text, write):
    """Within the proposals of a pack, too, and between an epoch and what follows from it."""
    text = text.replace("[none, backbone]", "[backbone]")
    whole, killed = begun(tmp_path / "whole", text), begun(tmp_path / "killed", text)
    expected = whole.outcome_of(whole.run())
    writes = []
    originals = {name: getattr(Ledger, name) for name in ("put", "add_epoch", "end")}

    def dying(name):
        def call(*words, **named):
            writes.append(name)
            if len(writes) == write - 19:
                raise KeyboardInterrupt
            return originals[name](*words, **named)

        return call

    for name in originals:
        monkeypatch.setattr(Ledger, name, dying(name))
    try:
        killed.run()
    except KeyboardInterrupt:
        assert len(writes) == write - 19
    monkeypatch.undo()
    assert killed.outcome_of(killed.run()) == expected


class _Heard(Observer):
    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def trial_started(self, trial: TrialSpec, record: TrialRecord) -> None:
        self.heard.append(("started", record.trial_id))

    def trial_set_aside(self, record: TrialRecord) -> None:
        self.heard.append(("set aside", record.trial_id))


def test_those_left_of_a_pack_go_on_as_the_same_attempt(ledger):
    heard = _Heard()
    director = director_of(ledger, heard)
    trials = director.next_trials()
    assert [trial.number for trial in trials] == [*range(8)]
    stopped = {t.trial_id: director.epoch(t.trial_id, next(synthetic_epochs(t))) for t in trials}
    left = [trial_id for trial_id, is_stopped in stopped.items() if not is_stopped]
    assert 1 < len(left) < 8
    director.regroup([trial.trial_id for trial in trials])
    assert set(director.running) == set(left)
    assert [trial.trial_id for trial in director.next_trials()] == left
    assert {ledger.get(trial_id).attempts for trial_id in left} == {1}
    assert len(heard.heard) == 8


@pytest.mark.parametrize("cause", [Cause.WORKER, Cause.MEMORY])
def test_each_of_a_pack_that_broke_is_tried_again_alone(ledger, cause):
    director = director_of(ledger)
    trials = director.next_trials()
    for trial in trials:
        director.failed(trial.trial_id, "its process died", cause=cause)
    for trial in trials:
        [again] = director.next_trials()
        assert again.trial_id == trial.trial_id
        assert ledger.get(again.trial_id).attempts == 2
        assert again.train.accumulate == (4 if cause is Cause.MEMORY else 1)


def test_one_that_keeps_killing_its_worker_takes_no_other_with_it(ledger):
    director = director_of(ledger)
    trials = director.next_trials()
    for trial in trials:
        director.failed(trial.trial_id, "its process died", cause=Cause.WORKER)
    while len([r for r in ledger.records if r.outcome]) < 8:
        [again] = director.next_trials()
        if again.number == 3:
            director.failed(again.trial_id, "its process died", cause=Cause.WORKER)
            continue
        for result in synthetic_epochs(again):
            if director.epoch(again.trial_id, result):
                break
    assert ledger.get(trials[3].trial_id).attempts == 1 + RETRIES
    outcomes = {r.number: r.outcome for r in ledger.records}
    assert [number for number, outcome in outcomes.items() if outcome is Outcome.FAILED] == [3]


def test_a_pack_whose_node_was_lost_goes_on_together(ledger):
    director = director_of(ledger)
    trials = director.next_trials()
    for trial in trials:
        director.failed(trial.trial_id, "its node was lost", cause=Cause.NODE)
    assert director.next_trials() == trials


def test_one_that_fails_by_itself_leaves_the_others_running(ledger):
    director = director_of(ledger)
    first, *others = director.next_trials()
    director.failed(first.trial_id, "epoch 1, step 2: the loss is nan")
    assert director.running == tuple(trial.trial_id for trial in others)


def test_the_budget_holds_for_packs(tmp_path):
    text = RANDOM.replace("[none, backbone]", "[backbone]")
    few = begun(tmp_path / "few", text + "budget: {trials: 5}\n")
    few.run()
    assert len(few.packs[0]) == 5
    # Every epoch costs a second; after the first eight nothing more fits.
    heard = _Heard()
    short = begun(tmp_path / "short", text + f"budget: {{device_hours: {11 / 3600}}}\n")
    ledger = Ledger(short.spec, "data")
    director = Director(short.spec, ledger, "data", [heard])
    while not director.finished:
        trials = director.next_trials()
        walks = {trial.trial_id: synthetic_epochs(trial) for trial in trials}
        stopped: list[bool] = []
        while not any(stopped):
            stopped = [director.epoch(trial_id, next(walk)) for trial_id, walk in walks.items()]
        director.regroup(tuple(walks))
    assert director.stopped_by_budget
    assert not director.running
    assert device_seconds_spent(ledger.records) <= 11
    ended = {r.trial_id for r in ledger.records if r.outcome}
    assert {trial_id for what, trial_id in heard.heard if what == "set aside"} == {
        r.trial_id for r in ledger.records if r.trial_id not in ended and r.epochs
    }
    ledger.close()
