from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from studytool.data.info import dataset_info, info_text, nearest_mean_accuracy, volume_statistics
from studytool.data.shards import open_dataset, write_dataset
from studytool.data.splits import Recipe, store_split
from studytool.data.splitting import make_split


@pytest.fixture
def write(tmp_path, make_particles):
    def make(change, count=60, dtype="float32"):
        changed = (change(number, particle) for number, particle in enumerate(make_particles(count)))
        write_dataset(changed, tmp_path / "d", dtype=dtype, provenance={}, volumes_per_shard=100)
        return open_dataset(tmp_path / "d")

    return make


def test_statistics_of_every_volume(dataset_folder, volumes):
    values = volume_statistics(open_dataset(dataset_folder))
    flat = volumes.reshape(600, -1).astype(np.float64)
    expected = np.stack([flat.mean(axis=1), flat.std(axis=1), flat.min(axis=1), flat.max(axis=1)], axis=1)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-7)


def test_statistics_do_not_depend_on_the_chunks(dataset_folder, monkeypatch):
    dataset = open_dataset(dataset_folder)
    whole = volume_statistics(dataset)
    monkeypatch.setattr("studytool.data.scan._CHUNK_BYTES", 7 * dataset.manifest.volume_bytes)
    done = []
    parts = volume_statistics(dataset, on_progress=lambda *progress: done.append(progress))
    np.testing.assert_array_equal(parts, whole)
    assert done[0] == (7, 600)
    assert done[-1] == (600, 600)
    assert len(done) == 86


def test_intensities_of_a_class_are_those_of_all_its_voxels(dataset_folder, volumes):
    info = dataset_info(open_dataset(dataset_folder))
    assert [c.name for c in info.classes] == ["0012", "apoferritin", "ribosome"]
    for first, found in ((2, info.classes[0]), (1, info.classes[1]), (0, info.classes[2])):
        voxels = volumes[first::3].astype(np.float64)
        assert (found.volumes, found.tomograms) == (200, 5)
        assert (found.low, found.high) == (voxels.min(), voxels.max())
        assert found.mean == pytest.approx(voxels.mean(), abs=1e-7)
        assert found.deviation == pytest.approx(voxels.std(), rel=1e-6)


def test_classes_of_other_brightness_are_told_apart(write, make_particles):
    levels = {"ribosome": 0.0, "apoferritin": 3.0, "0012": 6.0}
    noise = next(make_particles(1)).volume_DHW
    dataset = write(lambda i, p: dataclasses.replace(p, volume_DHW=noise + np.float32(levels[p.label])))
    score = dataset_info(dataset).brightness
    assert score is not None
    assert (score.scored, score.balanced_accuracy, score.chance) == ("val", 1.0, 1 / 3)


def test_classes_of_equal_brightness_are_not(dataset_folder):
    """Noise of 600 volumes, 120 of them in val: 1/3 within four standard deviations (0.043)."""
    score = dataset_info(open_dataset(dataset_folder)).brightness
    assert score is not None
    assert score.balanced_accuracy == pytest.approx(1 / 3, abs=0.17)


def test_the_nearest_mean_is_scaled_and_balanced():
    """One feature in thousands, one in thousandths; the second alone tells the classes apart."""
    features = np.array([[1000.0, 0.001], [3100, 0.001], [1000, 0.003], [2900, 0.003], [1900, 0.0012], [2100, 0.0029]])
    labels = np.array([0, 0, 1, 1, 0, 1])
    train, scored = np.arange(4), np.array([4, 5])
    assert nearest_mean_accuracy(features, labels, train, scored) == 1.0
    assert nearest_mean_accuracy(features, np.array([0, 0, 1, 1, 1, 0]), train, scored) == 0.0
    # Of class 0 three of four right, of class 1 the only one wrong: balanced, that is 3/8.
    rows = np.array([[0.0], [1.0], [0.0], [0.1], [0.2], [0.9], [0.3]])
    labels = np.array([0, 1, 0, 0, 0, 0, 1])
    assert nearest_mean_accuracy(rows, labels, np.arange(2), np.arange(2, 7)) == 3 / 8


def test_a_feature_that_never_changes_does_no_harm():
    features = np.array([[5.0, 0.0], [5.0, 1.0], [5.0, 0.1], [5.0, 0.9]])
    assert nearest_mean_accuracy(features, np.array([0, 1, 0, 1]), np.arange(2), np.arange(2, 4)) == 1.0


def test_without_splits_brightness_is_not_judged(write):
    dataset = write(lambda i, p: dataclasses.replace(p, split="", tomogram=""))
    info = dataset_info(dataset)
    assert info.brightness is None
    text = info_text(dataset, info)
    assert "not judged" in text
    assert "note: the tomogram of 60 volumes is not known" in text


def test_all_named_splits_are_listed_and_leaks_in_them_said(dataset_folder, tmp_path, make_particles):
    shutil.copytree(dataset_folder, tmp_path / "d")
    dataset = open_dataset(tmp_path / "d")
    for name, recipe in (("a", Recipe("fractions", (0.6, 0.2, 0.2))), ("k", Recipe("folds", folds=5))):
        store_split(dataset.folder, make_split(dataset, recipe, name))
    info = dataset_info(open_dataset(dataset.folder, "k/2"))
    assert [name for name, _, _ in info.splits] == ["stored", "a", "k/0", "k/1", "k/2", "k/3", "k/4"]
    assert all(counts == {"train": 360, "val": 120, "test": 120} for _, counts, _ in info.splits)
    assert all(leak == "" for _, _, leak in info.splits)
    dataset.tomograms[:] = "t0"
    info = dataset_info(dataset)
    assert all("same tomogram 't0'" in leak for _, _, leak in info.splits)
    text = info_text(dataset, info)
    assert ["stored", "360", "120", "120", "0", "yes"] in [line.split() for line in text.splitlines()]
    assert "leak in split k/3: " in text


def test_the_text_states_what_the_manifest_does(dataset_folder):
    dataset = open_dataset(dataset_folder)
    lines = info_text(dataset, dataset_info(dataset)).splitlines()
    size = sum(path.stat().st_size for path in dataset_folder.glob("*.parquet")) / 1e6
    assert (
        lines[0] == f"{dataset_folder}: 600 volumes of 6 x 6 x 6 voxels of 13.5 Å, float16, {size:.1f} MB in 2 shards"
    )
    assert "3 classes, 5 tomograms" in lines[1]
    assert lines[3].split() == ["class", "volumes", "tomograms", "mean", "deviation", "min", "max"]
    assert lines[4].split()[:3] == ["0012", "200", "5"]
