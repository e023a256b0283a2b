from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from training_data import particles, write

from studytool import registry
from studytool.data.shards import Dataset, open_dataset
from studytool.errors import DataError, TrainingError, WeightsError
from studytool.models.adapt import StagedModel
from studytool.models.build import build_model
from studytool.predict import predict_dataset
from studytool.results import Cost, EpochResult, to_dict
from studytool.spec import TrialSpec
from studytool.training import course, loop
from studytool.training.checkpoint import LAST, PREVIOUS, save_last
from studytool.training.course import Course
from studytool.training.loop import train_trial
from studytool.training.metrics import score
from studytool.training.trained import load_trained, read_best

MakeTrial = Callable[..., TrialSpec]


def timeless(results: Iterable[EpochResult]) -> list[EpochResult]:
    """Results without seconds and memory, the only things that may differ between two runs."""
    return [replace(r, cost=Cost(samples=r.cost.samples, flops=r.cost.flops)) for r in results]


def test_the_fields_of_a_result(make_trial: MakeTrial, tmp_path: Path):
    results = list(train_trial(make_trial(schedule="multistep"), tmp_path))
    assert [r.epoch for r in results] == [1, 2, 3]
    assert [r.steps for r in results] == [3, 6, 9]  # 21 volumes in batches of 8
    # Steps 0 … 8: a tenth from 4.5 on, a hundredth from 6.75 on.
    assert [r.learning_rate for r in results] == pytest.approx([0.01, 0.001, 0.0001])
    assert [r.is_last for r in results] == [False, False, True]
    assert [r.test for r in results] == [None] * 3
    assert [r.val.count for r in results] == [12] * 3
    values = [r.val.balanced_accuracy for r in results]
    assert [r.best_value for r in results] == [max(values[:n]) for n in (1, 2, 3)]
    assert [r.best_epoch for r in results] == [values.index(max(values[:n])) + 1 for n in (1, 2, 3)]
    assert json.dumps([to_dict(r) for r in results], allow_nan=False)


def test_the_cost_adds_up(make_trial: MakeTrial, tmp_path: Path):
    results = list(train_trial(make_trial(), tmp_path, trials_side_by_side=4))
    costs = [r.cost for r in results]
    assert [c.samples for c in costs] == [21, 42, 63]
    # 2 x voxels x weights a volume and layer; training takes three times that, but the stem's input needs no gradient.
    stem, above = 2 * 12**3 * 4 * 27, 2 * (6**3 * 4 * 8 * 27 + 3**3 * 8 * 8 * 27 + 8 * 3)
    epoch_flops = 21 * (2 * stem + 3 * above) + 12 * (stem + above)
    assert [c.flops for c in costs] == [epoch_flops, 2 * epoch_flops, 3 * epoch_flops]
    for cost in costs:
        assert min(cost.train_seconds, cost.evaluate_seconds, cost.checkpoint_seconds, cost.data_seconds) > 0
        assert cost.device_seconds == pytest.approx(cost.seconds / 4)
        assert cost.energy_joules is None or torch.cuda.is_available()
    assert costs[0].seconds < costs[1].seconds < costs[2].seconds


