from __future__ import annotations

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest

from studytool.data.importing import import_dataset
from studytool.data.readers.arrays import recognize
from studytool.data.readers.source import ReadOptions
from studytool.data.shards import open_dataset
from studytool.errors import DataError
from studytool.settings import ImportSettings

NOTHING_SAID = ReadOptions()
VOLUMES = np.random.default_rng(0).standard_normal((7, 3, 4, 5)).astype(np.float32)
NAMES = np.array(["0012", "a", "a", "b", "0012", "b", "a"])


def refused(path, *words, options=NOTHING_SAID):
    with pytest.raises(DataError) as caught:
        read_all(recognize(path, options))
    assert "\n" not in str(caught.value)
    for word in words:
        assert str(word) in str(caught.value)


def read_all(source):
    return np.stack([source.read(entry).volume_DHW for entry in source.entries])


# .npy


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "set.npy", VOLUMES)
    np.save(tmp_path / "set_labels.npy", NAMES)
    return tmp_path / "set.npy"


def test_a_stack_with_labels_beside_it(path):
    source = recognize(path, NOTHING_SAID)
    np.testing.assert_array_equal(read_all(source), VOLUMES)
    assert [e.label for e in source.entries] == NAMES.tolist()
    assert source.entries[3].particle_id == "set/000003"
    assert source.entries[3].origin == f"{path}[3]"
    assert source.read(source.entries[0]).voxel_size_angstrom is None
    assert [note[:11] for note in source.notes] == ["no tomogram"]


@pytest.mark.parametrize("stored", [
    VOLUMES[:, None],
    np.asfortranarray(VOLUMES),
    VOLUMES.astype(">f8"),
    VOLUMES.astype("<f2"),
    (VOLUMES * 50).astype(np.int8),
    (VOLUMES * 50 + 99).astype(np.uint8),
    (VOLUMES > 0),
])  # fmt: skip
def test_shapes_orders_and_types(path, stored):
    np.save(path, stored)
    read = read_all(recognize(path, NOTHING_SAID))
    np.testing.assert_array_equal(read, stored.reshape(VOLUMES.shape).astype(np.float32))
    assert read.dtype == np.float32


@pytest.mark.parametrize("stored", [
    np.arange(7), np.arange(7)[:, None], np.arange(7.0), np.arange(7, dtype=np.uint8),
])  # fmt: skip
def test_integer_labels_become_names_with_a_note(path, stored):
    np.save(path.with_name("set_labels.npy"), stored)
    source = recognize(path, NOTHING_SAID)
    assert [e.label for e in source.entries] == [str(n) for n in range(7)]
    assert any("integers" in note for note in source.notes)


def test_where_labels_are_looked_for(path):
    path.with_name("set_labels.npy").rename(path.with_name("labels.npy"))
    assert recognize(path, NOTHING_SAID).entries[3].label == "b"
    path.with_name("labels.npy").unlink()
    refused(path, "no labels beside it", "set_labels.npy", "labels.csv", "--label")
    assert {e.label for e in recognize(path, ReadOptions(label="x")).entries} == {"x"}
    path.with_name("set.csv").write_text("label,tomogram\n" + "0012,t1\n" * 7)
    source = recognize(path, NOTHING_SAID)
    assert {(e.label, e.tomogram) for e in source.entries} == {("0012", "t1")}
    assert source.notes == ()


def test_labels_that_do_not_fit(path):
    labels = path.with_name("set_labels.npy")
    for wrong, words in (
        (NAMES[:6], "shape [6]"),
        (np.zeros((7, 2), int), "shape [7, 2]"),
        (np.linspace(0, 1, 7), "float64"),
        (np.array([*"abcdefg"], dtype=object), "Python objects"),
    ):
        np.save(labels, wrong)
        refused(path, labels, words)
    labels.unlink()
    table = path.with_name("set_labels.csv")
    table.write_text("label\na\nb\n")
    refused(path, table, "2 rows", "7 volumes")
    table.write_text("kind\n" + "a\n" * 7)
    refused(path, table, "unknown label column 'label'")
    assert recognize(path, ReadOptions(label_column="kind")).entries[0].label == "a"
    table.write_text("label,tomogram\n" + "a\n" * 7)
    refused(path, table, "row 1")


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (VOLUMES[0], "shape [3, 4, 5]"),
        (VOLUMES[:, :0], "shape [7, 0, 4, 5]"),
        (np.zeros((2, 3, 4, 4, 4)), "shape [2, 3, 4, 4, 4]"),
        (VOLUMES.astype(complex), "complex128"),
        (np.array([[[["a"]]]]), "<U1"),
        (np.array([[[[None]]]]), "Python objects"),
    ],
)
def test_arrays_that_are_no_volumes(path, stored, words):
    np.save(path, stored)
    refused(path, path, words)


