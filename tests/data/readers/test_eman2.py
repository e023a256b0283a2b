from __future__ import annotations

import pickle

import h5py
import mrcfile
import numpy as np
import pytest

from studytool.data.readers.eman2 import recognize
from studytool.data.readers.source import ReadOptions
from studytool.errors import DataError

OPTIONS = ReadOptions()


def volume_of(number):
    return np.full((4, 5, 6), number, dtype=np.float32) + np.arange(6, dtype=np.float32)


def write(path, numbers=(0, 1), apix=5.0, attributes=None, **layout):
    """An HDF5 file as EMAN2 writes it; `attributes` is a dict for each image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        images = file.create_group("MDF/images")
        images.attrs["imageid_max"] = max(numbers)
        for place, number in enumerate(numbers):
            image = images.create_group(str(number))
            image.create_dataset("image", data=volume_of(number), **layout)
            for axis in "xyz":
                image.attrs[f"EMAN.apix_{axis}"] = np.float32(apix)
            image.attrs["EMAN.nx"] = 6
            image.attrs["EMAN.origin"] = np.zeros(3)
            for name, value in (attributes or [{}] * len(numbers))[place].items():
                image.attrs[name] = value
    return path


def write_list(path, lines, head="#LSX\n# This file is in fast LST format.\n# 30\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + "".join(f"{line}\n" for line in lines))
    return path


def refused(path, options=OPTIONS, read=None):
    """What is said when the file is listed or, with `read`, when the volume of that entry is read."""
    if read is None:
        with pytest.raises(DataError) as caught:
            recognize(path, options)
    else:
        source = recognize(path, options)
        with pytest.raises(DataError) as caught:
            source.read(source.entries[read])
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def spoiled(path, change):
    """The file with its second image's group changed."""
    write(path)
    with h5py.File(path, "a") as file:
        change(file, file["MDF/images/1"])
    return path


# HDF5


@pytest.mark.parametrize("layout", [{}, {"chunks": (4, 5, 6), "compression": "gzip", "shuffle": True}])
def test_images_with_gaps_in_their_numbers(tmp_path, layout):
    path = write(tmp_path / "a.hdf", (2, 10, 0), **layout)
    source = pickle.loads(pickle.dumps(recognize(path, OPTIONS)))
    assert [entry.particle_id for entry in source.entries] == ["0@a.hdf", "2@a.hdf", "10@a.hdf"]
    assert source.entries[2].origin == f"{path}, image 10"
    read = source.read(source.entries[2])
    np.testing.assert_array_equal(read.volume_DHW, volume_of(10))
    assert read.volume_DHW.dtype == np.float32
    assert read.voxel_size_angstrom == 5
    assert any("tomogram" in note for note in source.notes)


@pytest.mark.parametrize("apix", [1.0, 0, -2, float("nan")])
def test_a_voxel_size_that_says_nothing(tmp_path, apix):
    source = recognize(write(tmp_path / "a.hdf", apix=apix), OPTIONS)
    assert source.read(source.entries[0]).voxel_size_angstrom is None


def test_attributes_are_labels_and_groups(tmp_path):
    attributes = [
        {"EMAN.class_name": "0012", "EMAN.ptcl_source_image": "ts_01.hdf", "EMAN.session": 3},
        {"EMAN.class_name": np.bytes_(b"ribosome"), "EMAN.ptcl_source_image": "ts_02.hdf", "EMAN.session": 4},
    ]
    path = write(tmp_path / "a.hdf", attributes=attributes)
    entries = recognize(path, ReadOptions(label_column="class_name")).entries
    assert [(entry.label, entry.tomogram) for entry in entries] == [("0012", "ts_01.hdf"), ("ribosome", "ts_02.hdf")]
    source = recognize(path, ReadOptions(label="x", group_column="EMAN.session"))
    assert [(entry.label, entry.tomogram) for entry in source.entries] == [("x", "3"), ("x", "4")]
    assert source.notes == ()
    message = refused(path, ReadOptions(label_column="class_nam"))
    assert "image 0" in message
    assert "did you mean 'class_name'" in message
    assert "unknown attribute 'origin'" in refused(path, ReadOptions(label_column="origin"))  # three numbers


