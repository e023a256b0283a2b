from __future__ import annotations

import gzip
import math
import pickle

import mrcfile
import numpy as np
import pytest

from studytool.data.readers import boxes
from studytool.data.readers.boxes import cut_box
from studytool.data.readers.source import ReadOptions
from studytool.data.readers.tomograms import recognize
from studytool.errors import DataError

SHAPE = (20, 24, 28)
BRIGHT = (9, 12, 15)  # z, y, x
BOX = 7


def write_tomogram(path, bright=(BRIGHT,), shape=SHAPE, voxel_size=10.0, dtype=np.float32):
    """Zeros with single bright voxels, 1, 2, … at z, y, x."""
    volume = np.zeros(shape, dtype=dtype)
    for number, place in enumerate(bright, start=1):
        volume[place] = number
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(volume)
        mrc.set_volume()
        mrc.voxel_size = voxel_size
    return path


def options(tomograms, **more):
    return ReadOptions(**{"tomograms": tomograms, "box": BOX, "label": "ribosome", **more})


def write_csv(path, rows, header="x,y,z,tomogram"):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def write_star(path, columns, rows, optics=""):
    head = "".join(f"_{column} #{number}\n" for number, column in enumerate(columns, start=1))
    body = "".join(" ".join(map(str, row)) + "\n" for row in rows)
    path.write_text(f"{optics}\ndata_particles\n\nloop_\n{head}{body}")
    return path


def write_dynamo(path, position_xyz, shift_xyz=(0, 0, 0), columns=35, apix=0):
    values = [0] * columns
    values[0:6] = [1, 1, 1, *shift_xyz]
    values[19], values[21] = 4, 1
    values[23:26] = position_xyz
    if columns > 35:
        values[35] = apix
    path.write_text(" ".join(map(str, values)) + "\n")
    return path


def only_box(source):
    assert len(source.entries) == 1
    return source.read(source.entries[0])