def header(shape, dtype="<f4"):
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header((1000, 2000, 2000, 2000)), "32000000000"),
        (header((-1, 2, 2, 2)), "shape [-1, 2, 2, 2]"),
        (header((2**62, 2**62, 4, 4)), "cut off"),
        (header("__import__('os').system('true')"), "header"),
        (header((2, 2), "|O"), "Python objects"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "header"),
        (b"\x93NUMPY\x09\x00", "version (9, 0)"),
        (b"\x93NUMPY", "header"),
    ],
)
def test_headers_that_cannot_be_true(path, content, words):
    path.write_bytes(content + bytes(64))
    refused(path, path, words)
    path.with_name("set_labels.npy").write_bytes(content + bytes(64))
    np.save(path, VOLUMES)
    refused(path, "set_labels.npy")


def test_a_file_cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "cut off")


# .npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("volumes", "labels"), [("volumes", "labels"), ("images", "y"), ("X", "label"), ("x", "Y")])
def test_named_arrays(tmp_path, save, volumes, labels):
    save(tmp_path / "set.npz", **{volumes: VOLUMES[:, None], labels: NAMES, "tomograms": [*"ABCABCA"]})
    source = recognize(tmp_path / "set.npz", NOTHING_SAID)
    np.testing.assert_array_equal(read_all(source), VOLUMES)
    assert [(e.label, e.tomogram) for e in source.entries] == list(zip(NAMES.tolist(), "ABCABCA", strict=True))
    again = [source.read(source.entries[number]).volume_DHW for number in (5, 1, 1, 6)]  # backwards too
    np.testing.assert_array_equal(again, VOLUMES[[5, 1, 1, 6]])


def test_a_file_written_anew_is_read_anew(tmp_path):
    for number in range(2):
        np.savez(tmp_path / "set.npz", x=VOLUMES + number, y=NAMES)
        np.testing.assert_array_equal(read_all(recognize(tmp_path / "set.npz", NOTHING_SAID)), VOLUMES + number)


def test_npz_without_labels_or_volumes(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, x=VOLUMES)
    refused(path, "holds no labels", "--label")
    assert {e.label for e in recognize(path, ReadOptions(label="a")).entries} == {"a"}
    np.savez(path, densities=VOLUMES, y=NAMES)
    refused(path, "densities", "volumes, images")
    np.savez(path, x=VOLUMES, y=NAMES[:3])
    refused(path, "y has the shape [3]")
    np.savez(path, x=np.asfortranarray(VOLUMES), y=NAMES)
    refused(path, "Fortran order")
    np.savez(path, x=VOLUMES, y=NAMES.astype(object))
    refused(path, "Python objects")


def medmnist(path, **changes):
    rng = np.random.default_rng(1)
    arrays = {}
    for split, count in (("train", 8), ("val", 3), ("test", 4)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 6, 6, 6), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    arrays.update(changes)
    np.savez_compressed(path, **{name: value for name, value in arrays.items() if value is not None})
    return arrays


def test_medmnist_keeps_its_splits(tmp_path):
    arrays = medmnist(tmp_path / "organ.npz")
    source = recognize(tmp_path / "organ.npz", NOTHING_SAID)
    manifest = import_dataset(
        source, tmp_path / "out", ImportSettings(voxel_size_angstrom=1.0, normalize="none"), workers=1
    )
    assert manifest.split_counts() == {"train": 8, "val": 3, "test": 4}
    dataset = open_dataset(tmp_path / "out")
    volumes = np.zeros((15, 6, 6, 6), np.float16)
    dataset.gather(np.arange(15), volumes)
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(volumes[dataset.splits == split], arrays[f"{split}_images"])
        np.testing.assert_array_equal(dataset.labels[dataset.splits == split], arrays[f"{split}_labels"][:, 0])
    assert any("--voxel-size" in note for note in source.notes)