def test_a_dataset_that_claims_what_was_never_written(tmp_path):
    def change(file, image):
        del image["image"]
        image.create_dataset("image", shape=(5000, 5000, 5000), dtype="f4", chunks=(64, 64, 64), compression="gzip")

    path = spoiled(tmp_path / "a.hdf", change)
    assert path.stat().st_size < 100_000
    assert "5000 x 5000 x 5000 voxels, that is 500000000000 bytes, of which 0 are stored" in refused(path, read=1)


def test_a_dataset_that_claims_far_more_than_is_stored(tmp_path):
    def change(file, image):
        del image["image"]
        data = image.create_dataset("image", shape=(2000, 2000, 2000), dtype="f4", chunks=(16, 16, 16))
        data[:16, :16, :16] = 1

    assert "of which 16384 are stored" in refused(spoiled(tmp_path / "a.hdf", change), read=1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros((5, 6), dtype="f4"), "an array of 5 x 6, not a volume"),
        (np.zeros((1, 5, 6), dtype="f4"), "an array of 1 x 5 x 6, not a volume"),
        (np.zeros((4, 5, 6), dtype="c8"), "real numbers"),
        (np.full((4, 5, 6), b"text"), "real numbers"),
    ],
)
def test_datasets_that_are_no_volumes(tmp_path, data, words):
    def change(file, image):
        del image["image"]
        image["image"] = data

    message = refused(spoiled(tmp_path / "a.hdf", change), read=1)
    assert words in message
    assert "image 1" in message


def test_objects_are_not_read(tmp_path):
    def change(file, image):
        del image["image"]
        image.create_dataset("image", shape=(4, 5, 6), dtype=h5py.string_dtype())

    assert "real numbers" in refused(spoiled(tmp_path / "a.hdf", change), read=1)


@pytest.mark.parametrize(
    "link", [h5py.ExternalLink("out.hdf", "/MDF/images/0/image"), h5py.SoftLink("/MDF/images/0/image")]
)
def test_links_are_not_followed(tmp_path, link):
    write(tmp_path / "out.hdf")

    def change(file, image):
        del image["image"]
        image["image"] = link

    assert "is a link to elsewhere" in refused(spoiled(tmp_path / "a.hdf", change), read=1)


def test_a_link_in_place_of_all_images(tmp_path):
    write(tmp_path / "out.hdf")
    with h5py.File(tmp_path / "a.hdf", "w") as file:
        file["MDF"] = h5py.ExternalLink("out.hdf", "/MDF")
    assert "MDF in / is a link to elsewhere" in refused(tmp_path / "a.hdf")


def test_values_in_other_files_are_not_read(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(480))

    def external(file, image):
        del image["image"]
        outside = [(str(tmp_path / "secret"), 0, 480)]
        image.create_dataset("image", shape=(4, 5, 6), dtype="f4", external=outside)

    def virtual(file, image):
        del image["image"]
        parts = h5py.VirtualLayout(shape=(4, 5, 6), dtype="f4")
        parts[...] = h5py.VirtualSource(tmp_path / "b.hdf", "MDF/images/0/image", shape=(4, 5, 6))
        image.create_virtual_dataset("image", parts)

    for change in (external, virtual):
        assert "lie in other files" in refused(spoiled(tmp_path / "a.hdf", change), read=1)


def test_missing_parts(tmp_path):
    def no_image(file, image):
        del image["image"]

    def a_number(file, image):
        del file["MDF/images/1"]
        file["MDF/images/1"] = 5

    def nothing(file, image):
        del file["MDF/images/0"], file["MDF/images/1"]

    assert "/MDF/images/1 has no image" in refused(spoiled(tmp_path / "a.hdf", no_image), read=1)
    assert "is no group" in refused(spoiled(tmp_path / "a.hdf", a_number))
    assert "no images" in refused(spoiled(tmp_path / "a.hdf", nothing))