def assert_bright_in_the_middle(source):
    volume = only_box(source).volume_DHW
    assert volume.shape == (BOX,) * 3
    assert volume.dtype == np.float32
    assert np.argwhere(volume).tolist() == [[BOX // 2] * 3]


def refused(path, read_options):
    with pytest.raises(DataError) as caught:
        recognize(path, read_options)
    message = str(caught.value)
    assert "\n" not in message
    return message


OPTICS = """
data_optics

loop_
_rlnOpticsGroup #1
_{column} #2
1 {size}
"""
Z, Y, X = BRIGHT


# where the particle comes to stand


def star_relion3(path):
    columns = ("rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ", "rlnMicrographName")
    return write_star(path, columns, [(X, Y, Z, "tomo_4.mrc")])


def star_relion3_with_shift_in_angstrom(path):
    columns = ("rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ", "rlnMicrographName", "rlnOriginXAngst")
    columns += ("rlnOriginYAngst", "rlnOriginZAngst", "rlnPixelSize")
    return write_star(path, columns, [(X + 2, Y - 1, Z, "tomo_4", 20, -10, 0, 10)])


def star_of_finer_voxels(path):
    columns = ("rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ", "rlnMicrographName", "rlnPixelSize")
    return write_star(path, columns, [(4 * X, 4 * Y, 4 * Z, "tomo_4.tomostar", 2.5)])


def star_relion4(path):
    columns = ("rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ", "rlnTomoName", "rlnOpticsGroup")
    optics = OPTICS.format(column="rlnTomoTiltSeriesPixelSize", size=2.5)
    return write_star(path, columns, [(4 * X, 4 * Y, 4 * Z, "tomo_4", 1)], optics)


def star_relion5(path):
    columns = ("rlnCenteredCoordinateXAngst", "rlnCenteredCoordinateYAngst", "rlnCenteredCoordinateZAngst")
    centred = [(place - side / 2) * 10 for place, side in zip(BRIGHT, SHAPE, strict=True)][::-1]
    return write_star(path, (*columns, "rlnTomoName"), [(*centred, "tomo_4")])


def dynamo_at_the_centre_of_a_voxel(path):
    return write_dynamo(path, (X + 0.5, Y + 0.5, Z + 0.5))


def dynamo_with_shift(path):
    return write_dynamo(path, (X + 1.5, Y - 0.5, Z + 0.4), (-1, 1, 0.1))


def dynamo_of_finer_voxels(path):
    """The voxel n holds the continuous coordinates n to n + 1, in whichever binning."""
    return write_dynamo(path, (4 * X + 2, 4 * Y + 2, 4 * Z + 2), columns=36, apix=2.5)


def csv_in_voxels(path):
    return write_csv(path, [(X, Y, Z, "tomo_4")])


def csv_in_angstrom(path):
    return write_csv(path, [(10 * X, 10 * Y, 10 * Z, "tomo_4")], "x_angstrom,y_angstrom,z_angstrom,tomogram")


def csv_near_the_voxel(path):
    return write_csv(path, [(X + 0.49, Y - 0.49, Z - 0.5, "tomo_4")])


@pytest.mark.parametrize(
    "table",
    [
        star_relion3,
        star_relion3_with_shift_in_angstrom,
        star_of_finer_voxels,
        star_relion4,
        star_relion5,
        dynamo_at_the_centre_of_a_voxel,
        dynamo_with_shift,
        dynamo_of_finer_voxels,
        csv_in_voxels,
        csv_in_angstrom,
        csv_near_the_voxel,
    ],
)
def test_the_particle_stands_in_the_middle_voxel(table, tmp_path):
    write_tomogram(tmp_path / "tomograms" / "tomo_4.mrc")
    source = recognize(table(tmp_path / "positions.txt"), options(tmp_path / "tomograms"))
    assert_bright_in_the_middle(pickle.loads(pickle.dumps(source)))
    entry = source.entries[0]
    assert entry.position_zyx == pytest.approx(BRIGHT, abs=0.51)
    assert entry.tomogram in ("tomo_4", "tomo_4.mrc", "tomo_4.tomostar", "4")
    assert (entry.label, only_box(source).voxel_size_angstrom) == ("ribosome", 10)
    assert "row 1" in entry.origin
    assert any("--invert" in note for note in source.notes)


@pytest.mark.parametrize("side", [2, 3, 6, 8])
def test_odd_and_even_boxes(side, tmp_path):
    write_tomogram(tmp_path / "t.mrc")
    table = write_csv(tmp_path / "p.csv", [(X, Y, Z)], "x,y,z")
    source = recognize(table, options(tmp_path / "t.mrc", box=side))
    assert np.argwhere(only_box(source).volume_DHW).tolist() == [[side // 2] * 3]
    assert source.entries[0].tomogram == "t"


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float16, ">i2", ">f4"])
def test_types_and_byte_orders(dtype, tmp_path):
    write_tomogram(tmp_path / "t.mrc", dtype=np.dtype(dtype))
    table = write_csv(tmp_path / "p.csv", [(X, Y, Z)], "x,y,z")
    assert_bright_in_the_middle(recognize(table, options(tmp_path / "t.mrc")))


def test_columns_of_the_file_that_are_not_x(tmp_path):
    """mapc, mapr, maps = 3, 1, 2: the fastest axis of the file is z, the slowest y."""
    path = tmp_path / "t.mrc"
    volume = np.zeros(SHAPE, dtype=np.float32)
    volume[BRIGHT] = 1
    with mrcfile.new(path) as mrc:
        mrc.set_data(np.ascontiguousarray(volume.transpose(1, 2, 0)))  # y, x, z
        mrc.header.mapc, mrc.header.mapr, mrc.header.maps = 3, 1, 2
        mrc.voxel_size = 10
    assert_bright_in_the_middle(recognize(write_csv(tmp_path / "p.csv", [(X, Y, Z)], "x,y,z"), options(path)))


def test_only_the_box_is_read(tmp_path, monkeypatch):
    write_tomogram(tmp_path / "t.mrc")
    monkeypatch.setattr(boxes, "read_mrc", None)
    assert_bright_in_the_middle(recognize(write_csv(tmp_path / "p.csv", [(X, Y, Z)], "x,y,z"), options(tmp_path)))


def test_a_compressed_tomogram_is_read_once_and_said_to_be(tmp_path, monkeypatch):
    for number in (1, 2):
        path = write_tomogram(tmp_path / f"t{number}.mrc")
        (tmp_path / f"t{number}.mrc.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    rows = [(X, Y, Z, "t1"), (X, Y, Z, "t2"), (X, Y, Z, "t1"), (X, Y, Z, "t2")]
    source = recognize(write_csv(tmp_path / "p.csv", rows), options(tmp_path))
    assert [entry.tomogram for entry in source.entries] == ["t1", "t1", "t2", "t2"]
    assert any("2 tomograms are compressed" in note for note in source.notes)
    read = []
    whole = boxes.read_mrc
    monkeypatch.setattr(boxes, "read_mrc", lambda path: read.append(path.name) or whole(path))
    for entry in source.entries:
        assert np.argwhere(source.read(entry).volume_DHW).tolist() == [[BOX // 2] * 3]
    assert read == ["t1.mrc.gz", "t2.mrc.gz"]


# the other way round, and the columns of a CSV


def test_tomograms_with_coordinates(tmp_path):
    write_tomogram(tmp_path / "tomograms" / "t.mrc")
    table = write_csv(tmp_path / "p.csv", [(X, Y, Z, "t")])
    for path in (tmp_path / "tomograms", tmp_path / "tomograms" / "t.mrc"):
        assert_bright_in_the_middle(recognize(path, options(None, coordinates=table)))


def test_without_tomograms_or_coordinates_it_is_for_others(tmp_path):
    assert recognize(write_csv(tmp_path / "p.csv", [(X, Y, Z, "t")]), ReadOptions(box=BOX)) is None


def test_labels_ids_and_groups_of_a_csv(tmp_path):
    write_tomogram(tmp_path / "t.mrc")
    table = write_csv(tmp_path / "p.csv", [(X, Y, Z, "a", "0012", "t", 1)], "x,y,z,id,label,tomogram,score")
    source = recognize(table, options(tmp_path, label=None))
    entry = source.entries[0]
    assert (entry.particle_id, entry.label, entry.tomogram) == ("a", "0012", "t")
    assert any("score" in note for note in source.notes)
    table = write_csv(tmp_path / "q.csv", [(X, Y, Z, "big", "t")], "x;y;z;kind;from".replace(";", ","))
    source = recognize(table, options(tmp_path, label=None, label_column="kind", group_column="from"))
    assert (source.entries[0].label, source.entries[0].tomogram) == ("big", "t")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x,y,z\n1,2\n", "row 1: 2 values"),
        ("x,y,z\n1,2,nan\n", "row 1: z is 'nan'"),
        ("x,y,z\n", "no rows"),
        ("x,y,z,x\n1,2,3,4\n", "'x' stands there twice"),
        ("x,y,z,x_angstrom,y_angstrom,z_angstrom\n1,2,3,4,5,6\n", "voxels and in Å"),
        ("x,y,z,id\n1,2,3,a\n1,2,3,a\n", "'a'"),
        ("x,y,z,tomogram\n1,2,3,\n", "row 1: the tomogram is not named"),
        ("a,b\n1,2\n", "not a table of positions"),
        ("1 2 3\n", "not a Dynamo table"),
    ],
)
def test_tables_that_cannot_be_used(content, words, tmp_path):
    write_tomogram(tmp_path / "t.mrc")
    table = tmp_path / "p.csv"
    table.write_text(content)
    message = refused(table, options(tmp_path))
    assert words in message
    assert str(table) in message


def test_class_numbers_are_said_to_be_no_truth(tmp_path):
    write_tomogram(tmp_path / "tomo_4.mrc")
    table = write_dynamo(tmp_path / "p.tbl", (X + 0.5, Y + 0.5, Z + 0.5))
    assert any("no ground truth" in note for note in recognize(table, options(tmp_path, label=None)).notes)
    assert not any("no ground truth" in note for note in recognize(table, options(tmp_path)).notes)


# voxel sizes


@pytest.mark.parametrize("in_header", [0.0, 1.0])
def test_positions_in_angstrom_need_a_voxel_size(in_header, tmp_path):
    path = write_tomogram(tmp_path / "tomo_4.mrc", voxel_size=in_header)
    table = csv_in_angstrom(tmp_path / "p.csv")
    message = refused(table, options(tmp_path))
    assert str(path) in message
    assert "--voxel-size" in message
    source = recognize(table, options(tmp_path, voxel_size_angstrom=10.0))
    assert_bright_in_the_middle(source)
    assert only_box(source).voxel_size_angstrom == 10


def test_the_voxel_size_that_is_given_is_right(tmp_path):
    write_tomogram(tmp_path / "tomo_4.mrc", voxel_size=5)
    assert_bright_in_the_middle(
        recognize(csv_in_angstrom(tmp_path / "p.csv"), options(tmp_path, voxel_size_angstrom=10.0))
    )


def test_positions_that_are_scaled_or_may_have_to_be_are_said(tmp_path):
    write_tomogram(tmp_path / "tomo_4.mrc")
    notes = recognize(star_of_finer_voxels(tmp_path / "p.star"), options(tmp_path)).notes
    assert sum("multiplied by 0.25" in note for note in notes) == 1
    write_tomogram(tmp_path / "tomo_4.mrc", voxel_size=0, shape=(80, 96, 112))
    source = recognize(star_of_finer_voxels(tmp_path / "p.star"), options(tmp_path))
    assert source.entries[0].position_zyx == (4 * Z, 4 * Y, 4 * X)
    assert sum("--voxel-size" in note for note in source.notes) == 1


def test_a_real_warp_table(shared_data, tmp_path):
    """Coordinates in voxels of 5 Å, in a tomogram of 15 Å."""
    table = shared_data / "star_fixtures" / "one_loop.star"
    with mrcfile.new_mmap(tmp_path / "tomo_ts01.mrc_15.00Apx.mrc", (400, 450, 620), mrc_mode=0) as mrc:  # a hole
        mrc.voxel_size = 15
    source = recognize(table, options(tmp_path))
    first = next(entry for entry in source.entries if entry.origin.endswith(", row 1"))
    assert first.position_zyx == pytest.approx((964.5 / 3, 1084.5 / 3, 1572.444 / 3))


# the border


def test_a_third_of_a_box_may_be_outside(tmp_path):
    """Of a box of 7, two voxels at a face; the rest is dropped."""
    write_tomogram(tmp_path / "t.mrc", [(0, 0, 0)])
    rows = [(15, 12, z, f"z{z}") for z in (0, 1, 2, 3, 16, 17, 18, 19)]
    source = recognize(write_csv(tmp_path / "p.csv", rows, "x,y,z,id"), options(tmp_path))
    assert [entry.particle_id for entry in source.entries] == ["z1", "z2", "z3", "z16", "z17", "z18"]
    padded, dropped = source.notes[-3:-1]
    assert padded.startswith("4 boxes")
    assert "(z1, z2, z17, z18)" in padded
    assert dropped.startswith("2 boxes")
    assert "(z0, z19)" in dropped


def test_what_is_outside_is_the_mean_of_what_is_inside():
    volume = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    box = cut_box(volume, (-1, 2, 4), 4)
    inside = volume[0:3, 2:5, 4:6]
    np.testing.assert_array_equal(box[1:4, 0:3, 0:2], inside)
    outside = np.ones((4, 4, 4), dtype=bool)
    outside[1:4, 0:3, 0:2] = False
    assert set(box[outside].tolist()) == {np.float32(inside.mean())}
    assert box.dtype == np.float32
    with pytest.raises(DataError, match="outside"):
        cut_box(volume, (4, 0, 0), 4)


def test_a_tomogram_thinner_than_the_box(tmp_path):
    write_tomogram(tmp_path / "t.mrc", [(2, 12, 15)], shape=(5, 24, 28))
    source = recognize(write_csv(tmp_path / "p.csv", [(15, 12, 2)], "x,y,z"), options(tmp_path, box=8))
    box = only_box(source).volume_DHW
    assert np.unravel_index(box.argmax(), box.shape) == (4, 4, 4)


def test_no_box_inside_asks_whether_the_units_are_right(tmp_path):
    write_tomogram(tmp_path / "tomo_4.mrc")
    message = refused(write_csv(tmp_path / "p.csv", [(1500, 1200, 900, "tomo_4")]), options(tmp_path))
    assert "20 x 24 x 28" in message
    assert "voxel size and binning" in message


@pytest.mark.parametrize(("box", "words"), [(None, "--cut"), (1, "2 to 1024"), (5000, "2 to 1024")])
def test_the_side_is_demanded(box, words, tmp_path):
    write_tomogram(tmp_path / "t.mrc")
    assert words in refused(write_csv(tmp_path / "p.csv", [(X, Y, Z)], "x,y,z"), options(tmp_path, box=box))


# which file a name means


@pytest.mark.parametrize(
    ("name", "files", "meant"),
    [
        ("TS_01", ["TS_01.mrc", "TS_01_bin4.mrc", "TS_011.mrc"], "TS_01.mrc"),
        ("TS_01", ["TS_011.mrc", "TS_01_10.00Apx.mrc", "rec_TS_01_x.mrc"], "TS_01_10.00Apx.mrc"),
        ("TS_01", ["TS_011.mrc", "rec_TS_01.mrc"], "rec_TS_01.mrc"),
        ("a/b/TS_01.mrc", ["TS_01.rec", "TS_02.rec"], "TS_01.rec"),
        ("D:\\x\\TS_01.tomostar", ["TS_01.map", "TS_02.map"], "TS_01.map"),
        ("7", ["tomo_7.mrc", "tomo_17.mrc", "tomo_70.mrc"], "tomo_7.mrc"),
        ("a.b", ["a.b_c.mrc", "axb.mrc"], "a.b_c.mrc"),
    ],
)
def test_the_file_of_a_name(name, files, meant, tmp_path):
    for file in files:
        write_tomogram(tmp_path / "t" / file, [BRIGHT] if file == meant else [])
    assert_bright_in_the_middle(recognize(write_csv(tmp_path / "p.csv", [(X, Y, Z, name)]), options(tmp_path / "t")))


@pytest.mark.parametrize(
    ("names", "files", "words"),
    [
        (["TS_01"], ["TS_01.mrc", "TS_01.rec"], ["any of 2 files", "TS_01.mrc, TS_01.rec"]),
        (["TS_01"], ["TS_01_a.mrc", "TS_01_b.mrc"], ["any of 2 files", "TS_01_a.mrc"]),
        (["TS_01"], ["TS_02.mrc", "TS_011.mrc"], ["no file for it", "TS_02"]),
        (["TS_01", "x/TS_01"], ["TS_01.mrc"], ["both mean"]),
        (["TS_01"], [], ["no tomograms"]),
    ],
)
def test_names_that_are_not_clear(names, files, words, tmp_path):
    (tmp_path / "t").mkdir()
    for file in files:
        write_tomogram(tmp_path / "t" / file)
    table = write_csv(tmp_path / "p.csv", [(X, Y, Z, name) for name in names])
    message = refused(table, options(tmp_path / "t"))
    assert all(word in message for word in words), message


def test_one_file_for_many_names_or_many_files_for_none(tmp_path):
    for name in ("a", "b"):
        write_tomogram(tmp_path / "t" / f"{name}.mrc")
    many = write_csv(tmp_path / "p.csv", [(X, Y, Z, "a"), (X, Y, Z, "b")])
    assert "names 2 tomograms" in refused(many, options(tmp_path / "t" / "a.mrc"))
    none = write_csv(tmp_path / "q.csv", [(X, Y, Z)], "x,y,z")
    assert "names no tomogram" in refused(none, options(tmp_path / "t"))
    assert "not there" in refused(none, options(tmp_path / "missing"))


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    real = write_tomogram(tmp_path / "elsewhere" / "t.mrc")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "t.mrc").symlink_to(real)
    table = write_csv(tmp_path / "p.csv", [(X, Y, Z, "t")])
    assert "--root" in refused(table, options(tmp_path / "t"))
    assert_bright_in_the_middle(recognize(table, options(tmp_path / "t", root=tmp_path)))


# damaged tomograms


def test_a_header_that_claims_too_much(tmp_path):
    path = write_tomogram(tmp_path / "t.mrc")
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(write_csv(tmp_path / "p.csv", [(X, Y, Z, "t")]), options(tmp_path))
    assert str(path) in message
    assert "cut off" in message


def test_a_tomogram_cut_off_later_names_the_particle(tmp_path):
    path = write_tomogram(tmp_path / "t.mrc")
    table = write_csv(tmp_path / "p.csv", [(X, Y, Z, "t")])
    source = recognize(table, options(tmp_path))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"p\.csv, row 1: .*cut off"):
        only_box(source)


def test_an_odd_header_is_told_once_and_nan_stays_for_the_importer(tmp_path):
    path = write_tomogram(tmp_path / "t.mrc", [BRIGHT])
    with mrcfile.mmap(path, mode="r+") as mrc:
        mrc.data[BRIGHT] = math.nan
    content = bytearray(path.read_bytes())
    content[208:212] = b"    "
    path.write_bytes(content)
    source = recognize(write_csv(tmp_path / "p.csv", [(X, Y, Z, "t")]), options(tmp_path))
    assert any("lacks the id" in note for note in source.notes)
    assert np.argwhere(np.isnan(only_box(source).volume_DHW)).tolist() == [[BOX // 2] * 3]
