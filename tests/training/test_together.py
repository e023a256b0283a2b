"""Many heads in one pass against the same trials one by one."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_data import particles, write

from studytool.data.shards import open_dataset
from studytool.errors import StudytoolError, TrainingError, WeightsError
from studytool.models.adapt import StagedModel
from studytool.models.backbones import BACKBONES
from studytool.results import EpochResult
from studytool.spec import TrialSpec
from studytool.training.checkpoint import LAST, load_last
from studytool.training.features import FeatureCache
from studytool.training.loop import train_trial
from studytool.training.packs import may_train_together
from studytool.training.together import train_together
from studytool.training.trained import WEIGHTS, load_trained

MakeTrials = Callable[..., list[TrialSpec]]
DIFFERENT: list[dict[str, Any]] = [
    {"learning_rate": 0.1},
    {"learning_rate": 0.01, "weight_decay": 0.3, "schedule": "multistep", "momentum": 0.5},
    {"learning_rate": 0.03, "weight_decay": 0.0, "label_smoothing": 0.2, "warmup_epochs": 1.5, "momentum": 0.0},
    {"learning_rate": 0.05, "gradient_clip": 0.05, "class_weights": "balanced", "schedule": "constant"},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDYTOOL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_trials(make_trial: Callable[..., TrialSpec]) -> MakeTrials:
    """Four trials that train heads in different ways; keywords are what they have in common."""

    def make(**common: Any) -> list[TrialSpec]:
        chosen = {"freeze": "backbone", "augment": (), "max_epochs": 4, **common}
        trials = [make_trial(**{**chosen, **own, "number": i}) for i, own in enumerate(DIFFERENT)]
        return [trial.model_copy(update={"cache": "auto"}) for trial in trials]

    return make


def folders(place: Path, trials: Sequence[TrialSpec]) -> list[Path]:
    return [place / trial.trial_id for trial in trials]


def one_by_one(trials: Sequence[TrialSpec], place: Path) -> dict[str, list[EpochResult]]:
    return {trial.trial_id: list(train_trial(trial, place / trial.trial_id)) for trial in trials}


def together(trials: Sequence[TrialSpec], place: Path) -> dict[str, list[EpochResult | StudytoolError]]:
    curves: dict[str, list[EpochResult | StudytoolError]] = {trial.trial_id: [] for trial in trials}
    for step in train_together(trials, folders(place, trials)):
        for trial_id, result in step.items():
            curves[trial_id].append(result)
    return curves


def numbers(result: EpochResult) -> Iterator[float]:
    yield from (result.train_loss, result.learning_rate, result.val.loss, result.val.balanced_accuracy)
    yield from (result.best_value, result.best_epoch, result.steps, result.is_last)
    yield from (result.cost.samples, result.cost.flops)
    if result.test:
        yield from (result.test.loss, result.test.balanced_accuracy)


def assert_alike(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for trial_id, curve in expected.items():
        assert [list(numbers(r)) for r in found[trial_id]] == [
            pytest.approx(list(numbers(r)), rel=1e-5, abs=1e-7) for r in curve
        ]
        assert [r.val.confusion for r in found[trial_id]] == [r.val.confusion for r in curve]
        assert [bool(r.test) for r in found[trial_id]] == [bool(r.test) for r in curve]


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize(
    "backbone",
    [
        "training_nets:convolutional",
        "training_nets:patches",
        "r2plus1d_tiny",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("r3d_18", "x3d_m", "mvit_v2_s")),
    ],
)
def test_heads_trained_together_learn_what_each_learns_alone(
    make_trials: MakeTrials, tmp_path: Path, backbone: str, optimizer: str
):
    if backbone in BACKBONES and BACKBONES[backbone].package:
        pytest.importorskip(BACKBONES[backbone].package)
    trials = make_trials(backbone=backbone, optimizer=optimizer, phase="confirm")
    # The fill of the cache is charged to whoever comes first; what it computes is not compared here.
    one_by_one(trials[:1], tmp_path / "first")
    expected = one_by_one(trials, tmp_path / "alone")
    found = together(trials, tmp_path / "together")
    assert_alike(found, expected)
    for trial in trials:
        alone, beside = (load_file(tmp_path / place / trial.trial_id / WEIGHTS) for place in ("alone", "together"))
        assert alone.keys() == beside.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(beside[name], tensor, rtol=1e-4, atol=1e-6)
        assert load_trained(tmp_path / "together" / trial.trial_id).record.result.test == found[trial.trial_id][-1].test


@pytest.mark.parametrize("stops", [(0, 0, 0, 0), (1, 1, 1, 1), (2, 1, 0, 4)], ids=["begun", "resumed", "unequal"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_either_goes_on_from_the_files_of_the_other(
    make_trials: MakeTrials, tmp_path: Path, optimizer: str, stops: tuple[int, ...]
):
    trials = make_trials(optimizer=optimizer)
    one_by_one(trials[:1], tmp_path / "first")
    expected = one_by_one(trials, tmp_path / "alone")
    for trial, epochs in zip(trials, stops, strict=True):
        walk = train_trial(trial, tmp_path / "to-together" / trial.trial_id)
        for _ in range(epochs):
            next(walk)
        walk.close()
    assert_alike(together(trials, tmp_path / "to-together"), expected)
    walk = train_together(trials, folders(tmp_path / "to-alone", trials))
    for _ in range(max(stops)):
        next(walk)
    walk.close()
    assert_alike(one_by_one(trials, tmp_path / "to-alone"), expected)


def test_the_state_of_the_optimizer_is_torchs_own(make_trials: MakeTrials, tmp_path: Path):
    for optimizer in ("adamw", "sgd"):
        trials = make_trials(optimizer=optimizer)
        next(train_together(trials, folders(tmp_path / "together" / optimizer, trials)))
        for trial in trials:
            next(train_trial(trial, tmp_path / "alone" / optimizer / trial.trial_id))
            states = []
            for place in ("alone", "together"):
                folder = tmp_path / place / optimizer / trial.trial_id
                fingerprint = torch.load(folder / LAST, weights_only=True)["data_fingerprint"]
                state = load_last(folder, trial, fingerprint)
                assert state is not None
                states.append(state.updater["optimizer"])
            alone, beside = states
            torch.testing.assert_close(beside["state"], alone["state"], rtol=1e-4, atol=1e-6)
            assert beside["param_groups"] == alone["param_groups"]


def test_trials_of_several_seeds_have_their_own_order_head_and_labelled_volumes(
    make_trials: MakeTrials, tmp_path: Path, dataset_folder: Path
):
    checkpoint = tmp_path / "pretrained"
    list(train_trial(make_trials(freeze="none")[0], checkpoint))
    common = {"init": f"checkpoint:{checkpoint / WEIGHTS}", "labels_per_class": 3, "views": 2, "augment": ("turns",)}
    trials = [
        trial.model_copy(update={"seed": seed}) for seed, trial in enumerate(make_trials(phase="confirm", **common))
    ]
    assert all(may_train_together(trials[0], trial) for trial in trials)
    expected = one_by_one(trials, tmp_path / "alone")
    found = together(trials, tmp_path / "together")
    for curve, alone in zip(found.values(), expected.values(), strict=True):
        for result, other in zip(curve, alone, strict=True):
            assert isinstance(result, EpochResult)
            assert result.train_loss == pytest.approx(other.train_loss, rel=1e-5)
            assert result.val.loss == pytest.approx(other.val.loss, rel=1e-5)
    assert len({curve[0].train_loss for curve in expected.values()}) == 4


def test_one_that_diverges_fails_alone_with_the_same_words(make_trials: MakeTrials, tmp_path: Path):
    trials = make_trials(optimizer="sgd", max_epochs=12)
    changes = {"learning_rate": 10.0, "weight_decay": 10.0, "schedule": "constant"}
    wild = trials[1].model_copy(update={"train": trials[1].train.model_copy(update=changes)})
    with pytest.raises(TrainingError) as alone:
        list(train_trial(wild.model_copy(update={"cache": "off"}), tmp_path / "wild"))
    others = [trials[0], *trials[2:]]
    one_by_one(others[:1], tmp_path / "first")
    expected = one_by_one(others, tmp_path / "alone")
    found = together([trials[0], wild, *trials[2:]], tmp_path / "together")
    *before, last = found.pop(wild.trial_id)
    assert before
    assert all(isinstance(result, EpochResult) for result in before)
    assert str(last) == str(alone.value)
    assert_alike(found, expected)


def test_one_whose_files_are_damaged_fails_alone(make_trials: MakeTrials, tmp_path: Path):
    trials = make_trials(max_epochs=2)
    (tmp_path / trials[2].trial_id).mkdir()
    (tmp_path / trials[2].trial_id / LAST).write_bytes(b"PK")
    found = together(trials, tmp_path)
    assert [type(result) for result in found[trials[2].trial_id]] == [WeightsError]
    assert [len(curve) for curve in found.values()] == [2, 2, 1, 2]


def test_finished_trials_only_repeat_their_results(make_trials: MakeTrials, tmp_path: Path):
    trials = make_trials(phase="confirm")
    found = together(trials, tmp_path)
    shutil.rmtree(tmp_path / "cache")
    assert together(trials, tmp_path) == found
    assert not (tmp_path / "cache").exists()


def test_reading_the_test_split_is_no_part_of_what_training_costs(
    make_trials: MakeTrials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trials, read = make_trials(phase="confirm"), FeatureCache.all_at_once
    test_rows = open_dataset(Path(trials[0].data_path)).rows("test")

    def slowly(cache: FeatureCache, rows: Any, *others: Any) -> Any:
        with cache.meter.phase("evaluate"):
            time.sleep(0.4 if np.array_equal(rows, test_rows) else 0)
        return read(cache, rows, *others)

    monkeypatch.setattr(FeatureCache, "all_at_once", slowly)
    for curve in together(trials, tmp_path).values():
        assert isinstance(curve[-1], EpochResult)
        assert curve[-1].cost.ending_device_seconds > 0.4 / len(trials)


def test_shards_that_one_leaves_out_all_leave_out(make_trials: MakeTrials, tmp_path: Path):
    data = write(tmp_path / "data", particles(), volumes_per_shard=4)
    whole = make_trials(data_path=str(data))
    trials = [trial.model_copy(update={"data_leave_out": ("part-00001.parquet",)}) for trial in whole]
    one_by_one(trials[:1], tmp_path / "first")  # fills the cache, which is charged to it
    expected = one_by_one(trials, tmp_path / "alone")
    assert_alike(together(trials, tmp_path / "together"), expected)


def test_the_cost_of_all_is_shared_out(make_trials: MakeTrials, tmp_path: Path):
    trials = make_trials()
    costs = [curve[-1].cost for curve in together(trials, tmp_path / "together").values()]
    fills = [cost.cache_fill_seconds for cost in costs]
    assert min(fills) > 0
    assert max(fills) == pytest.approx(min(fills))
    assert len({cost.flops for cost in costs}) == 1
    first = one_by_one(trials[:1], tmp_path / "alone")[trials[0].trial_id][-1].cost
    assert first.cache_fill_seconds < min(fills)  # it waited for nobody
    shutil.rmtree(tmp_path / "cache")
    filling = one_by_one(trials[:1], tmp_path / "filling")[trials[0].trial_id][-1].cost
    assert sum(c.flops for c in costs) - 4 * first.flops == pytest.approx(filling.flops - first.flops)
    for cost in costs:
        assert min(cost.train_seconds, cost.evaluate_seconds, cost.checkpoint_seconds, cost.data_seconds) > 0
        assert cost.samples == first.samples
        assert cost.device_seconds == pytest.approx(cost.seconds)


def test_without_a_cache_on_disk_the_features_are_computed_once(
    make_trials: MakeTrials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    trials = make_trials()
    expected = together(trials, tmp_path / "kept")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("STUDYTOOL_CACHE_GB", "0.0000001")
    found = together(trials, tmp_path / "not-kept")
    assert len([line for line in caplog.messages if "frozen parts are computed anew" in line]) == 2  # train, val
    for curve, other in zip(found.values(), expected.values(), strict=True):
        assert [r.train_loss for r in curve] == pytest.approx([r.train_loss for r in other], rel=1e-5)
        cost = curve[-1].cost
        assert cost.flops == pytest.approx(other[-1].cost.flops)
        # Computed once for all four trials and epochs: alone it would have been 16 times.
        assert cost.cache_saved_seconds == pytest.approx(16 * cost.cache_fill_seconds)


def test_one_with_other_frozen_weights_than_before_fails_alone(make_trials: MakeTrials, tmp_path: Path):
    trials = make_trials()
    expected = together(trials, tmp_path / "whole")
    run = train_together(trials, folders(tmp_path / "stopped", trials))
    next(run)
    run.close()
    last = tmp_path / "stopped" / trials[1].trial_id / LAST
    state = torch.load(last, weights_only=True)
    state["frozen"] = "other"
    for name in state["model"].keys() - {"head.linear.weight", "head.linear.bias"}:
        state["model"][name] += 1  # running statistics, which the trials share
    torch.save(state, last)
    found = together(trials, tmp_path / "stopped")
    (error,) = found.pop(trials[1].trial_id)
    assert isinstance(error, WeightsError)
    assert "other weights" in str(error)
    for trial_id, curve in found.items():
        losses = [(r.train_loss, r.val.loss) for r in expected[trial_id]]
        assert [(r.train_loss, r.val.loss) for r in curve] == [pytest.approx(pair, rel=1e-5) for pair in losses]


def test_nothing_is_held_when_the_memory_is_given_back(
    make_trials: MakeTrials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    left = []

    def count(*_args: object, **_options: object) -> None:
        gc.collect()
        left.append(sum(isinstance(thing, StagedModel) for thing in gc.get_objects()))

    monkeypatch.setattr("studytool.training.together.release_memory", count)
    together(make_trials(), tmp_path)
    assert left == [0]


@pytest.mark.parametrize(
    "changes",
    [
        {"freeze": "stage1"},
        {"freeze": "norm_only"},
        {"frozen_batchnorm": "train"},
        {"dropout": 0.1},
        {"augment": ("turns",)},
        {"ema": 0.9},
        {"compile": "on"},
        {"precision": "float16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_more_than_a_head_on_features_that_stay_is_trained_alone(
    make_trials: MakeTrials, changes: dict[str, Any]
):
    plain, changed = make_trials(), make_trials(**changes)
    assert may_train_together(*plain[:2])
    assert not may_train_together(*changed[:2])


def test_what_has_another_epoch_or_other_features_is_trained_apart(make_trials: MakeTrials, tmp_path: Path):
    one = make_trials()[0]
    for changes in ({"batch_size": 4}, {"max_epochs": 5}, {"optimizer": "sgd"}, {"time_axis": "y"}, {"stem": "mean"}):
        assert not may_train_together(one, make_trials(**changes)[1])
    # Random weights are other ones for every seed; published ones are not.
    assert not may_train_together(one, make_trials(seed=2)[1])
    assert may_train_together(make_trials(init="checkpoint:x")[0], make_trials(init="checkpoint:x", seed=2)[1])
    assert not may_train_together(one, make_trials()[1].model_copy(update={"cache": "off"}))
    with pytest.raises(ValueError, match="not to be trained together"):
        next(train_together([one, make_trials(batch_size=4)[1]], [tmp_path / "a", tmp_path / "b"]))
