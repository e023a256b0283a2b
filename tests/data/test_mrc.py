from __future__ import annotations

import bz2
import gzip
import struct
import warnings

import mrcfile
import numpy as np
import pytest
from lab import write_mrc

from studytool.data.readers.mrc import read_mrc
from studytool.errors import DataError

VOLUME = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)


def make(path, volume=VOLUME, voxel_size=13.5, **header):
    return write_mrc(path, volume, voxel_size, **header)


def quietly(path):
    """Read, with any warning as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_mrc(path)


def refused(path):
    with pytest.raises(DataError) as caught:
        read_mrc(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.mrc"


# what is read


def test_volume_is_float32_in_z_y_x_with_its_voxel_size(path):
    mrc = quietly(make(path))
    np.testing.assert_array_equal(mrc.volume_DHW, VOLUME)
    assert mrc.volume_DHW.dtype == np.float32
    assert mrc.voxel_size_angstrom == 13.5
    assert mrc.voxel_size_zyx_angstrom == (13.5, 13.5, 13.5)


@pytest.mark.parametrize("dtype", ["int8", "int16", "float32", "uint16", "float16"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_real_modes_in_both_byte_orders(path, dtype, order):
    mrc = quietly(make(path, VOLUME.astype(np.dtype(dtype).newbyteorder(order))))
    np.testing.assert_array_equal(mrc.volume_DHW, VOLUME)
    assert mrc.volume_DHW.dtype == np.dtype("=f4")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_compressed_files_are_known_by_their_content(path, compress):
    path.write_bytes(compress(make(path).read_bytes()))  # still named .mrc
    np.testing.assert_array_equal(quietly(path).volume_DHW, VOLUME)


@pytest.mark.parametrize("axes", [(1, 2, 3), (3, 1, 2), (2, 1, 3), (3, 2, 1), (0, 0, 0)])
def test_axes_are_put_in_order(path, axes):
    """mapc, mapr, maps say which of x, y, z the columns, rows and sections are."""
    column, row, section = axes if any(axes) else (1, 2, 3)
    stored = np.transpose(VOLUME, [{3: 0, 2: 1, 1: 2}[axis] for axis in (section, row, column)])
    make(path, np.ascontiguousarray(stored), mapc=axes[0], mapr=axes[1], maps=axes[2])
    mrc = quietly(path)
    np.testing.assert_array_equal(mrc.volume_DHW, VOLUME)


def test_a_single_volume_marked_as_a_stack_of_images_is_a_volume(path):
    make(path, ispg=0)
    with mrcfile.open(path) as mrc:
        assert mrc.is_image_stack()
        assert not mrc.is_volume()
    np.testing.assert_array_equal(quietly(path).volume_DHW, VOLUME)


def test_extended_header_is_stepped_over(path):
    with mrcfile.new(path) as mrc:
        mrc.set_data(VOLUME)
        mrc.set_extended_header(np.zeros(100, dtype="V16"))
    np.testing.assert_array_equal(read_mrc(path).volume_DHW, VOLUME)


@pytest.mark.parametrize("voxel_size", [0, 1.0, (10, 10, 10.4), float("nan")])
def test_a_voxel_size_that_says_nothing_is_none(path, voxel_size):
    assert quietly(make(path, voxel_size=voxel_size)).voxel_size_angstrom is None


def test_unequal_voxel_sizes_are_given_by_axis(path):
    assert quietly(make(path, voxel_size=(3, 2, 1.5))).voxel_size_zyx_angstrom == (1.5, 2, 3)


def test_no_sampling_gives_no_voxel_size(path):
    assert quietly(make(path, mx=0)).voxel_size_zyx_angstrom is None


def test_the_file_is_not_written(path):
    make(path)
    path.chmod(0o444)
    before = path.stat()
    read_mrc(path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


# what is read with a warning that names the file


@pytest.mark.parametrize(
    ("patch", "warning"),
    [
        ({208: b"\0\0\0\0"}, 'a.mrc: the header lacks the id "MAP "'),
        ({212: b"\0\0\0\0"}, "a.mrc: unknown machine stamp 00 00"),
        ({52: struct.pack("<3f", 90, 94.3, 90)}, r"a.mrc: cell angles \[90.0, 94.3, 90.0\]"),
    ],
)
def test_oddities_are_warned_of(path, patch, warning):
    make(path, patch=patch)
    with pytest.warns(UserWarning, match=warning):
        mrc = read_mrc(path)
    np.testing.assert_array_equal(mrc.volume_DHW, VOLUME)


def test_bytes_after_the_volume_are_warned_of(path):
    path.write_bytes(make(path).read_bytes() + b"more")
    with pytest.warns(UserWarning, match=r"a.mrc: 4 bytes after the volume are ignored"):
        mrc = read_mrc(path)
    np.testing.assert_array_equal(mrc.volume_DHW, VOLUME)


def test_unknown_machine_stamp_of_a_big_endian_file(path):
    make(path, VOLUME.astype(">f4"), patch={212: b"\x01\x02"})
    with pytest.warns(UserWarning, match="byte order was guessed"):
        mrc = read_mrc(path)
    np.testing.assert_array_equal(mrc.volume_DHW, VOLUME)


def test_the_stamp_of_eman_is_known(path):
    np.testing.assert_array_equal(quietly(make(path, patch={212: b"\x44\x41\0\0"})).volume_DHW, VOLUME)


# what is refused


@pytest.mark.parametrize(
    ("mode", "words"), [(3, "complex integers"), (4, "Fourier"), (101, "4-bit"), (77, "not an MRC mode")]
)
def test_modes_that_are_no_densities(path, mode, words):
    message = refused(make(path, patch={12: struct.pack("<i", mode)}))
    assert f"mode {mode} " in message
    assert words in message


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({0: struct.pack("<3i", 2000, 2000, 2000)}, "claims 2000 x 2000 x 2000 voxels, that is 32000001024 bytes"),
        ({0: struct.pack("<3i", 2**31 - 1, 2**31 - 1, 2**31 - 1)}, "cut off or damaged"),
        ({0: struct.pack("<i", -6)}, "4 x 5 x -6 voxels"),
        ({0: struct.pack("<i", 0)}, "4 x 5 x 0 voxels"),
        ({92: struct.pack("<i", 10**9)}, "cut off or damaged"),
        ({92: struct.pack("<i", -5)}, "extended header of -5 bytes"),
        ({64: struct.pack("<3i", 1, 1, 2)}, r"mapc, mapr, maps are (1, 1, 2)"),
        ({88: struct.pack("<i", 401)}, "a stack of volumes"),
        ({8: struct.pack("<i", 1)}, "a single image of 5 x 6"),
    ],
)
def test_headers_that_cannot_be_true(path, patch, words):
    assert words in refused(make(path, patch=patch))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of mrcfile, while the test writes the file
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_voxels_that_are_no_numbers(path, bad):
    volume = VOLUME.copy()
    volume[1:3, 2, 2] = bad
    assert "2 of 120 voxels are NaN or infinite" in refused(make(path, volume))


@pytest.mark.parametrize("length", [0, 3, 500, 1024, 1024 + 479])
def test_files_cut_off(path, length):
    path.write_bytes(make(path).read_bytes()[:length])
    refused(path)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_compressed_files_cut_off_or_damaged(path, compress):
    content = compress(make(path).read_bytes())
    for damaged in (content[: len(content) // 2], content[:20], content[:-30] + b"x" * 30):
        path.write_bytes(damaged)
        refused(path)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_a_bomb_is_not_expanded(path, compress):
    """16 MiB of zeros in 16 kB: refused by its header, before the zeros are read."""
    header = make(path).read_bytes()[:1024]
    header = struct.pack("<3i", 256, 128, 128) + header[12:]
    path.write_bytes(compress(header + bytes(256 * 128 * 128 * 4)))
    assert "that cannot be a volume" in refused(path)


def test_a_compressed_file_is_read_no_further_than_its_header_accounts_for(path):
    path.write_bytes(gzip.compress(make(path).read_bytes() + bytes(50_000_000)))
    np.testing.assert_array_equal(read_mrc(path).volume_DHW, VOLUME)


def test_what_is_no_file(tmp_path):
    refused(tmp_path / "missing.mrc")
    (tmp_path / "folder.mrc").mkdir()
    refused(tmp_path / "folder.mrc")
    (tmp_path / "text.mrc").write_text("data_particles\n\nloop_\n" * 100)
    refused(tmp_path / "text.mrc")


# real files


def test_emdb_maps(shared_data):
    folder = shared_data / "mrc_fixtures"
    plain = quietly(folder / "EMD-3197.map")
    assert plain.volume_DHW.shape == (20, 20, 20)
    assert plain.voxel_size_angstrom == pytest.approx(11.4)
    np.testing.assert_array_equal(quietly(folder / "EMD-3197.map.bz2").volume_DHW, plain.volume_DHW)
    np.testing.assert_array_equal(quietly(folder / "emd_3197.map.gz").volume_DHW, plain.volume_DHW)


def test_an_emdb_map_with_turned_axes_and_a_skew_cell(shared_data):
    """EMD-3001: columns are z, rows x, sections y; the header's statistics tell that all was read."""
    path = shared_data / "mrc_fixtures" / "EMD-3001.map"
    with pytest.warns(UserWarning, match=r"EMD-3001.map: cell angles"):
        mrc = read_mrc(path)
    assert mrc.volume_DHW.shape == (73, 25, 43)
    assert mrc.voxel_size_angstrom is None
    assert mrc.voxel_size_zyx_angstrom == pytest.approx((33.03 / 72, 4.71 / 12, 17.93 / 40), abs=1e-4)
    stored = mrcfile.read(path)
    np.testing.assert_array_equal(mrc.volume_DHW, stored.transpose(2, 0, 1))


def test_macromolecules(shared_data):
    paths = sorted((shared_data / "macromolecules_10A").glob("*.mrc"))
    assert len(paths) == 10
    for path in paths:
        mrc = quietly(path)
        assert mrc.voxel_size_angstrom == 10.0
        assert mrc.volume_DHW.max() > 200
