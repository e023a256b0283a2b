from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from studytool.data.leakage import CACHE_NAME, check_leakage, identical_volumes, known_identical, units
from studytool.data.shards import open_dataset, write_dataset
from studytool.errors import DataError


@pytest.fixture
def dataset_of(tmp_path, make_particles):
    """A dataset of ten particles, changed by a function of number and particle."""

    def make(change, count=10):
        changed = (change(number, particle) for number, particle in enumerate(make_particles(count)))
        write_dataset(changed, tmp_path / "d", dtype="float16", provenance={}, volumes_per_shard=100)
        return open_dataset(tmp_path / "d")

    return make


def loose(particle, **changes):
    return dataclasses.replace(particle, **{"tomogram": "", "position_zyx": None, **changes})


def test_a_dataset_by_tomogram_has_no_leak(dataset_folder):
    report = check_leakage(open_dataset(dataset_folder))
    assert (report.groups, report.ungrouped, report.hashed, report.notes) == (5, 0, False, ())


def test_a_tomogram_in_two_splits(dataset_folder):
    dataset = open_dataset(dataset_folder)
    parts = dataset.splits.copy()
    parts[5] = "val"  # of tomogram t0, which is in train
    with pytest.raises(DataError, match="'p0005' in 'val' are of the same tomogram 't0'; split the dataset") as caught:
        check_leakage(dataset, parts=parts)
    assert "\n" not in str(caught.value)
    parts[5] = ""  # in no split, so it leaks nothing
    check_leakage(dataset, parts=parts)


def test_tomograms_of_two_noise_levels_are_one(dataset_of):
    dataset = dataset_of(
        lambda i, p: dataclasses.replace(p, tomogram=f"t7_snr{0.1 if i % 2 else 0.05}", split=("train", "val")[i % 2])
    )
    with pytest.raises(DataError, match="same tomogram 't7_snr0"):
        check_leakage(dataset)


SAME = [
    ("a_snr0.05", "a_snr0.1"),
    ("a-SNR=inf", "a-SNR=0.03"),
    ("snr_0.05/a", "snr_infinity/a"),
    ("a", "a.snr1e-2"),
    ("x_snr0.05_01.mrc", "x_snr0.1_01.mrc"),
]
OTHER = [("a_1", "a_2"), ("snra1", "snrb1"), ("a_snr0.05_1", "a_snr0.05_2"), ("nosnr1x", "nosnr2x")]


def pair(dataset_of, one, other, **changes):
    def change(i, p):
        new = loose(p, split=("train", "test")[i % 2], label="same", **changes)
        return dataclasses.replace(new, particle_id=(one, other)[i]) if i < 2 else new

    return dataset_of(change)


@pytest.mark.parametrize(("one", "other"), SAME)
def test_a_particle_at_two_noise_levels(dataset_of, one, other):
    dataset = pair(dataset_of, one, other)
    with pytest.raises(DataError, match="are the same particle, at two signal-to-noise ratios"):
        check_leakage(dataset)
    unit = units(dataset, [])
    assert unit[0] == unit[1]
    assert len(set(unit.tolist())) == 9


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_other_particles(dataset_of, one, other):
    dataset = pair(dataset_of, one, other)
    check_leakage(dataset)
    assert len(set(units(dataset, []).tolist())) == 10


def test_the_same_number_in_another_class_is_another_particle(dataset_of):
    names = ("1_snr0.1", "1_snr0.2")
    dataset = dataset_of(
        lambda i, p: loose(p, split=("train", "test")[i % 2], particle_id=names[i] if i < 2 else p.particle_id)
    )
    assert dataset.labels[0] != dataset.labels[1]
    check_leakage(dataset)


