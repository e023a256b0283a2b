from __future__ import annotations

import pytest
from synthetic_study import STUDY, Driver

from studytool.results import Outcome
from studytool.search_settings import SchedulerSettings
from studytool.spec import load_study
from studytool.study.plan import expected_epochs, plan_study
from studytool.study.plantext import plan_lines

SIMULATED = STUDY.replace(
    "{path: data/small}",
    "{path: FOLDER/data, simulate: {classes: 2, volumes_per_class: 10, side: 16, voxel_size_angstrom: 14.0, "
    "tomograms: [3, 1, 1]}}",
)


def spec_of(folder, text=STUDY, *overrides):
    (folder / "a.yaml").write_text(text.replace("FOLDER", str(folder)))
    return load_study(folder / "a.yaml", [f"output={folder / 'studies'}", *overrides])


def scheduler(value: object) -> SchedulerSettings:
    return SchedulerSettings.model_validate(value)


@pytest.mark.parametrize(
    ("value", "epochs"),
    [
        ("none", 27),
        # All run 1, a third 2 more, a ninth 6 more, a 27th 18 more.
        ({"asha": {"grace_epochs": 1, "reduction_factor": 3}}, 1 + 2 / 3 + 6 / 9 + 18 / 27),
        ({"asha": {"grace_epochs": 20, "reduction_factor": 2}}, 20 + 7 / 2),
        ({"asha": {"grace_epochs": 40, "reduction_factor": 2}}, 27),
        # Brackets that begin at 9 and at 27 epochs.
        ({"hyperband": {"grace_epochs": 9, "reduction_factor": 3}}, ((9 + 18 / 3) + 27) / 2),
        ({"median": {"grace_epochs": 3}}, 15),
    ],
)
def test_how_many_epochs_a_scheduler_leaves(value, epochs):
    assert expected_epochs(scheduler(value), 27) == pytest.approx(epochs)


def test_a_new_study_is_planned_in_full_without_starting_anything(tmp_path):
    plan = plan_study(spec_of(tmp_path, SIMULATED), seconds_in_all=0)
    assert [(a.name, a.search, a.confirm, a.epoch_seconds) for a in plan.arms] == [
        ("none", 6, 2, None),
        ("backbone", 6, 2, None),
    ]
    assert plan.data_bytes == 20 * 16**3 * 2
    assert plan.device_hours() is None
    assert plan.problems == ()
    assert {path.name for path in tmp_path.iterdir()} == {"a.yaml"}


def test_what_is_missing_is_said(tmp_path):
    plan = plan_study(spec_of(tmp_path, STUDY, "data.path=/nowhere/data", "model.init=checkpoint:/nowhere/w.pt"))
    assert [problem.split(":")[0] for problem in plan.problems] == ["/nowhere/data", "checkpoint"]


def test_only_what_is_left_counts_and_finished_trials_tell_what_an_epoch_takes(tmp_path):
    driver = Driver(tmp_path)
    ledger = driver.run(kill_after=14)
    plan = plan_study(driver.spec, seconds_in_all=0)
    for arm in plan.arms:
        own = [r for r in ledger.records if r.arm == arm.name]
        ended = [r for r in own if r.outcome in (Outcome.COMPLETE, Outcome.PRUNED)]
        epochs = sum(len(r.epochs) for r in own)
        assert arm.search == 6 - len(ended)
        assert arm.confirm == 2
        assert arm.epoch_seconds == pytest.approx(sum(r.cost.seconds for r in own) / epochs)
        assert arm.search_epochs == sum(len(r.epochs) for r in ended) / len(ended)
        left = arm.search * arm.search_epochs + 2 * 4 - arm.epochs_done
        assert arm.seconds() == pytest.approx(left * arm.epoch_seconds)
    assert plan.device_hours() == pytest.approx(sum(a.seconds() for a in plan.arms) / plan.slots.side_by_side / 3600)


def test_a_finished_study_has_nothing_left(tmp_path):
    driver = Driver(tmp_path)
    driver.run()
    plan = plan_study(driver.spec, seconds_in_all=0)
    assert [(a.search, a.confirm) for a in plan.arms] == [(0, 0), (0, 0)]
    assert plan.device_hours() == 0


def test_configurations_that_would_be_proposed_twice_are_not_counted(tmp_path):
    choices = STUDY.replace("{log_uniform: [1e-4, 1e-1]}", "{choice: [1.0e-3, 1.0e-2]}")
    plan = plan_study(spec_of(tmp_path, choices), seconds_in_all=0)
    assert [arm.search for arm in plan.arms] == [2, 2]
    assert any("only 2 configurations for an arm's 6 trials" in line for line in plan_lines(plan))


def test_the_text_names_arms_money_and_whether_the_budget_is_enough(tmp_path):
    driver = Driver(tmp_path)
    driver.run(kill_after=14)
    spec = spec_of(
        tmp_path, STUDY, "resources.price_per_device_hour=3600", "resources.currency=EUR", "budget.max_cost=1"
    )
    plan = plan_study(spec, seconds_in_all=0)
    text = "\n".join(plan_lines(plan))
    assert f"cost: {plan.device_hours() * 3600:.2f} EUR" in text
    assert "budget: 0.000278 device-hours in all, not enough" in text
    assert all(any(line.startswith(arm.name) for line in plan_lines(plan)) for arm in plan.arms)


@pytest.mark.slow
def test_a_workload_is_measured_once_and_then_known(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDYTOOL_CACHE", str(tmp_path / "cache"))
    text = SIMULATED.replace("freeze: [none, backbone]", "backbone: [r2plus1d_tiny]")
    spec = spec_of(tmp_path, text, "train.batch_size=4")
    told: list[str] = []
    first = plan_study(spec, on_measuring=told.append)
    assert len(told) == 1
    (arm,) = first.arms
    assert arm.epoch_seconds > 0
    assert arm.peak_memory_gib > 0
    assert 0 < arm.weights_bytes < arm.state_bytes
    again = plan_study(spec, on_measuring=told.append)
    assert len(told) == 1
    assert again.arms == first.arms
    assert plan_study(spec, seconds_in_all=0).arms == first.arms


def test_what_cannot_be_measured_is_a_note_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDYTOOL_CACHE", str(tmp_path / "cache"))
    plan = plan_study(spec_of(tmp_path, SIMULATED), seconds_in_all=0.01)
    assert plan.arms[0].epoch_seconds is None
    assert "could not be measured" in plan.notes[0]
