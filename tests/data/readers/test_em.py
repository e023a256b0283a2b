from __future__ import annotations

import pickle
import struct

import emfile
import numpy as np
import pytest

from studytool.data.importplan import read_checked
from studytool.data.readers.em import read_em, recognize
from studytool.data.readers.source import ReadOptions
from studytool.errors import DataError

OPTIONS = ReadOptions()
VOLUME = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)


def write(path, volume=VOLUME, voxel_size=None, patch=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    emfile.write(path, volume, overwrite=True)
    content = bytearray(path.read_bytes())
    size = {} if voxel_size is None else {120: struct.pack("<i", round(1000 * voxel_size))}  # emfile misplaces it
    for at, value in {**size, **(patch or {})}.items():
        content[at : at + len(value)] = value
    path.write_bytes(content)
    return path


def refused(path):
    with pytest.raises(DataError) as caught:
        read_em(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "float32", "float64"])
def test_a_volume_in_z_y_x(tmp_path, dtype):
    volume = read_em(write(tmp_path / "a.em", VOLUME.astype(dtype))).volume_DHW
    np.testing.assert_array_equal(volume, VOLUME)
    assert volume.dtype == np.float32
    assert volume.flags.writeable
    assert type(volume) is np.ndarray  # not the map of a file


@pytest.mark.parametrize(("written", "read"), [(13.5, 13.5), (None, None), (0, None), (1.0, None), (-3, None)])
def test_voxel_size(tmp_path, written, read):
    assert read_em(write(tmp_path / "a.em", voxel_size=written)).voxel_size_angstrom == read


def test_the_bytes_of_the_header(tmp_path):
    """A file by hand, since the library that reads it has written the others."""
    header = bytes([6, 0, 0, 5]) + struct.pack("<3i", 6, 5, 4) + b"comment".ljust(80) + struct.pack("<40i", *range(40))
    header = bytearray(header.ljust(512, b"\0"))
    header[120:124] = struct.pack("<i", 2620)
    (tmp_path / "a").write_bytes(bytes(header) + VOLUME.astype("<f4").tobytes())
    read = read_em(tmp_path / "a")
    np.testing.assert_array_equal(read.volume_DHW, VOLUME)
    assert read.voxel_size_angstrom == 2.62
    assert recognize(tmp_path / "a", OPTIONS).kind == "EM file"  # by content


def test_bytes_after_the_volume_are_not_taken_for_voxels(tmp_path):
    path = write(tmp_path / "a.em")
    path.write_bytes(path.read_bytes() + b"more")
    np.testing.assert_array_equal(read_em(path).volume_DHW, VOLUME)


def test_a_folder_per_class(tmp_path):
    for label in ("0012", "ribosome"):
        write(tmp_path / label / "1.em", VOLUME + len(label))
    (tmp_path / "ribosome" / "notes.txt").write_text("none")
    source = pickle.loads(pickle.dumps(recognize(tmp_path, OPTIONS)))
    assert [(e.particle_id, e.label, e.tomogram) for e in source.entries] == [
        ("0012/1", "0012", ""),
        ("ribosome/1", "ribosome", ""),
    ]
    np.testing.assert_array_equal(source.read(source.entries[1]).volume_DHW, VOLUME + 8)
    assert any("tomogram" in note for note in source.notes)
    assert any("1 files" in note for note in source.notes)


def test_a_folder_of_one_class(tmp_path):
    write(tmp_path / "1.em")
    assert recognize(tmp_path, OPTIONS) is None
    (entry,) = recognize(tmp_path, ReadOptions(label="ribosome")).entries
    assert entry.label == "ribosome"


def test_a_link_out_of_the_folder(tmp_path):
    write(tmp_path / "out.em")
    (tmp_path / "set/a").mkdir(parents=True)
    (tmp_path / "set/a/1.em").symlink_to(tmp_path / "out.em")
    with pytest.raises(DataError, match=r"1.em: a link to .*out.em, outside"):
        recognize(tmp_path / "set", OPTIONS)
    assert len(recognize(tmp_path / "set", ReadOptions(root=tmp_path)).entries) == 1


def test_what_is_no_em_file(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 1000)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "zeros").write_bytes(bytes(5000))
    (tmp_path / "mrc").write_bytes(struct.pack("<4i", 6, 5, 4, 2) + bytes(2000))
    for path in (*tmp_path.iterdir(), tmp_path / "missing", tmp_path):
        assert recognize(path, OPTIONS) is None


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({4: struct.pack("<3i", 3000, 3000, 3000)}, "that is 108000000512 bytes; the file has 992"),
        ({4: struct.pack("<3i", 2**31 - 1, 2**31 - 1, 2**31 - 1)}, "cut off or damaged"),
        ({4: struct.pack("<i", -6)}, "4 x 5 x -6 voxels"),
        ({12: struct.pack("<i", 0)}, "0 x 5 x 6 voxels"),
        ({12: struct.pack("<i", 1)}, "a single image of 5 x 6"),
        ({0: b"\x05"}, "big-endian machine (Mac)"),
        ({0: b"\x4d"}, "the machine byte is 77"),
        ({3: b"\x08"}, "complex"),
        ({3: b"\x07"}, "data type 7"),
        ({3: b"\x09"}, "cut off or damaged"),
    ],
)
def test_headers_that_cannot_be_true(tmp_path, patch, words):
    path = write(tmp_path / "a.em", patch=patch)
    assert words in refused(path)
    assert recognize(path, OPTIONS) is not None  # named .em: reading it says what is wrong


@pytest.mark.parametrize("length", [0, 3, 511, 512, 991])
def test_files_cut_off(tmp_path, length):
    path = write(tmp_path / "a.em")
    path.write_bytes(path.read_bytes()[:length])
    refused(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_voxels_that_are_no_numbers(tmp_path, bad):
    volume = VOLUME.astype(np.float64)
    volume[1:3, 2, 2] = bad
    source = recognize(write(tmp_path / "a.em", volume), OPTIONS)
    with pytest.raises(DataError, match=r"a\.em: 2 of 120 voxels are NaN or infinite"):
        read_checked(source, source.entries[0])


def test_missing(tmp_path):
    refused(tmp_path / "a.em")
