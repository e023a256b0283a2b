from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from studytool.data.shards import open_dataset, read_manifest, write_dataset
from studytool.data.splits import Recipe, list_splits, read_recipe, read_split, split_text, store_split
from studytool.data.splitting import make_split
from studytool.errors import DataError

THIRDS = Recipe("fractions", (0.6, 0.2, 0.2))


@pytest.fixture
def copied(dataset_folder, tmp_path):
    """600 volumes in five tomograms, which may be written to."""
    shutil.copytree(dataset_folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def dataset_of(tmp_path, make_particles):
    def make(change, count=60):
        changed = (change(number, particle) for number, particle in enumerate(make_particles(count)))
        write_dataset(changed, tmp_path / "d", dtype="float16", provenance={}, volumes_per_shard=100)
        return open_dataset(tmp_path / "d")

    return make


def stored(folder, recipe=THIRDS, name="new"):
    split = make_split(open_dataset(folder), recipe, name)
    store_split(folder, split)
    return split


# a split and its use


def test_a_named_split_replaces_the_stored_one(copied):
    split = stored(copied)
    assert len(split.assignment) == 600
    assert split.notes == ()
    before, now = open_dataset(copied), open_dataset(copied, "new")
    assert now.splits.tolist() == [{"t": "train", "v": "val", "e": "test"}[letter] for letter in split.assignment]
    assert now.stored_splits.tolist() == before.splits.tolist()
    assert [len(now.rows(name)) for name in ("train", "val", "test")] == [360, 120, 120]
    for name in ("train", "val", "test"):
        assert np.bincount(now.labels[now.rows(name)]).tolist() == [len(now.rows(name)) // 3] * 3
    for tomogram in np.unique(now.tomograms):
        assert len(set(now.splits[now.tomograms == tomogram])) == 1
    assert {path.name for path in (copied / "splits").iterdir()} == {"new.json", "identical.cache"}


def test_folds_test_every_volume_once(copied):
    split = stored(copied, Recipe("folds", folds=5), "kfold5")
    assert split.study_names == ("kfold5/0", "kfold5/1", "kfold5/2", "kfold5/3", "kfold5/4")
    folds = [open_dataset(copied, name) for name in split.study_names]
    for role, times in (("test", 1), ("val", 1), ("train", 3)):
        assert (sum((fold.splits == role).astype(int) for fold in folds) == times).all()
    assert (folds[1].splits[folds[0].splits == "val"] == "test").all()


def test_the_fingerprint_tells_splits_apart_by_what_they_are(copied):
    stored(copied, name="a")
    stored(copied, name="same")
    different = next(
        seed for seed in range(1, 20)
        if make_split(open_dataset(copied), dataclasses.replace(THIRDS, seed=seed), "x").assignment
        != list_splits(copied)[0].assignment
    )  # fmt: skip
    stored(copied, dataclasses.replace(THIRDS, seed=different), "other")
    plain = open_dataset(copied)
    assert plain.fingerprint == plain.manifest.fingerprint == read_manifest(copied).fingerprint
    assert open_dataset(copied, "a").fingerprint == open_dataset(copied, "same").fingerprint
    assert len({open_dataset(copied, name).fingerprint for name in ("stored", "a", "other")}) == 3


def test_a_split_is_a_function_of_its_seed(copied):
    dataset = open_dataset(copied)
    assert make_split(dataset, THIRDS, "a") == make_split(dataset, THIRDS, "a")
    assert len({make_split(dataset, dataclasses.replace(THIRDS, seed=s), "a").assignment for s in range(8)}) > 2


def test_counts_leave_volumes_unused(dataset_of):
    dataset = dataset_of(lambda i, p: dataclasses.replace(p, tomogram=f"t{i // 3}", split=""))
    split = make_split(dataset, Recipe("counts", (30, 12, 9)), "few")
    assert [split.assignment.count(letter) for letter in "tve."] == [30, 12, 9, 9]
    store_split(dataset.folder, split)
    used = open_dataset(dataset.folder, "few")
    assert [len(used.rows(name)) for name in ("train", "val", "test")] == [30, 12, 9]
    assert "unused" in split_text(dataset, split, dataset.folder)
    with pytest.raises(DataError, match=r"in the split 'train' \(found no split: 60\); split the dataset"):
        dataset.rows("train")


def test_no_test_split_if_none_is_wanted(copied):
    split = stored(copied, Recipe("fractions", (0.8, 0.2, 0)))
    assert {*split.assignment} == {"t", "v"}


def test_without_tomograms_volumes_are_split_one_by_one_and_that_is_said(dataset_of):
    dataset = dataset_of(lambda i, p: dataclasses.replace(p, tomogram="", position_zyx=None))
    split = make_split(dataset, THIRDS, "loose")
    assert [split.assignment.count(letter) for letter in "tve"] == [36, 12, 12]
    assert len(split.notes) == 1
    assert "the tomogram of all volumes is not known" in split.notes[0]


def test_two_noise_levels_of_a_particle_stay_together(dataset_of):
    def change(i, p):
        name, level = f"q{i // 2}", ("0.05", "inf")[i % 2]
        return dataclasses.replace(p, tomogram="", position_zyx=None, label="a", particle_id=f"{name}_snr{level}")

    split = make_split(dataset_of(change), THIRDS, "pairs")
    assert split.assignment[::2] == split.assignment[1::2]
    assert [split.assignment.count(letter) for letter in "tve"] == [36, 12, 12]


def test_identical_volumes_stay_together_and_are_said(dataset_of, make_particles):
    first = next(make_particles(1)).volume_DHW
    dataset = dataset_of(
        lambda i, p: dataclasses.replace(
            p, tomogram="", position_zyx=None, volume_DHW=first if i in (30, 31, 59) else p.volume_DHW
        )
    )
    split = make_split(dataset, THIRDS, "a")
    assert len({split.assignment[row] for row in (0, 30, 31, 59)}) == 1
    assert any("4 volumes occur more than once, such as 'p0000' and 'p0030'" in note for note in split.notes)


# what cannot be split


def test_a_class_of_too_few_tomograms_is_named(dataset_of):
    def change(i, p):
        label = "rare" if i % 5 in (0, 1) and i % 3 == 0 else "common"
        return dataclasses.replace(p, label=label, split="")

    split = make_split(dataset_of(change), THIRDS, "a")
    assert len(split.notes) == 1
    assert "has no volume of 'rare' (it occurs in 2 tomograms, and every part needs one)." in split.notes[0]
    assert not split.notes[0].startswith("train")


def test_too_few_tomograms_are_refused(dataset_of):
    dataset = dataset_of(lambda i, p: dataclasses.replace(p, tomogram=f"t{i % 2}", split=""))
    with pytest.raises(
        DataError, match=r"2 tomograms cannot be split into 3 parts, as each stands in one only: \w+ wo"
    ):
        make_split(dataset, THIRDS, "a")


def test_a_tomogram_per_class_is_refused(dataset_of):
    dataset = dataset_of(lambda i, p: dataclasses.replace(p, tomogram=f"t{i % 3}", split=""))
    with pytest.raises(DataError, match=r"no volume of '0012' \(it occurs in 1 tomogram, and every part needs one\)"):
        make_split(dataset, THIRDS, "a")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("fractions", (0.6, 0.6, 0.2)), "--fractions 0.6,0.6,0.2: add up to 1.4; they are parts of 1"),
        (Recipe("fractions", (0.6, 0.4)), "--fractions 0.6,0.4: has to be three numbers"),
        (Recipe("fractions", (float("nan"), 0.4, 0.1)), "has to be three numbers"),
        (Recipe("counts", (100, 0, 100)), "has to be three numbers, for train, val and test, of which only test's may"),
        (Recipe("counts", (600, 1, 1)), "--counts 600,1,1: 602 volumes are asked for, .* has 600"),
        (Recipe("folds", folds=2), "--folds 2: has to be 3 .train, val, test. to 10"),
        (Recipe("folds", folds=11), "--folds 11: has to be 3"),
    ],
)
def test_recipes_that_cannot_be_followed(copied, recipe, message):
    with pytest.raises(DataError, match=message):
        make_split(open_dataset(copied), recipe, "a")