def test_files_cut_off(tmp_path):
    path = write(tmp_path / "a.hdf")
    content = path.read_bytes()
    for length in (len(content) // 2, len(content) - 100, 100):
        path.write_bytes(content[:length])
        assert "cannot be read as HDF5" in refused(path)


def test_what_is_not_of_eman2(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = volume_of(1)
    (tmp_path / "text.lst").write_text("0\ta.hdf\n")
    (tmp_path / "binary.lst").write_bytes(b"#LSX\n" + bytes(100))
    for path in (*tmp_path.iterdir(), tmp_path, tmp_path / "missing.hdf"):
        assert recognize(path, OPTIONS) is None


# lists


def test_a_list_of_images_in_hdf5_and_mrc(tmp_path):
    write(tmp_path / "particles3d/a.hdf", (0, 3))
    with mrcfile.new(tmp_path / "stack.mrcs") as mrc:
        mrc.set_data(np.stack([volume_of(7), volume_of(8)]))
        mrc.voxel_size = 6
    lines = ["3\tparticles3d/a.hdf      ", "1\tstack.mrcs\ta comment"]
    path = write_list(tmp_path / "sets/all.lst", lines)  # the paths count from the project folder
    source = pickle.loads(pickle.dumps(recognize(path, OPTIONS)))
    assert source.kind == "EMAN2 list of images"
    assert [entry.particle_id for entry in source.entries] == ["3@particles3d/a.hdf", "1@stack.mrcs"]
    assert source.entries[0].origin == f"{path}, line 4"
    first, second = (source.read(entry) for entry in source.entries)
    np.testing.assert_array_equal(first.volume_DHW, volume_of(3))
    np.testing.assert_array_equal(second.volume_DHW, volume_of(8))
    assert (first.voxel_size_angstrom, second.voxel_size_angstrom) == (5, 6)


def test_json_in_a_list(tmp_path):
    write(tmp_path / "a.hdf", attributes=[{"EMAN.ptcl_source_image": "ts_01.hdf"}] * 2)
    lines = ['0\ta.hdf\t{"class": "0012", "score": -0.5, "xform": {"a": 1}}', '1\ta.hdf\t{"class": 3}']
    path = write_list(tmp_path / "a.lst", lines, head="#LSX\n# JSON\n# 80\n")
    entries = recognize(path, ReadOptions(label_column="class")).entries
    assert [(entry.label, entry.tomogram) for entry in entries] == [("0012", "ts_01.hdf"), ("3", "ts_01.hdf")]
    assert "line 4" in refused(path, ReadOptions(label_column="xform"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("2\ta.hdf", "line 5: a.hdf has no image 2; it has 2 (from 0)"),
        ("0\tb.hdf", "1 of 2 files are missing, the first in row 2"),
        ("0\t../a.hdf", "row 2: ../a.hdf goes up"),
        ("0\t/etc/hostname", "row 2: /etc/hostname is outside"),
        ("0\ta.hdf", "row 2: the particle '0@a.hdf' stands in row 1 already"),
        ("-1\ta.hdf", "line 5: "),
        ("9" * 5000 + "\ta.hdf", "line 5: "),
        ("a.hdf", "line 5: "),
        ('1\ta.hdf\t{"class": ', "line 5: what follows the file is no JSON"),
        ('1\ta.hdf\t{"a":' + "[" * 50_000, "line 5: what follows the file is no JSON"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, line, words):
    write(tmp_path / "a.hdf")
    assert words in refused(write_list(tmp_path / "a.lst", ["0\ta.hdf", line]))


def test_an_empty_list(tmp_path):
    assert "no images" in refused(write_list(tmp_path / "a.lst", []))


def test_a_list_of_something_else(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    path = write_list(tmp_path / "a.lst", ["0\ta.txt"])
    assert "line 4: " in refused(path)
    assert "4 bytes are too few" in refused(path)