def test_medmnist_with_parts_missing(tmp_path):
    medmnist(tmp_path / "a.npz", val_images=None, val_labels=None)
    assert {e.split for e in recognize(tmp_path / "a.npz", NOTHING_SAID).entries} == {"train", "test"}
    medmnist(tmp_path / "a.npz", val_labels=None)
    refused(tmp_path / "a.npz", "val_images", "val_labels")
    medmnist(tmp_path / "a.npz", val_labels=np.zeros((3, 14), np.uint8))
    refused(tmp_path / "a.npz", "val_labels has the shape [3, 14]")
    medmnist(tmp_path / "a.npz", train_images=np.zeros((8, 28, 28), np.uint8))
    refused(tmp_path / "a.npz", "shape [8, 28, 28]")


# hostile .npz


def npz(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def as_npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_bombs_and_false_claims(tmp_path):
    labels = as_npy(NAMES)
    zeros = as_npy(np.zeros((7, 100, 100, 100), np.float32))
    refused(npz(tmp_path / "a.npz", {"x": zeros, "y": labels}), "x.npy claims 28000128 bytes in", "compressed ones")
    small = header((7, 1000, 1000, 1000)) + bytes(100)
    refused(npz(tmp_path / "a.npz", {"x": small, "y": labels}), "x.npy", "[7, 1000, 1000, 1000]")
    refused(npz(tmp_path / "a.npz", {"x": as_npy(VOLUMES) + b"more", "y": labels}), "x.npy", "damaged")
    refused(npz(tmp_path / "a.npz", {"x": b"no array", "y": labels}), "header")


def test_damaged_archives(tmp_path):
    path = npz(tmp_path / "a.npz", {"x": as_npy(VOLUMES), "y": as_npy(NAMES)}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[800] ^= 1
    path.write_bytes(content)
    refused(path, path, "damaged")
    path.write_bytes(content[: len(content) // 2])
    refused(path, path)
    content = bytearray(npz(path, {"x": as_npy(VOLUMES), "y": as_npy(NAMES)}).read_bytes())
    content[200:240] = bytes(40)
    path.write_bytes(content)
    refused(path, path)


def test_a_pickle_in_an_npz_is_not_run(tmp_path):
    refused(npz(tmp_path / "a.npz", {"x": pickle.dumps([1]), "y": as_npy(NAMES)}), "header")


def test_what_is_none(tmp_path):
    assert recognize(tmp_path, NOTHING_SAID) is None
    (tmp_path / "a.npz").write_text("volumes")
    assert recognize(tmp_path / "a.npz", NOTHING_SAID) is None
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("data.pkl", b"")
    assert recognize(tmp_path / "b.npz", NOTHING_SAID) is None


# what else people bring


def test_images_with_channels_are_no_volumes(tmp_path):
    np.savez(tmp_path / "a.npz", train_images=np.zeros((4, 28, 28, 3), np.uint8), train_labels=np.zeros((4, 1), int))
    refused(tmp_path / "a.npz", "3 channels, not volumes")


def test_one_label_that_is_no_array(tmp_path):
    np.savez(tmp_path / "a.npz", volumes=VOLUMES, labels=np.array(3))
    refused(tmp_path / "a.npz", "the shape []", "[7]")


def test_arrays_by_other_names(tmp_path):
    np.savez(tmp_path / "a.npz", volumes=VOLUMES, labels=np.arange(7), species=NAMES, session=np.arange(7) // 2)
    source = recognize(tmp_path / "a.npz", ReadOptions(label_column="species", group_column="session"))
    assert [entry.label for entry in source.entries] == NAMES.tolist()
    assert [entry.tomogram for entry in source.entries] == list("0011223")
    refused(tmp_path / "a.npz", "did you mean 'species'", options=ReadOptions(label_column="specie"))