def test_overlapping_boxes_where_no_tomogram_is_known(dataset_of):
    """Boxes of 6 voxels: 5.9 apart they overlap, 6 apart they touch; along each axis."""
    places = [(0.0, 0.0, 0.0), (6.0, 0.0, 0.0), (0.0, 6.0, 0.0), (5.9, 5.9, 11.9)]
    splits = ("train", "val", "test", "test")
    dataset = dataset_of(lambda i, p: loose(p, position_zyx=places[i], split=splits[i]), 4)
    check_leakage(dataset)
    dataset.positions_zyx[3] = (5.9, 5.9, 5.9)
    with pytest.raises(DataError, match="'p0003' in 'test' and 'p0000' in 'train' have boxes that overlap"):
        check_leakage(dataset)
    assert len(set(units(dataset, []).tolist())) == 1  # number 3 overlaps all of them
    dataset.splits[:] = "train"
    check_leakage(dataset)


def test_boxes_of_known_tomograms_may_have_the_same_places(dataset_of):
    dataset = dataset_of(lambda i, p: dataclasses.replace(p, position_zyx=(1.0, 2.0, 3.0)))
    check_leakage(dataset)


def test_identical_volumes(dataset_of, make_particles):
    first = next(make_particles(1)).volume_DHW
    dataset = dataset_of(lambda i, p: dataclasses.replace(p, volume_DHW=first) if i in (3, 7, 8) else p)
    found = identical_volumes(dataset)
    assert found == [[0, 3, 7, 8]]
    with pytest.raises(DataError, match=r"'p0003' in 'val' have the same volume, byte for byte"):
        check_leakage(dataset)
    unit = units(dataset, found)
    assert len(set(unit[[0, 5, 3, 8, 7, 2]].tolist())) == 1  # with the tomograms t0, t3 and t2 that they come from
    assert set(unit[[1, 6]].tolist()).isdisjoint(unit[[4, 9, 0]].tolist())


def test_volumes_are_compared_once(dataset_of, monkeypatch):
    dataset = dataset_of(lambda i, p: p)
    assert known_identical(dataset) is None
    assert identical_volumes(dataset) == []
    monkeypatch.setattr(dataset, "gather", None)  # it may not be asked again
    assert identical_volumes(dataset) == []
    assert check_leakage(dataset).hashed
    cache = dataset.folder / "splits" / CACHE_NAME
    cache.write_text(cache.read_text().replace('"identical": []', '"identical": [[1, 2]]'))
    assert known_identical(dataset) is None  # edited
    cache.write_text("{")
    assert known_identical(dataset) is None
    dataset.manifest = dataclasses.replace(dataset.manifest, fingerprint="0" * 64)
    assert known_identical(dataset) is None


def test_what_was_found_of_another_dataset_does_not_count(dataset_of):
    dataset = dataset_of(lambda i, p: p)
    identical_volumes(dataset)
    content = json.loads((dataset.folder / "splits" / CACHE_NAME).read_text())["content"]
    assert content == {"fingerprint": dataset.manifest.fingerprint, "identical": []}
    dataset.manifest = dataclasses.replace(dataset.manifest, fingerprint="0" * 64)
    assert known_identical(dataset) is None


def test_unknown_tomograms_are_said(dataset_of):
    dataset = dataset_of(lambda i, p: loose(p) if i < 4 else p)
    report = check_leakage(dataset)
    assert report.ungrouped == 4
    assert len(report.notes) == 1
    assert "the tomogram of 4 of 10 volumes is not known" in report.notes[0]


def test_a_crowd_without_tomograms_is_refused_rather_than_paired(dataset_of, monkeypatch):
    monkeypatch.setattr("studytool.data.leakage._MAX_PAIRS", 50)
    dataset = dataset_of(lambda i, p: loose(p, position_zyx=(1.0, 1.0, float(i % 2))))
    with pytest.raises(DataError, match="10 volumes have a position but no tomogram"):
        units(dataset, [])


def test_all_rows_are_numbered(dataset_folder):
    unit = units(open_dataset(dataset_folder), [])
    assert np.array_equal(np.unique(unit), np.arange(5))
    assert np.array_equal(unit[:10], unit[5:15])
