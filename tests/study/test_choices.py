from __future__ import annotations

import math

import pytest
from synthetic_study import STUDY, Driver

from studytool.errors import SpecError
from studytool.settings import TrainSettings
from studytool.spec import load_study, single_trial
from studytool.study.choices import Choices, larger_batches, open_choices
from studytool.study.choosing import choose, largest_factor, seconds_saved, share_gpu, trials_that_fit
from studytool.study.director import Director
from studytool.study.ledger import Ledger
from studytool.study.measure import STEPS_COMPILED, Measurement
from studytool.study.plan import meter_of
from studytool.study.records import read_choices

AUTO = STUDY.replace("{max_epochs: 4}", "{max_epochs: 4, compile: auto, batch_factor: auto}")


def spec_of(folder, text=AUTO, *overrides):
    (folder / "a.yaml").write_text(text)
    return load_study(folder / "a.yaml", [f"output={folder / 'studies'}", *overrides])


def measurement(step: float, memory: float = 1.0, first: float = 1.0) -> Measurement:
    return Measurement(step, 0.1, 0.1, memory, 10, 30, True, first)


@pytest.mark.parametrize(("optimizer", "scaled"), [("sgd", 0.04), ("adam", 0.02), ("adamw", 0.02)])
def test_the_learning_rate_keeps_its_meaning_with_larger_batches(optimizer: str, scaled: float):
    train = TrainSettings(optimizer=optimizer, learning_rate=0.01, batch_size=8, ema=0.99)
    changed = larger_batches(train, 4)
    assert changed == {"batch_size": 32, "learning_rate": pytest.approx(scaled), "ema": pytest.approx(0.99**4)}
    assert larger_batches(train, 1) == {}


def test_a_factor_is_the_trial_that_one_would_write_by_hand(tmp_path):
    spec = spec_of(tmp_path)

    def trial(**values):
        return single_trial(spec, {"freeze": "none", "compile": "off", **values}, seed=3)

    by_factor = Choices().applied(trial(batch_size=8, batch_factor=4, learning_rate=0.01))
    by_hand = trial(batch_size=32, batch_factor=1, learning_rate=0.02)
    assert by_factor == by_hand
    assert by_factor.config_hash("data") == by_hand.config_hash("data")
    chosen = Choices(compile="on", batch_factor=2)
    assert chosen.applied(trial(batch_factor="auto", compile="auto")) == chosen.applied(
        trial(batch_factor=2, compile="on")
    )


def test_a_study_keeps_what_was_chosen_and_resumed_trials_are_the_same(tmp_path):
    driver = Driver(tmp_path, AUTO)
    ledger = Ledger(driver.spec, "data")
    ledger.keep_choices(Choices("on", 4))
    first = Director(driver.spec, ledger, "data").next_trial()
    ledger.close()
    assert first is not None
    assert (first.train.compile, first.train.batch_size) == ("on", 128)
    record = ledger.get(first.trial_id)
    assert record is not None
    # What was proposed is told by its own name, so that the search goes on from it.
    assert first.train.learning_rate == pytest.approx(2 * record.parameters["learning_rate"])
    assert record.parameters["batch_size"] == 32
    again = Ledger(driver.spec, "data")
    assert again.choices == read_choices(driver.spec.folder) == Choices("on", 4)
    assert Director(driver.spec, again, "data").next_trial() == first
    again.close()


def test_a_study_without_choices_has_none(tmp_path):
    driver = Driver(tmp_path)
    assert not open_choices(driver.spec)
    ledger = driver.run(kill_after=3)
    assert ledger.choices is None
    assert read_choices(driver.spec.folder) is None
    assert choose(driver.spec) == (Choices(), ())


def test_what_is_left_to_be_chosen_may_stand_anywhere(tmp_path):
    assert open_choices(spec_of(tmp_path)) == {"compile", "batch_factor"}
    compared = STUDY.replace("arms:\n", "arms:\n  compile: ['off', auto]\n")
    assert open_choices(spec_of(tmp_path, compared)) == {"compile"}
    tuned = STUDY.replace("search:\n", "search:\n  batch_factor: {choice: [1, auto]}\n")
    assert open_choices(spec_of(tmp_path, tuned)) == {"batch_factor"}


def test_a_batch_size_that_is_compared_or_tuned_cannot_be_chosen_as_well(tmp_path):
    with pytest.raises(SpecError, match="batch_factor: auto chooses the batch size"):
        spec_of(tmp_path, AUTO.replace("arms:\n", "arms:\n  batch_size: [8, 16]\n"))


def test_nothing_that_cannot_be_measured_is_done(tmp_path):
    choices, lines = choose(spec_of(tmp_path), seconds_in_all=0)
    assert choices == Choices()
    assert [line.split(",")[0] for line in lines] == ["batch_factor: 1", "compile: off"]


def test_batches_grow_as_far_as_memory_steps_and_speed_allow():
    def factor(gain=1.5, second_gib=2.0, volumes=100_000, memory_gib=80.0):
        pair = (measurement(1.0, 1.0), measurement(2.0 / gain, second_gib))
        return largest_factor([pair], [32], [volumes], memory_gib=memory_gib)[0]

    assert factor() == 64  # 64 GiB of 80
    assert factor(memory_gib=79.0) == 32
    assert factor(volumes=2048) == 4  # 16 steps of 128
    assert factor(gain=1.02) == 1
    assert factor(second_gib=80.0) == 1
    slow, fast = (measurement(1.0), measurement(2.0)), (measurement(1.0), measurement(1.0))
    assert largest_factor([slow, fast], [32, 32], [2048, 1024], memory_gib=80.0)[0] == 2, "the smallest arm decides"


def test_what_compiling_saves_is_held_against_what_it_takes():
    # One of the measured steps ran uncompiled: 4 steps of 0.55 s are one of 1 s and three of 0.4 s.
    off, on = measurement(1.0, first=5.0), measurement((1.0 + (STEPS_COMPILED - 1) * 0.4) / STEPS_COMPILED, first=35.0)
    in_all, saved = seconds_saved(off, on, epochs=10, volumes=320, batch_size=32)
    assert in_all == 100
    assert saved == pytest.approx(10 * 9 * 0.6 - 30)
    _, with_smaller_batch = seconds_saved(off, on, epochs=10, volumes=321, batch_size=32)
    assert with_smaller_batch == pytest.approx(10 * 10 * 0.6 - 60)
    assert math.isclose(seconds_saved(off, on, epochs=1, volumes=32, batch_size=32)[1], -30)


def test_as_many_trials_share_a_gpu_as_its_memory_and_the_cores_allow():
    assert trials_that_fit(3.4, gpu_gib=80.0, cores=64) == 16
    assert trials_that_fit(3.4, gpu_gib=80.0, cores=6) == 6
    assert trials_that_fit(70.0, gpu_gib=80.0, cores=64) == 1
    assert trials_that_fit(200.0, gpu_gib=80.0, cores=64) == 1


def test_without_a_gpu_nothing_is_shared_or_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    spec = spec_of(tmp_path, STUDY, "resources.trials_per_gpu=auto")
    shared, why = share_gpu(spec, Choices(), meter_of(spec, 0.0, pytest.fail))
    assert shared.resources.trials_per_gpu == 1
    assert why == "trials_per_gpu: 1, as there is no GPU here"
