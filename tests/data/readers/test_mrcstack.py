from __future__ import annotations

import gzip
import struct

import mrcfile
import numpy as np
import pytest

from studytool.data.readers.mrcstack import count_volumes, read_volume_of_stack
from studytool.errors import DataError

VOLUMES = np.arange(3 * 4 * 5 * 6, dtype=np.float32).reshape(3, 4, 5, 6)
CUBES = np.arange(3 * 6 * 6 * 6, dtype=np.float32).reshape(3, 6, 6, 6)


def make(path, volumes=VOLUMES, patch=None):
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(volumes)
        mrc.voxel_size = 13.5
    content = bytearray(path.read_bytes())
    for at, value in (patch or {}).items():
        content[at : at + len(value)] = value
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", ["int8", "<i2", "<f4", ">f4", ">i2"])
def test_each_volume_of_a_stack(tmp_path, dtype):
    path = make(tmp_path / "a.mrcs", VOLUMES.astype(dtype))
    assert count_volumes(path) == 3
    for number in (1, 2, 3):
        mrc = read_volume_of_stack(path, number)
        np.testing.assert_array_equal(mrc.volume_DHW, VOLUMES.astype(dtype)[number - 1])
        assert mrc.voxel_size_angstrom == 13.5


def test_an_extended_header_is_stepped_over(tmp_path):
    with mrcfile.new(tmp_path / "a.mrcs") as mrc:
        mrc.set_data(VOLUMES)
        mrc.set_extended_header(np.zeros(100, dtype="V16"))
    np.testing.assert_array_equal(read_volume_of_stack(tmp_path / "a.mrcs", 2).volume_DHW, VOLUMES[1])


def test_a_file_of_one_volume(tmp_path):
    path = make(tmp_path / "a.mrc", VOLUMES[1])
    assert count_volumes(path) == 1
    np.testing.assert_array_equal(read_volume_of_stack(path, 1).volume_DHW, VOLUMES[1])


@pytest.mark.parametrize(
    ("mz", "space_group", "cell_z", "voxel_size"),
    [(18, 1, 18 * 13.5, 13.5), (18, 0, 18 * 13.5, 13.5), (1, 401, 13.5, 13.5), (0, 401, 81, None)],
)
def test_cubes_without_the_marks_of_a_stack(tmp_path, mz, space_group, cell_z, voxel_size):
    patch = {36: struct.pack("<i", mz), 88: struct.pack("<i", space_group), 48: struct.pack("<f", cell_z)}
    path = make(tmp_path / "a.mrcs", CUBES, patch)
    assert count_volumes(path) == 3
    mrc = read_volume_of_stack(path, 3)
    np.testing.assert_array_equal(mrc.volume_DHW, CUBES[2])
    assert mrc.voxel_size_angstrom == voxel_size


@pytest.mark.parametrize("cell_z", [3e38, float("nan"), float("-inf"), -5])
def test_a_cell_that_cannot_be_gives_no_voxel_size(tmp_path, cell_z):
    path = make(tmp_path / "a.mrcs", patch={48: struct.pack("<f", cell_z)})
    mrc = read_volume_of_stack(path, 2)
    np.testing.assert_array_equal(mrc.volume_DHW, VOLUMES[1])
    assert mrc.voxel_size_angstrom is None


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({36: struct.pack("<i", 1), 88: struct.pack("<i", 0)}, "2D images"),
        ({36: struct.pack("<i", 5)}, "2D images"),
        ({36: struct.pack("<i", -4)}, "2D images"),
        ({0: struct.pack("<3i", 2**31 - 1, 2**31 - 1, 12)}, "cut off or damaged"),
        ({8: struct.pack("<i", 4 * 10**8)}, "claims 100000000 volumes of 4 x 5 x 6"),
        ({8: struct.pack("<i", 0)}, "0 x 5 x 6 voxels"),
        ({12: struct.pack("<i", 4)}, "Fourier"),
    ],
)
def test_headers_that_cannot_be_used(tmp_path, patch, words):
    path = make(tmp_path / "a.mrcs", patch=patch)
    with pytest.raises(DataError) as caught:
        count_volumes(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_used(tmp_path):
    path = make(tmp_path / "a.mrcs")
    content = path.read_bytes()
    path.write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match="expand it first"):
        count_volumes(path)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="cut off"):
        read_volume_of_stack(path, 1)
    path.write_bytes(content)
    for number in (0, 4, -1):
        with pytest.raises(DataError, match="the file holds 3"):
            read_volume_of_stack(path, number)
    with pytest.raises(DataError, match="cannot be read"):
        count_volumes(tmp_path / "missing.mrcs")