@pytest.mark.parametrize("name", ["stored", "", "../up", "a/b", ".hidden", "x" * 65])
def test_names_that_cannot_be(copied, name):
    with pytest.raises(DataError, match=r"--name .* has to be 1 to 64"):
        make_split(open_dataset(copied), THIRDS, name)


def test_recipes_from_the_command_line():
    nothing = {"fractions": None, "counts": None, "folds": None, "seed": 3}
    assert read_recipe(**nothing) == Recipe("fractions", (0.6, 0.2, 0.2), seed=3)
    assert read_recipe(**{**nothing, "counts": "3,2,1"}) == Recipe("counts", (3, 2, 1), seed=3)
    assert read_recipe(**{**nothing, "folds": 5}) == Recipe("folds", folds=5, seed=3)
    assert [recipe.usual_name for recipe in (THIRDS, Recipe("folds", folds=5), Recipe("folds", folds=5, seed=2))] == [
        "seed0",
        "kfold5",
        "kfold5-seed2",
    ]
    with pytest.raises(DataError, match="--counts and --folds: give one of them"):
        read_recipe(**{**nothing, "counts": "1,1,1", "folds": 3})
    with pytest.raises(DataError, match="--fractions 'half': has to be three numbers"):
        read_recipe(**{**nothing, "fractions": "half"})


