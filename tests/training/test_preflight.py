from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_data import CLASSES, COUNTS, particles, write

from studytool.data.particles import Particle
from studytool.data.shards import open_dataset
from studytool.errors import DataError, TrainingError
from studytool.models.build import build_model
from studytool.spec import TrialSpec
from studytool.training.preflight import check_compiler, check_data, check_last_batch

MakeTrial = Callable[..., TrialSpec]


def without(label: str, split: str) -> Iterator[Particle]:
    return (p for p in particles() if (p.label, p.split) != (label, split))


def test_a_good_dataset_passes(make_trial: MakeTrial, dataset_folder: Path):
    for phase in ("search", "confirm", "single"):
        check_data(make_trial(phase=phase, name="val/macro_auc"), open_dataset(dataset_folder))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_named(make_trial: MakeTrial, tmp_path: Path, split: str):
    folder = write(tmp_path / "d", particles(counts={s: n for s, n in COUNTS.items() if s != split}))
    with pytest.raises(DataError, match=f"'{split}'"):
        check_data(make_trial(), open_dataset(folder))


def test_only_the_confirm_phase_needs_a_test_split(make_trial: MakeTrial, tmp_path: Path):
    dataset = open_dataset(write(tmp_path / "d", particles(counts={"train": 2, "val": 2})))
    check_data(make_trial(phase="search"), dataset)
    with pytest.raises(DataError, match="'test'"):
        check_data(make_trial(phase="confirm"), dataset)


def test_a_class_missing_in_train_is_named(make_trial: MakeTrial, tmp_path: Path):
    folder = write(tmp_path / "d", without("rod", "train"))
    with pytest.raises(DataError, match="the train split has no volume of rod;"):
        check_data(make_trial(), open_dataset(folder))


def test_a_class_missing_in_val_is_allowed(make_trial: MakeTrial, tmp_path: Path):
    check_data(make_trial(), open_dataset(write(tmp_path / "d", without("rod", "val"))))


def test_one_class_is_not_enough(make_trial: MakeTrial, tmp_path: Path):
    folder = write(tmp_path / "d", particles(classes=("ball",)))
    with pytest.raises(DataError, match="nothing to tell apart: the only class is ball"):
        check_data(make_trial(), open_dataset(folder))


def test_auc_needs_two_classes_in_val(make_trial: MakeTrial, tmp_path: Path):
    folder = write(tmp_path / "d", (p for p in particles() if p.split != "val" or p.label == "rod"))
    check_data(make_trial(), open_dataset(folder))
    with pytest.raises(DataError, match="only rod"):
        check_data(make_trial(name="val/macro_auc"), open_dataset(folder))


def check(trial: TrialSpec, num_train: int) -> None:
    model = build_model(trial.model, num_classes=len(CLASSES), volume_shape_dhw=(12, 12, 12), seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    check_last_batch(trial, model, volume_shape_dhw=(12, 12, 12), num_train=num_train)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the check changed the model"
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_a_last_batch_of_one_is_refused_where_batch_normalization_ends_in_a_point(make_trial: MakeTrial):
    pointlike = make_trial(backbone="training_nets:pointlike", batch_size=8)
    with pytest.raises(TrainingError, match=r"of 17 training volumes the last batch would hold one, .* for example 9$"):
        check(pointlike, 17)
    check(pointlike, 16)
    check(pointlike, 18)
    with pytest.raises(TrainingError, match="batch_size 1:"):
        check(make_trial(backbone="training_nets:pointlike", batch_size=1), 16)


def test_a_last_batch_of_one_is_fine_where_there_are_voxels_left(make_trial: MakeTrial):
    check(make_trial(batch_size=8), 17)
    check(make_trial(batch_size=1), 17)


def test_a_frozen_batch_normalization_minds_no_batch_of_one(make_trial: MakeTrial):
    check(make_trial(backbone="training_nets:pointlike", freeze="backbone", batch_size=8), 17)


def test_what_is_released_later_is_checked_now(make_trial: MakeTrial):
    changes = {"backbone": "training_nets:pointlike", "freeze": "gradual", "gradual_epochs": 2, "batch_size": 8}
    check(make_trial(**changes, max_epochs=2), 17)
    with pytest.raises(TrainingError, match="the last batch would hold one"):
        check(make_trial(**changes, max_epochs=3), 17)


def test_a_part_of_a_batch_may_be_too_small_as_well(make_trial: MakeTrial):
    changes = {"backbone": "training_nets:pointlike", "batch_size": 8}
    check(make_trial(**changes, accumulate=4), 16)
    # Parts of 2: a last batch of 3 is computed as 1 and 2.
    with pytest.raises(TrainingError, match=r"a part of a batch \(accumulate 4\) would hold one, .* for example 10$"):
        check(make_trial(**changes, accumulate=4), 19)
    # Batches of 9 and 1; of 10 and 9, in parts of 3.
    check(make_trial(**{**changes, "batch_size": 10}, accumulate=4), 19)
    with pytest.raises(TrainingError, match=r"for example 10$"):
        check(make_trial(**changes, accumulate=8), 16)


def test_a_filter_finer_than_the_voxels_is_refused(make_trial: MakeTrial, dataset_folder: Path):
    dataset = open_dataset(dataset_folder)
    for name in ("low_pass", "dog"):
        check_data(make_trial(filter=name, low_pass_angstrom=20.0), dataset)
        with pytest.raises(DataError, match=r"low_pass_angstrom 19 is finer than voxels of 10 Å .* limit is 20 Å;"):
            check_data(make_trial(filter=name, low_pass_angstrom=19.0), dataset)
    check_data(make_trial(filter="none", low_pass_angstrom=19.0), dataset)


def test_rotations_of_the_cube_need_cubes(make_trial: MakeTrial, dataset_folder: Path, tmp_path: Path):
    trial = make_trial(augment=("rotations24",))
    check_data(trial, open_dataset(dataset_folder))
    flat = write(tmp_path / "flat", (replace(p, volume_DHW=p.volume_DHW[:10]) for p in particles()))
    with pytest.raises(DataError, match="rotations24 needs cubes, the volumes are 10x12x12; leave it out"):
        check_data(trial, open_dataset(flat))


def test_too_few_labels_are_found_before_training(make_trial: MakeTrial, dataset_folder: Path):
    check_data(make_trial(labels_per_class=7), open_dataset(dataset_folder))
    with pytest.raises(DataError, match="labels_per_class is 8"):
        check_data(make_trial(labels_per_class=8), open_dataset(dataset_folder))


def test_a_leak_is_found_before_training(make_trial: MakeTrial, dataset_folder: Path):
    dataset = open_dataset(dataset_folder)
    dataset.tomograms[dataset.rows("val")[2]] = "tomogram-train"
    with pytest.raises(DataError, match="are of the same tomogram 'tomogram-train'"):
        check_data(make_trial(), dataset)


def test_compiling_needs_a_compiler(make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_compiler(make_trial(), torch.device("cpu"))
    with pytest.raises(TrainingError, match=r"compile: on needs a compiler here, found none \(no-such-compiler\)"):
        check_compiler(make_trial(compile="on"), torch.device("cpu"))
