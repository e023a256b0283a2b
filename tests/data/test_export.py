from __future__ import annotations

import dataclasses

import mrcfile
import numpy as np
import pytest
import starfile
from lab import run

from studytool.data.export import export_dataset
from studytool.data.readers.mrc import read_mrc
from studytool.data.shards import open_dataset, write_dataset
from studytool.errors import DataError

TEXTS = ["studytoolLabel", "studytoolSplit", "studytoolId", "rlnMicrographName"]


@pytest.fixture
def dataset_of(tmp_path, make_particles):
    def make(change, count=12):
        changed = (change(number, particle) for number, particle in enumerate(make_particles(count)))
        write_dataset(changed, tmp_path / "d", dtype="float16", provenance={}, volumes_per_shard=7)
        return open_dataset(tmp_path / "d")

    return make


def stored(dataset):
    volumes = np.zeros((len(dataset), *dataset.manifest.shape_dhw), dataset.manifest.dtype)
    dataset.gather(np.arange(len(dataset)), volumes)
    return volumes


def read(folder):
    return starfile.read(folder / "particles.star", parse_as_string=TEXTS)


@pytest.mark.parametrize("half", [False, True])
def test_what_is_exported_is_read_back(dataset_folder, tmp_path, half):
    dataset = open_dataset(dataset_folder)
    done = []
    star = export_dataset(dataset, tmp_path / "out", half=half, on_progress=lambda *counts: done.append(counts))
    assert star == tmp_path / "out" / "particles.star"
    assert done == [(600, 600)]
    table = read(star.parent)
    assert table["studytoolLabel"].tolist() == [dataset.manifest.classes[label] for label in dataset.labels]
    assert table["studytoolId"].tolist() == dataset.particle_ids.tolist()
    assert table["studytoolSplit"].tolist() == dataset.splits.tolist()
    assert table["rlnMicrographName"].tolist() == dataset.tomograms.tolist()
    assert (table["rlnPixelSize"] == 13.5).all()
    for name, volume in list(zip(table["rlnImageName"], stored(dataset), strict=True))[::7]:
        with mrcfile.open(star.parent / name) as file:  # strict: a file that is not as it should be fails
            assert int(file.header.mode) == (12 if half else 2)
            assert file.voxel_size.tolist() == (13.5, 13.5, 13.5)
            assert file.is_volume()
            np.testing.assert_array_equal(file.data.astype(np.float16), volume)
    one = read_mrc(star.parent / table["rlnImageName"][5])
    np.testing.assert_array_equal(one.volume_DHW, stored(dataset)[5].astype(np.float32))
    assert one.voxel_size_angstrom == 13.5
    assert mrcfile.validate(star.parent / table["rlnImageName"][5])
    assert {path.name for path in star.parent.iterdir()} == {"particles.star", "0012", "apoferritin", "ribosome"}
    assert len(list(star.parent.glob("0012/*.mrc"))) == 200


def test_positions_and_noise_levels_where_all_have_them(dataset_of):
    dataset = dataset_of(lambda i, p: dataclasses.replace(p, position_zyx=(i, 20.25, 0.1), snr=0.05 if i else np.inf))
    export_dataset(dataset, dataset.folder.parent / "out")
    table = read(dataset.folder.parent / "out")
    assert table["rlnCoordinateZ"].tolist() == list(range(12))
    assert table["rlnCoordinateY"].tolist() == [20.25] * 12
    assert table["rlnCoordinateX"].tolist() == [0.1] * 12
    assert table["studytoolSnr"].tolist() == [np.inf] + [0.05] * 11


LABELS = (
    "80S ribosome/large",
    "80S_ribosome_large",
    "../../etc",
    "80s RIBOSOME/large",
    "particles.star",
    "Ωmega 'x' #1",
)


def test_names_become_safe_and_stay_different(dataset_of):
    ids = ["../up", "a/b.mrc", "a_b.mrc", "..", "x" * 300, "x" * 300 + "y", "A b", "a b", "#", '"', "t\tab", "é"]
    dataset = dataset_of(lambda i, p: dataclasses.replace(p, label=LABELS[i % 6], particle_id=ids[i], tomogram=""))
    out = dataset.folder.parent / "out"
    export_dataset(dataset, out)
    table = read(out)
    assert "rlnMicrographName" not in table
    names = table["rlnImageName"].tolist()
    assert len({name.lower() for name in names}) == 12
    assert all(len(part) < 120 and part.strip(".") for name in names for part in name.split("/"))
    assert len({name.split("/")[0].lower() for name in names}) == 6
    assert all(name.count("/") == 1 and (out / name).is_file() for name in names)
    for name, volume in zip(names, stored(dataset), strict=True):
        np.testing.assert_array_equal(read_mrc(out / name).volume_DHW, volume.astype(np.float32))
    found = table["studytoolLabel"].tolist()
    assert found[:5] == list(LABELS[:5])
    assert found[5] == "Ωmega _x_ _1"
    assert len(set(table["studytoolId"])) == 12
    assert {path.name for path in out.parent.iterdir()} == {"d", "out"}


def test_some_tomograms_and_splits_are_unknown(dataset_of):
    dataset = dataset_of(
        lambda i, p: dataclasses.replace(p, tomogram="" if i < 6 else "t 1", split="" if i < 6 else "val")
    )
    export_dataset(dataset, dataset.folder.parent / "out")
    table = read(dataset.folder.parent / "out")
    assert table["rlnMicrographName"].tolist() == [""] * 6 + ["t 1"] * 6
    assert table["studytoolSplit"].tolist() == [""] * 6 + ["val"] * 6


def test_an_export_is_imported_as_it_was(dataset_folder, tmp_path):
    star = export_dataset(open_dataset(dataset_folder), tmp_path / "out")
    run(star, tmp_path / "again", normalize="none")
    before, after = open_dataset(dataset_folder), open_dataset(tmp_path / "again")
    for column in ("particle_ids", "labels", "tomograms", "splits"):
        assert getattr(before, column).tolist() == getattr(after, column).tolist()
    assert before.manifest.classes == after.manifest.classes
    assert before.manifest.voxel_size_angstrom == after.manifest.voxel_size_angstrom
    np.testing.assert_array_equal(stored(before), stored(after))


def test_what_is_unknown_stays_unknown_through_export_and_import(dataset_of):
    def change(i, p):
        known = {} if i < 6 else {"tomogram": "t 1", "split": "val"}
        return dataclasses.replace(p, **{"tomogram": "", "split": "", "snr": 0.5, "position_zyx": (i, 1, 2.5), **known})

    dataset = dataset_of(change)
    star = export_dataset(dataset, dataset.folder.parent / "out")
    again = dataset.folder.parent / "again"
    run(star, again)
    after = open_dataset(again)
    for column in ("tomograms", "splits", "snr", "positions_zyx"):
        assert getattr(after, column).tolist() == getattr(dataset, column).tolist()


def test_nothing_stands_there_until_all_is_written(dataset_folder, tmp_path):
    def interrupt(done, total):
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_dataset(open_dataset(dataset_folder), tmp_path / "out", on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(dataset_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        export_dataset(open_dataset(dataset_folder), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