# names and files


def test_an_unknown_name_is_told_the_names_there_are(copied):
    stored(copied, name="seed0")
    stored(copied, Recipe("folds", folds=5), "kfold5")
    for name in ("sead0", "../seed0", "kfold4/0"):
        with pytest.raises(
            DataError, match=rf"unknown split {name!r}; there are: stored, kfold5/0 to kfold5/4, seed0;"
        ):
            open_dataset(copied, name)
    for name in ("kfold5", "kfold5/5", "kfold5/x", "kfold5/00", "kfold5/", "kfold5/0/0"):
        with pytest.raises(DataError, match=r"is not one of its names: kfold5/0 to kfold5/4"):
            open_dataset(copied, name)
    with pytest.raises(DataError, match="'seed0/0' is not one of its names: seed0"):
        open_dataset(copied, "seed0/0")


def test_a_split_is_not_overwritten(copied):
    first = stored(copied)
    assert store_split(copied, first).name == "new.json"
    other = dataclasses.replace(first, recipe=dataclasses.replace(THIRDS, seed=9))
    with pytest.raises(DataError, match="another split of this name exists already"):
        store_split(copied, other)
    assert list_splits(copied) == (first,)


def change(path, **changes):
    """Change a stored split as one who edits it would, with a checksum that is right if `sha256` is not given."""
    import hashlib

    value = json.loads(path.read_text())
    outer = {name: changes.pop(name) for name in ("sha256", "format_version") if name in changes}
    value["content"].update(changes)
    value["sha256"] = hashlib.sha256(json.dumps(value["content"], sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**value, **outer}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "its checksum does not match"),
        ({"format_version": 2}, "format_version is 2, this studytool reads 1"),
        ({"assignment": "t" * 599}, "was made for other data"),
        ({"assignment": "q" * 600}, "unknown parts"),
        ({"assignment": 5}, "input should be a valid string"),
        ({"extra": 5}, "unexpected"),
        ({"name": "old"}, "is not the split its name says"),
        ({"fingerprint": "0" * 64}, "was made for other data"),
        ({"content": 5}, "unexpected"),
    ],
)
def test_damaged_and_foreign_files_are_refused(copied, changes, message):
    stored(copied)
    path = copied / "splits" / "new.json"
    change(path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(copied, "new")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000, '{"format_version": 1}'])
def test_files_that_are_no_split(copied, text):
    (copied / "splits").mkdir()
    (copied / "splits" / "new.json").write_text(text)
    with pytest.raises(DataError, match=r"new.json: damaged .*; remove it and split anew"):
        read_split(copied, read_manifest(copied), "new")


def test_the_text_tells_the_counts_and_the_use(copied):
    split = make_split(open_dataset(copied), Recipe("folds", folds=5), "k")
    text = split_text(open_dataset(copied), split, copied / "splits" / "k.json")
    assert "ribosome         40      40      40      40      40" in text
    assert f"data: {{path: {copied}, split: k/0}}" in text