def test_a_dataset_at_an_address_gives_the_same_result(
    make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STUDYTOOL_CACHE", str(tmp_path / "cache"))
    here = make_trial()
    there = here.model_copy(update={"data_path": f"file://{here.data_path}"})
    assert timeless(train_trial(there, tmp_path / "there")) == timeless(train_trial(here, tmp_path / "here"))
    assert list((tmp_path / "cache").rglob("*.parquet"))


def test_it_learns(make_trial: MakeTrial, tmp_path: Path):
    last = list(train_trial(make_trial(max_epochs=15, learning_rate=0.1), tmp_path))[-1]
    assert last.best_value > 0.7
    assert last.train_loss < 0.7


def test_two_runs_are_equal_to_the_last_bit_and_seeds_differ(make_trial: MakeTrial, tmp_path: Path):
    first = list(train_trial(make_trial(max_epochs=2), tmp_path / "a"))
    second = list(train_trial(make_trial(max_epochs=2), tmp_path / "b"))
    other = list(train_trial(make_trial(max_epochs=2, seed=2), tmp_path / "c"))
    assert timeless(first) == timeless(second)
    assert first[0].train_loss != other[0].train_loss
    weights = [(tmp_path / name / "best.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_memory_that_is_used_again_changes_no_bit(make_trial: MakeTrial, tmp_path: Path):
    runs = [timeless(train_trial(make_trial(reuse_memory=setting), tmp_path / setting)) for setting in ("auto", "off")]
    assert runs[0] == runs[1]


RESUMED = {
    "adamw with warm-up": {"warmup_epochs": 1.5, "augment": ("turns", "shift", "noise"), "dropout": 0.2},
    "sgd in float16": {"optimizer": "sgd", "schedule": "multistep", "precision": "float16", "select": "last"},
    "gradual release, confirm": {"freeze": "gradual", "gradual_epochs": 1, "phase": "confirm", "channels_last": "off"},
    "average of the weights, frozen": {"ema": 0.9, "freeze": "stage1"},
    "average of the weights, confirm": {"ema": 0.9, "phase": "confirm", "accumulate": 2, "class_weights": "balanced"},
}


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED)
def test_a_trial_stopped_after_every_epoch_ends_as_if_it_never_was(
    make_trial: MakeTrial, tmp_path: Path, changes: dict[str, Any]
):
    trial = make_trial(max_epochs=3, gradient_clip=1.0, **changes)
    straight = list(train_trial(trial, tmp_path / "straight"))
    seen: list[EpochResult] = []
    for stop_after in (1, 2, 3):
        walk = train_trial(trial, tmp_path / "stopped")
        torch.rand(stop_after)  # the process that goes on is in another random state
        results = [next(walk) for _ in range(stop_after)]
        walk.close()
        assert results[:-1] == seen, "epochs from before come again, unchanged"
        seen = results
    assert timeless(seen) == timeless(straight)
    assert [r.cost.seconds for r in seen] == sorted(r.cost.seconds for r in seen)
    files = [tmp_path / name / "best.safetensors" for name in ("straight", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_average_of_the_weights_is_what_is_evaluated_and_kept(make_trial: MakeTrial, tmp_path: Path):
    plain = list(train_trial(make_trial(phase="confirm", select="last"), tmp_path / "plain"))
    changes = {"phase": "confirm", "select": "last", "ema": 0.9}
    averaged = list(train_trial(make_trial(**changes), tmp_path / "averaged"))
    assert [r.train_loss for r in averaged] == [r.train_loss for r in plain], "training itself is the same"
    assert [r.val.loss for r in averaged] != [r.val.loss for r in plain]
    assert averaged[-1].test is not None
    again = predict_dataset(tmp_path / "averaged", Path(make_trial().data_path), "test", device="cpu")
    dataset = open_dataset(Path(make_trial().data_path))
    assert score(again.probabilities, dataset.labels[dataset.rows("test")], 3) == averaged[-1].test


def test_a_batch_in_parts_is_the_same_batch_where_nothing_normalizes_over_it(make_trial: MakeTrial, tmp_path: Path):
    chosen: dict[str, Any] = {"backbone": "training_nets:patches", "precision": "float32", "gradient_clip": 1.0}
    whole = list(train_trial(make_trial(**chosen), tmp_path / "whole"))
    parts = list(train_trial(make_trial(**chosen, accumulate=3), tmp_path / "parts"))
    assert [r.steps for r in parts] == [r.steps for r in whole]
    assert [r.cost.samples for r in parts] == [21, 42, 63]
    assert [r.cost.flops for r in parts] == [r.cost.flops for r in whole]
    assert [r.train_loss for r in parts] == pytest.approx([r.train_loss for r in whole], rel=1e-4)
    assert [r.val.loss for r in parts] == pytest.approx([r.val.loss for r in whole], rel=1e-4)


@pytest.mark.parametrize(("changes", "count"), [({"labels_per_class": 2}, 6), ({"label_fraction": 0.5}, 12)])
def test_fewer_labels_are_fewer_volumes_of_train_alone(
    make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], count: int
):
    read: list[int] = []
    gather = Dataset.gather

    def watched(self: Dataset, rows: Any, out: Any) -> None:
        read.extend(int(row) for row in np.asarray(rows) if self.splits[row] == "train")
        gather(self, rows, out)

    monkeypatch.setattr(Dataset, "gather", watched)
    drawn = []
    for name, more in (("a", {}), ("b", {"freeze": "stem", "learning_rate": 0.1}), ("c", {"seed": 2})):
        read.clear()
        results = list(train_trial(make_trial(**{"max_epochs": 2, **changes, **more}), tmp_path / name))
        assert len(read) == 2 * count
        assert [r.val.count for r in results] == [12, 12]
        assert results[0].cost.samples == count
        drawn.append(set(read))
    assert drawn[0] == drawn[1], "another arm with the same seed learns from the same volumes"
    assert drawn[0] != drawn[2]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_trains_as_the_plain_one_and_resumes(make_trial: MakeTrial, tmp_path: Path):
    chosen: dict[str, Any] = {"max_epochs": 2, "batch_size": 7, "dropout": 0.0, "compile": "on"}
    chosen["backbone"] = "training_nets:patches"
    plain = list(train_trial(make_trial(**{**chosen, "compile": "off"}), tmp_path / "plain"))
    straight = list(train_trial(make_trial(**chosen), tmp_path / "straight"))
    next(train_trial(make_trial(**chosen), tmp_path / "stopped"))
    resumed = list(train_trial(make_trial(**chosen), tmp_path / "stopped"))
    assert timeless(resumed) == timeless(straight)
    assert [r.cost.flops for r in straight] == [r.cost.flops for r in plain]
    assert [r.train_loss for r in straight] == pytest.approx([r.train_loss for r in plain], rel=1e-3)
    names = {name: list(load_trained(tmp_path / name).model.state_dict()) for name in ("plain", "straight")}
    assert names["plain"] == names["straight"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"


def test_a_finished_trial_only_repeats_its_results(
    make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trial = make_trial(phase="confirm", max_epochs=2)
    results = list(train_trial(trial, tmp_path))
    monkeypatch.setattr(Dataset, "gather", lambda *_: pytest.fail("a volume was read"))
    assert list(train_trial(trial, tmp_path)) == results
    assert results[-1].test is not None
    # Either generation will do, and neither keeps the optimizer's state.
    (tmp_path / LAST).unlink()
    assert list(train_trial(trial, tmp_path)) == results
    assert (tmp_path / PREVIOUS).stat().st_size < 20_000


def test_a_damaged_state_costs_one_epoch_and_changes_nothing(make_trial: MakeTrial, tmp_path: Path):
    trial = make_trial()
    straight = timeless(train_trial(trial, tmp_path / "straight"))
    walk = train_trial(trial, tmp_path / "damaged")
    next(walk), next(walk)
    walk.close()
    (tmp_path / "damaged" / LAST).write_bytes(b"PK")
    assert timeless(train_trial(trial, tmp_path / "damaged")) == straight


@pytest.mark.parametrize(
    ("epoch_seconds", "seconds_to_write", "written"),
    [(1, 0.04, [1, 2, 3, 4, 5]), (1, 0.09, [1, 1, 3, 3, 5]), (1, 9, [1]), (350, 99, [1, 1, 3, 3, 5])],
)
def test_a_checkpoint_is_written_when_it_takes_a_twentieth_of_the_time_since_the_last_one(
    make_trial: MakeTrial,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    epoch_seconds: float,
    seconds_to_write: float,
    written: list[int],
):
    now = 0.0
    monkeypatch.setattr(course, "time", SimpleNamespace(perf_counter=lambda: now))

    def save(*args: Any) -> None:
        nonlocal now
        now += seconds_to_write
        save_last(*args)

    def add(self: Course, *args: Any) -> None:
        nonlocal now
        now += epoch_seconds
        add_epoch(self, *args)

    def written_epochs(walk: Iterator[EpochResult], folder: Path) -> int:
        next(walk)
        return len(json.loads(torch.load(folder / LAST, weights_only=True)["epochs"]))

    add_epoch = Course.add
    monkeypatch.setattr(course, "save_last", save)
    monkeypatch.setattr(Course, "add", add)
    trial = make_trial(max_epochs=6, checkpoints="auto", phase="confirm")
    straight = timeless(train_trial(make_trial(max_epochs=6, phase="confirm"), tmp_path / "straight"))
    walk = train_trial(trial, tmp_path / "auto")
    written += [written[-1]] * (5 - len(written))
    assert [written_epochs(walk, tmp_path / "auto") for _ in range(5)] == written
    walk.close()
    # It goes on from the last one, and only what was not written is trained again.
    assert timeless(train_trial(trial, tmp_path / "auto")) == straight


def test_a_state_that_takes_long_to_write_is_not_written_for_short_epochs(
    make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(course, "_BYTES_WRITTEN_PER_SECOND", 1.0)
    trial = make_trial(checkpoints="auto", phase="confirm")
    straight = timeless(train_trial(make_trial(phase="confirm"), tmp_path / "straight"))
    walk = train_trial(trial, tmp_path / "auto")
    next(walk), next(walk)
    walk.close()
    assert not (tmp_path / "auto").exists()
    assert timeless(train_trial(trial, tmp_path / "auto")) == straight
    assert sorted(path.name for path in (tmp_path / "auto").iterdir()) == sorted(
        path.name for path in (tmp_path / "straight").iterdir()
    )


@pytest.mark.slow
@pytest.mark.parametrize(("select", "epochs"), [("best", 2), ("last", 2), ("best", 1)])
def test_a_crash_at_any_rename_changes_nothing(
    make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str, epochs: int
):
    trial = make_trial(max_epochs=epochs, phase="confirm", select=select)
    straight = timeless(train_trial(trial, tmp_path / "straight"))
    rename = Path.replace
    done = False
    crash_at = 0
    while not done:
        crash_at += 1
        folder = tmp_path / str(crash_at)
        calls = 0

        def crash(path: Path, target: Path) -> Path:
            nonlocal calls
            calls += 1
            if calls == crash_at:  # noqa: B023
                raise KeyboardInterrupt
            return rename(path, target)

        monkeypatch.setattr(Path, "replace", crash)
        try:
            list(train_trial(trial, folder))
            done = True
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(Path, "replace", rename)
        assert timeless(train_trial(trial, folder)) == straight, f"crash at rename {crash_at}"
        selected = load_trained(folder).record.result
        assert selected.epoch == (straight[-1].best_epoch if select == "best" else epochs)
        assert selected.test == straight[-1].test
    assert crash_at > 4 * epochs


def test_the_callers_random_state_is_neither_read_nor_changed(make_trial: MakeTrial, tmp_path: Path):
    def with_seed(seed: int) -> list[EpochResult]:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
        results = list(train_trial(make_trial(max_epochs=1, dropout=0.5), tmp_path / str(seed)))
        after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        return results

    assert timeless(with_seed(1)) == timeless(with_seed(2))


@pytest.fixture
def test_rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every row of a test split whose volume is read."""
    read: list[int] = []
    gather = Dataset.gather

    def watched(self: Dataset, rows: Any, out: Any) -> None:
        read.extend(int(row) for row in np.asarray(rows) if self.splits[row] == "test")
        gather(self, rows, out)

    monkeypatch.setattr(Dataset, "gather", watched)
    return read


@pytest.mark.parametrize("phase", ["search", "single"])
def test_only_the_confirm_phase_touches_the_test_split(
    make_trial: MakeTrial, tmp_path: Path, test_rows_read: list[int], phase: str
):
    results = list(train_trial(make_trial(phase=phase), tmp_path))
    assert test_rows_read == []
    assert all(r.test is None for r in results)


def test_the_confirm_phase_reads_the_test_split_once_at_the_end(
    make_trial: MakeTrial, tmp_path: Path, test_rows_read: list[int], dataset_folder: Path
):
    trial = make_trial(phase="confirm")
    walk = train_trial(trial, tmp_path)
    results = [next(walk), next(walk)]
    assert test_rows_read == []
    results += list(walk)
    assert test_rows_read == open_dataset(dataset_folder).rows("test").tolist()
    assert [r.test is None for r in results] == [True, True, False]
    assert results[-1].test is not None
    assert results[-1].test.count == 12
    list(train_trial(trial, tmp_path))
    assert len(test_rows_read) == 12


def test_the_selected_epoch_is_the_best_or_the_last(make_trial: MakeTrial, tmp_path: Path):
    chosen: dict[str, Any] = {"max_epochs": 6, "learning_rate": 0.03, "phase": "confirm"}
    best = list(train_trial(make_trial(**chosen), tmp_path / "best"))[-1]
    last = list(train_trial(make_trial(**chosen, select="last"), tmp_path / "last"))[-1]
    assert best.best_epoch == last.best_epoch < 6, "the case is only of interest if they differ"
    records = {name: read_best(tmp_path / name) for name in ("best", "last")}
    assert records["best"].result.epoch == best.best_epoch
    assert records["last"].result.epoch == 6
    assert (records["best"].result.test, records["last"].result.test) == (best.test, last.test)
    assert best.test != last.test


def test_a_loss_is_minimized(make_trial: MakeTrial, tmp_path: Path):
    results = list(train_trial(make_trial(name="val/loss", mode="min"), tmp_path))
    losses = [r.val.loss for r in results]
    assert [r.best_value for r in results] == [min(losses[:n]) for n in (1, 2, 3)]


def test_a_loss_that_is_not_finite_says_where_and_what_to_do(make_trial: MakeTrial, tmp_path: Path):
    trial = make_trial(backbone="training_nets:exploding", schedule="constant")
    with pytest.raises(TrainingError) as caught:
        next(train_trial(trial, tmp_path / "t"))
    expected = r"epoch 1, step 1: the loss is nan at learning rate 0.01; lower learning_rate or set gradient_clip"
    assert caught.match(expected)
    assert not (tmp_path / "t").exists()


def test_a_loss_that_overflows_in_float16_advises_float32(make_trial: MakeTrial, tmp_path: Path):
    trial = make_trial(backbone="training_nets:exploding", precision="bfloat16", gradient_clip=1.0)
    with pytest.raises(TrainingError, match=r"lower learning_rate or set precision to float32 instead of bfloat16$"):
        next(train_trial(trial, tmp_path))


def test_an_output_that_is_not_finite_is_no_score(make_trial: MakeTrial, tmp_path: Path):
    with pytest.raises(TrainingError, match="epoch 1: the network's output on the val split is not finite at"):
        next(train_trial(make_trial(backbone="training_nets:infinite_in_evaluation"), tmp_path))


def test_what_is_impossible_is_found_before_the_first_step(make_trial: MakeTrial, tmp_path: Path):
    folder = write(tmp_path / "d", (p for p in particles() if (p.label, p.split) != ("rod", "train")))
    with pytest.raises(DataError, match="no volume of rod"):
        next(train_trial(make_trial(data_path=str(folder)), tmp_path / "t"))
    with pytest.raises(TrainingError, match="batch_size 20: of 21 training volumes the last batch would hold one"):
        next(train_trial(make_trial(backbone="training_nets:pointlike", batch_size=20), tmp_path / "t"))
    assert not (tmp_path / "t").exists()


def test_a_folder_of_another_trial_is_refused(make_trial: MakeTrial, tmp_path: Path):
    next(train_trial(make_trial(), tmp_path))
    with pytest.raises(WeightsError, match=r"made with train\.batch_size = 8, now 4"):
        next(train_trial(make_trial(batch_size=4), tmp_path))


@pytest.mark.parametrize(("freeze", "kept"), [("none", 1), ("backbone", 0), ("stage1", 1 / 3)])
def test_a_checkpoint_holds_what_is_trained_and_goes_on_from_the_same_frozen_weights_only(
    make_trial: MakeTrial, dataset_folder: Path, tmp_path: Path, freeze: str, kept: float
):
    trial = make_trial(freeze=freeze, ema=0.9)
    walk = train_trial(trial, tmp_path)
    next(walk)
    walk.close()
    content = torch.load(tmp_path / LAST, weights_only=True)
    manifest = open_dataset(dataset_folder).manifest
    shape = manifest.shape_dhw
    network = build_model(trial.model, num_classes=len(manifest.classes), volume_shape_dhw=shape, seed=trial.seed)
    names = {name for name, _ in network.named_parameters() if not name.startswith("head.")}
    for state in (content["model"], content["updater"]["average"]):
        assert len(names & state.keys()) / len(names) == kept
    assert {name for name, _ in (*network.named_buffers(), *network.head.named_parameters(prefix="head"))} <= {
        *content["model"]
    }
    if freeze != "none":
        torch.save({**content, "frozen": "00000000"}, tmp_path / LAST)
        with pytest.raises(WeightsError, match="was trained on other weights than those the network now has"):
            list(train_trial(trial, tmp_path))


@pytest.mark.parametrize("freeze", ["none", "stage1", "backbone", "gradual"])
def test_the_weights_written_at_the_end_are_those_of_the_selected_epoch(
    make_trial: MakeTrial, tmp_path: Path, freeze: str
):
    changes = {"freeze": freeze, "gradual_epochs": 1, "learning_rate": 0.2, "augment": (), "schedule": "constant"}
    trial = make_trial(max_epochs=6, seed=3, **changes)
    walk = train_trial(trial, tmp_path / "a")
    results = [next(walk) for _ in range(5)]
    walk.close()
    assert not (tmp_path / "a" / "best.safetensors").exists()
    last = list(train_trial(trial, tmp_path / "a"))[-1]
    assert results[-1].best_epoch < 5
    assert last.best_epoch < 6
    again = predict_dataset(tmp_path / "a", Path(trial.data_path), "val", device="cpu")
    val = open_dataset(Path(trial.data_path))
    probabilities = again.probabilities
    found = score(probabilities, val.labels[val.rows("val")], probabilities.shape[1])
    assert found.loss == pytest.approx([*results, last][last.best_epoch - 1].val.loss, rel=1e-5)


@pytest.mark.parametrize("epochs", [1, 3])
def test_nothing_of_a_trial_stays_in_memory(make_trial: MakeTrial, tmp_path: Path, epochs: int):
    def networks() -> int:
        gc.collect()
        return sum(isinstance(thing, StagedModel) for thing in gc.get_objects())

    before = networks()
    walk = train_trial(make_trial(), tmp_path)
    for _ in range(epochs):
        next(walk)
    if epochs < 3:
        assert networks() == before + 1
    walk.close()
    assert networks() == before


def test_mixed_precision_trains_the_float32_weights(make_trial: MakeTrial, tmp_path: Path):
    [plain] = train_trial(make_trial(precision="float32", max_epochs=1), tmp_path / "a")
    [mixed] = train_trial(make_trial(precision="bfloat16", max_epochs=1), tmp_path / "b")
    assert mixed.train_loss != plain.train_loss
    assert mixed.train_loss == pytest.approx(plain.train_loss, rel=0.05)
    tensors = load_trained(tmp_path / "b").model.state_dict().values()
    assert {t.dtype for t in tensors} == {torch.float32, torch.int64}
    assert read_best(tmp_path / "b").precision == "bfloat16"


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_nothing(make_trial: MakeTrial, tmp_path: Path):
    trial = make_trial(max_epochs=12, phase="confirm")
    straight = timeless(train_trial(trial, tmp_path / "straight"))
    program = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from studytool.spec import TrialSpec
        from studytool.training.loop import train_trial

        torch.set_num_threads(1)
        trial = TrialSpec.model_validate_json(sys.argv[1])
        print("ready", flush=True)
        for result in train_trial(trial, Path(sys.argv[2])):
            print(result.epoch, flush=True)
        """
    )
    command = [sys.executable, "-c", program, trial.model_dump_json(), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    rng = random.Random(0)
    for _ in range(2):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.stdout.readline()  # the first epoch, of this call or an earlier one
            time.sleep(rng.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
    assert timeless(train_trial(trial, tmp_path / "killed")) == straight
    assert not list((tmp_path / "killed").glob(".*.part"))


@pytest.mark.slow
def test_a_real_video_network(make_trial: MakeTrial, tmp_path: Path):
    trial = make_trial(backbone="s3d", max_epochs=2, phase="confirm", batch_size=7, freeze="stage1", learning_rate=1e-3)
    straight = list(train_trial(trial, tmp_path / "straight"))
    next(train_trial(trial, tmp_path / "stopped"))
    resumed = list(train_trial(trial, tmp_path / "stopped"))
    assert timeless(resumed) == timeless(straight)
    assert straight[1].train_loss < straight[0].train_loss


def test_the_backbone_is_imported_before_the_clock_runs(
    make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    order: list[str] = []
    monkeypatch.setattr(registry, "load", lambda _entry: order.append("import"))
    monkeypatch.setattr(loop, "CostMeter", lambda *_a, **_k: order.append("clock") or pytest.fail("stop here"))
    with pytest.raises(pytest.fail.Exception):
        next(train_trial(make_trial(), tmp_path))
    assert order == ["import", "import", "clock"]
