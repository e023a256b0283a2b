from __future__ import annotations

import pickle

import lab
import mrcfile
import numpy as np
import pytest

from studytool.data.readers import tables
from studytool.data.readers.picks import Pick
from studytool.data.readers.source import ReadOptions
from studytool.data.readers.star import picks_from_star, recognize
from studytool.errors import DataError

OPTIONS = ReadOptions()


def volume_of(number, side=6):
    return np.full((side, side, side), number, dtype=np.float32) + np.arange(side, dtype=np.float32)


def write_volume(path, number, voxel_size=13.5, side=6):
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(volume_of(number, side))
        mrc.voxel_size = voxel_size


def write_stack(path, count, side=6, voxel_size=13.5, **header):
    """Volumes 1 … count in one file, marked as MRC2014 has it unless `header` says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(np.stack([volume_of(number, side) for number in range(1, count + 1)]))
        mrc.voxel_size = voxel_size
        for name, value in header.items():
            mrc.header[name] = value


def block(name, columns, rows):
    head = "".join(f"_{column} #{number}\n" for number, column in enumerate(columns, start=1))
    return f"\ndata_{name}\n\nloop_\n{head}" + "".join(" ".join(map(str, row)) + "\n" for row in rows)


def write_star(path, columns, rows, before="", name="particles"):
    path.write_text("# version 30001\n" + before + block(name, columns, rows))
    return path


def three(folder, columns=(), values=((), (), ()), before="", name="particles", voxel_size=13.5):
    """A STAR file of three volumes, with more columns."""
    for number in (1, 2, 3):
        write_volume(folder / f"sub/{number}.mrc", number, voxel_size)
    rows = [(f"sub/{number}.mrc", *more) for number, more in enumerate(values, start=1)]
    return write_star(folder / "p.star", ("rlnImageName", *columns), rows, before, name)


def refused(path, options=OPTIONS, function=recognize):
    return lab.refused(lambda: function(path, options), path)


def size_of(source):
    source = pickle.loads(pickle.dumps(source))  # as for a worker process
    return source.read(source.entries[0]).voxel_size_angstrom


def test_a_volume_or_a_column_twice(tmp_path):
    message = refused(write_star(three(tmp_path), ("rlnImageName",), [("sub/1.mrc",), ("./sub/1.mrc",)]))
    assert "row 2" in message
    assert "row 1 already" in message
    message = refused(write_star(three(tmp_path), ("rlnImageName",) * 2, [("sub/1.mrc", "x")]))
    assert "'rlnImageName' stands there twice" in message


# what is read


@pytest.mark.parametrize("name", ["", "particles", "images"])
def test_single_files_of_relion_3(tmp_path, name):
    columns = ("rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ", "rlnPixelSize")
    values = [("a.mrc", 30, 20, 10, 7), ("a.mrc", 31, 20, 10, 7), ("b.mrc", 1, 2, 3, 7)]
    source = recognize(three(tmp_path, columns, values, name=name, voxel_size=7), OPTIONS)
    assert source.kind == "RELION 3.0, Warp or M STAR file"
    assert [entry.particle_id for entry in source.entries] == ["sub/1.mrc", "sub/2.mrc", "sub/3.mrc"]
    assert [entry.tomogram for entry in source.entries] == ["a.mrc", "a.mrc", "b.mrc"]
    assert [entry.label for entry in source.entries] == ["", "", ""]
    assert source.entries[0].position_zyx == (10, 20, 30)
    assert source.entries[2].origin == f"{tmp_path / 'p.star'}, row 3"
    assert source.notes == ()
    source = pickle.loads(pickle.dumps(source))
    read = source.read(source.entries[1])
    np.testing.assert_array_equal(read.volume_DHW, volume_of(2))
    assert read.voxel_size_angstrom == 7


def test_names_that_look_like_numbers_stay_names(tmp_path):
    write_volume(tmp_path / "0012", 1)
    columns = ("rlnImageName", "rlnTomoName", "species")
    write_star(tmp_path / "p.star", columns, [("0012", "007", "00001")])
    (entry,) = recognize(tmp_path / "p.star", ReadOptions(label_column="species")).entries
    assert (entry.particle_id, entry.tomogram, entry.label) == ("0012", "007", "00001")


@pytest.mark.parametrize("text", ["None", "NA", "null", "1e5", "1_000"])
def test_names_that_other_readers_turn_into_something_else(tmp_path, text):
    path = three(tmp_path, ("species",), [(text,)] * 3)
    assert recognize(path, ReadOptions(label_column="_species")).entries[0].label == text


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"ispg": 1},  # only mz tells
        {"ispg": 1, "mz": 18},  # only the shape tells: cubes
        {"ispg": 401, "mz": 1},
    ],
)
def test_volumes_in_a_stack(tmp_path, header):
    write_stack(tmp_path / "all.mrcs", 3, **header)
    names = [("000003@all.mrcs",), ("1@all.mrcs",)]
    source = recognize(write_star(tmp_path / "p.star", ("rlnImageName",), names), OPTIONS)
    np.testing.assert_array_equal(source.read(source.entries[0]).volume_DHW, volume_of(3))
    np.testing.assert_array_equal(source.read(source.entries[1]).volume_DHW, volume_of(1))


def test_the_voxel_size_of_a_stack_and_of_a_stack_of_one(tmp_path):
    write_stack(tmp_path / "all.mrcs", 3)
    write_volume(tmp_path / "one.mrc", 7)
    source = recognize(write_star(tmp_path / "p.star", ("rlnImageName",), [("2@all.mrcs",), ("1@one.mrc",)]), OPTIONS)
    assert [source.read(entry).voxel_size_angstrom for entry in source.entries] == [13.5, 13.5]
    np.testing.assert_array_equal(source.read(source.entries[1]).volume_DHW, volume_of(7))


def test_volumes_in_a_stack_that_are_no_cubes(tmp_path):
    volumes = np.arange(3 * 4 * 5 * 6, dtype=np.float32).reshape(3, 4, 5, 6)
    with mrcfile.new(tmp_path / "all.mrcs") as mrc:
        mrc.set_data(volumes)
    source = recognize(write_star(tmp_path / "p.star", ("rlnImageName",), [("2@all.mrcs",)]), OPTIONS)
    np.testing.assert_array_equal(source.read(source.entries[0]).volume_DHW, volumes[1])


# voxel sizes


def test_voxel_size_by_detector_and_magnification(tmp_path):
    path = three(tmp_path, ("rlnDetectorPixelSize", "rlnMagnification"), [(5, 10000)] * 3, voxel_size=0)
    assert size_of(recognize(path, OPTIONS)) == 5


def test_voxel_size_by_optics_group(tmp_path):
    columns = ("rlnOpticsGroup", "rlnImagePixelSize", "rlnImageDimensionality")
    optics = block("optics", columns, [(1, 4, 3), (2, 8, 3)])
    path = three(tmp_path, ("rlnOpticsGroup",), [(2,), (1,), (2,)], before=optics, voxel_size=0)
    source = recognize(path, OPTIONS)
    assert source.kind == "RELION 3.1 STAR file"
    assert [source.read(entry).voxel_size_angstrom for entry in source.entries] == [8, 4, 8]


def test_an_optics_group_that_is_not_there(tmp_path):
    optics = block("optics", ("rlnOpticsGroup", "rlnImagePixelSize"), [(1, 4)])
    path = three(tmp_path, ("rlnOpticsGroup",), [(1,), (1,), (7,)], before=optics)
    assert "row 3: optics group 7" in refused(path)


def test_voxel_size_of_the_header_where_the_table_has_none(tmp_path):
    assert size_of(recognize(three(tmp_path), OPTIONS)) == 13.5


def test_no_voxel_size_at_all(tmp_path):
    assert size_of(recognize(three(tmp_path, voxel_size=1.0), OPTIONS)) is None


@pytest.mark.parametrize(("in_header", "notes"), [(13.5, 0), (13.6, 0), (13.7, 1)])
def test_a_table_that_disagrees_with_the_headers(tmp_path, in_header, notes):
    source = recognize(
        three(tmp_path, ("rlnPixelSize", "rlnTomoName"), [(13.5, "t")] * 3, voxel_size=in_header), OPTIONS
    )
    assert len(source.notes) == notes
    assert all("13.5 Å (3 particles)" in note and "the table's is used" in note for note in source.notes)
    assert size_of(source) == 13.5


@pytest.mark.parametrize("size", ["0", "-3", "nan", "wide"])
def test_a_pixel_size_that_cannot_be(tmp_path, size):
    assert "row 2" in refused(three(tmp_path, ("rlnPixelSize",), [(5,), (size,), (5,)]))


# labels and groups


def test_classes_are_labels_with_a_warning(tmp_path):
    source = recognize(three(tmp_path, ("rlnClassNumber",), [(3,), (-999,), (12,)]), OPTIONS)
    assert [entry.label for entry in source.entries] == ["class 3", "", "class 12"]
    assert any("no ground truth" in note for note in source.notes)
    assert any("tomogram" in note for note in source.notes)  # none is named here


def test_a_label_column_and_a_label_go_before_classes(tmp_path):
    path = three(tmp_path, ("rlnClassNumber", "species", "session"), [(1, "x", "s1"), (1, "y", "s1"), (2, "x", "s2")])
    source = recognize(path, ReadOptions(label_column="species", group_column="session"))
    assert [(entry.label, entry.tomogram) for entry in source.entries] == [("x", "s1"), ("y", "s1"), ("x", "s2")]
    assert source.notes == ()
    assert [entry.label for entry in recognize(path, ReadOptions(label="ribosome")).entries] == ["ribosome"] * 3


@pytest.mark.parametrize("option", ["label_column", "group_column"])
def test_a_column_that_is_not_there(tmp_path, option):
    message = refused(three(tmp_path, ("rlnClassNumber",), [(1,)] * 3), ReadOptions(**{option: "rlnClasNumber"}))
    assert "did you mean 'rlnClassNumber'" in message


def test_the_columns_of_an_export(tmp_path):
    columns = ("rlnClassNumber", "rlnMicrographName", "studytoolLabel", "studytoolSplit", "studytoolId", "studytoolSnr")
    rows = [(1, "t1", "x", "train", "p1", 0.1), (1, "t2", "y", '""', "p2", 0.1), (2, "t1", "x", "train", "p3", 0.2)]
    path = three(tmp_path, columns, rows)
    source = recognize(path, OPTIONS)
    found = [(e.particle_id, e.label, e.tomogram, e.split, e.snr) for e in source.entries]
    assert found == [("p1", "x", "t1", "train", 0.1), ("p2", "y", "t2", "", 0.1), ("p3", "x", "t1", "train", 0.2)]
    assert source.notes == ()
    assert recognize(path, ReadOptions(label="ribosome")).entries[0].label == "ribosome"
    assert recognize(path, ReadOptions(label_column="rlnClassNumber")).entries[2].label == "class 2"
    bad = three(tmp_path, columns, [*rows[:2], (2, "t1", "x", "trian", "p3", 0.2)])
    message = refused(bad)
    assert "row 3" in message
    assert "did you mean 'train'" in message


# pseudo-subtomograms, 2D stacks


def test_relion_4_pseudo_subtomograms_are_read_with_a_note(tmp_path):
    columns = ("rlnOpticsGroup", "rlnImagePixelSize", "rlnTomoTiltSeriesPixelSize", "rlnImageDimensionality")
    optics = block("optics", columns, [(1, 4, 2, 3)])
    general = "\ndata_general\n\n_rlnTomoSubTomosAre2DStacks 0\n"
    columns = (
        "rlnTomoName",
        "rlnTomoParticleName",
        "rlnCtfImage",
        "rlnOpticsGroup",
        "rlnCoordinateX",
        "rlnCoordinateY",
    )
    columns = (*columns, "rlnCoordinateZ", "rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst")
    values = [("TS_01", f"TS_01/{number}", "ctf.mrc", 1, 30, 20, 10, 4, 2, 0) for number in range(3)]
    path = three(tmp_path, columns, values, before=general + optics, voxel_size=4)
    source = recognize(path, OPTIONS)
    assert source.kind == "RELION 4 STAR file of pseudo-subtomograms"
    assert len(source.notes) == 1
    assert "CTF" in source.notes[0]
    assert source.entries[1].particle_id == "TS_01/1"
    assert source.entries[1].position_zyx == (20 / 4, 38 / 4, 56 / 4)  # in voxels of the particles: 4 Å, not 2 Å
    np.testing.assert_array_equal(source.read(source.entries[0]).volume_DHW, volume_of(1))
    pick = picks_from_star(path, OPTIONS)[1]
    assert (pick.unit, pick.origin, pick.position_zyx) == ("angstrom", "corner", (20, 38, 56))


def test_relion_5_stacks_of_tilts_are_refused(shared_data):
    message = refused(shared_data / "star_fixtures" / "relion5_class3d_data.star")
    assert "2D tilt images" in message
    assert "--tomograms FOLDER --cut N" in message


def test_two_dimensional_images_are_refused(tmp_path):
    optics = block("optics", ("rlnOpticsGroup", "rlnImagePixelSize", "rlnImageDimensionality"), [(1, 4, 2)])
    assert "2D image" in refused(three(tmp_path, ("rlnOpticsGroup",), [(1,)] * 3, before=optics))


@pytest.mark.parametrize("header", [{"mz": 1, "ispg": 0}, {"mz": 4, "ispg": 0}])
def test_a_stack_of_2d_images_is_refused(tmp_path, header):
    with mrcfile.new(tmp_path / "s.mrcs") as mrc:
        mrc.set_data(np.zeros((30, 4, 6), dtype=np.float32))
        for name, value in header.items():
            mrc.header[name] = value
    assert "2D images" in refused(write_star(tmp_path / "p.star", ("rlnImageName",), [("1@s.mrcs",)]))


# picks


def test_picks_of_relion_5_count_from_the_centre(shared_data):
    path = shared_data / "star_fixtures" / "relion5_class3d_data.star"
    picks = picks_from_star(path, OPTIONS)
    assert len(picks) == 10
    first = picks[0]
    assert (first.particle_id, first.label, first.tomogram) == ("TS_01/2", "class 1", "TS_01")
    assert (first.unit, first.origin) == ("angstrom", "centre")
    assert first.where == f"{path}, row 1"
    # the shift is as long after it has been turned, and near the coordinate
    moved = np.array(first.position_zyx) - (138.065739, -879.58025, 754.828605)
    assert np.linalg.norm(moved) == pytest.approx(np.linalg.norm((-3.75772, 4.342283, -3.75772)), abs=1e-6)


def picks_with(tmp_path, columns, row):
    columns = ("rlnTomoName", *columns)
    return picks_from_star(write_star(tmp_path / "p.star", columns, [("t", *row)]), OPTIONS)[0]


XYZ = ("rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ")
CENTRED = ("rlnCenteredCoordinateXAngst", "rlnCenteredCoordinateYAngst", "rlnCenteredCoordinateZAngst")
ANGST = ("rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginZAngst")
TURNED = ("rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi")


def test_shifts_in_voxels_and_in_angstrom(tmp_path):
    pick = picks_with(tmp_path, (*XYZ, "rlnOriginX", "rlnOriginY", "rlnOriginZ"), (10, 20, 30, 1, 2, -3))
    assert pick == Pick("p-000001", "", "t", (33, 18, 9), "voxel", "corner", f"{tmp_path / 'p.star'}, row 1")
    pick = picks_with(tmp_path, (*XYZ, *ANGST, "rlnPixelSize"), (10, 20, 30, 1, 2, -3, 0.5))
    assert (pick.position_zyx, pick.unit) == ((36, 16, 8), "voxel")
    pick = picks_with(tmp_path, (*CENTRED, *ANGST), (10, -20, 30, 1, 2, -3))
    assert (pick.position_zyx, pick.unit, pick.origin) == ((33, -22, 9), "angstrom", "centre")


@pytest.mark.parametrize(
    ("angles", "shift_zyx"),
    [
        ((0, 0, 0), (3, 2, 1)),
        ((90, 0, 0), (3, -1, 2)),  # RELION's matrix for rot 90: x' = y, y' = -x
        ((0, 90, 0), (1, 2, -3)),  # for tilt 90: x' = -z, z' = x
        ((0, 0, 90), (3, -1, 2)),
        ((90, 90, 0), (2, -1, -3)),  # tilt after rot
    ],
)
def test_shifts_are_turned_as_the_subtomogram_was(tmp_path, angles, shift_zyx):
    pick = picks_with(tmp_path, (*CENTRED, *ANGST, *TURNED), (10, 10, 10, 1, 2, 3, *angles))
    np.testing.assert_allclose(pick.position_zyx, 10 - np.array(shift_zyx), atol=1e-9)


def test_picks_of_warp(shared_data):
    picks = picks_from_star(shared_data / "star_fixtures" / "one_loop.star", OPTIONS)
    assert picks[0].position_zyx == (964.5, 1084.5, 1572.444)
    assert (picks[0].tomogram, picks[0].unit) == ("tomo_ts01.mrc_15.00Apx.mrc", "voxel")


@pytest.mark.parametrize(
    ("columns", "row", "words"),
    [
        (("rlnTomoName", *XYZ, *ANGST), ("t", 1, 2, 3, 1, 1, 1), "add rlnPixelSize"),
        (("rlnTomoName", "rlnClassNumber"), ("t", 1), "no table of particles"),
        (XYZ, (1, 2, 3), "the tomogram is not named"),
        (("rlnTomoName", *XYZ), ('""', 1, 2, 3), "row 1: the tomogram is not named"),
        (("rlnTomoName", *XYZ), ("t", 1, 2, "inf"), "row 1: rlnCoordinateZ is 'inf'"),
    ],
)
def test_picks_that_cannot_be_placed(tmp_path, columns, row, words):
    assert words in refused(write_star(tmp_path / "p.star", columns, [row], name="x"), function=picks_from_star)


# where the files are


@pytest.mark.parametrize("table", ["p.star", "Extract/p.star", "Extract/job013/p.star", "a/b/c/p.star"])
def test_paths_count_from_the_project_folder(tmp_path, table):
    write_volume(tmp_path / "Extract/job013/1.mrc", 1)
    (tmp_path / table).parent.mkdir(parents=True, exist_ok=True)
    path = write_star(tmp_path / table, ("rlnImageName",), [("Extract/job013/1.mrc",)])
    source = recognize(path, OPTIONS)
    np.testing.assert_array_equal(source.read(source.entries[0]).volume_DHW, volume_of(1))


def test_the_root_can_be_told(tmp_path):
    write_volume(tmp_path / "far/sub/1.mrc", 1)
    path = write_star(tmp_path / "p.star", ("rlnImageName",), [("sub/1.mrc",)])
    assert "1 of 1 files are missing" in refused(path)
    assert len(recognize(path, ReadOptions(root=tmp_path / "far")).entries) == 1


def test_windows_paths_are_converted(tmp_path):
    write_volume(tmp_path / "sub/x/1.mrc", 1)
    path = write_star(tmp_path / "p.star", ("rlnImageName",), [(r"sub\x\1.mrc",)])
    assert len(recognize(path, OPTIONS).entries) == 1


def test_a_windows_drive_of_warp(shared_data, tmp_path):
    text = (shared_data / "star_fixtures" / "one_loop.star").read_text()
    path = tmp_path / "one_loop.star"
    path.write_text(text)
    message = refused(path)
    rows = len(picks_from_star(path, OPTIONS))
    assert f"{rows} of {rows} files are missing" in message
    assert "row 1" in message
    for row in range(rows):
        write_volume(tmp_path / f"subtomo/tomo_ts01.mrc/tomo_ts01.mrc_{row:07d}_5.00A.mrc", row, voxel_size=5)
    source = recognize(path, OPTIONS)
    assert any("'WM5984_180924_DCheR_minicells/frames'" in note for note in source.notes)
    read = source.read(source.entries[3])
    np.testing.assert_array_equal(read.volume_DHW, volume_of(3))
    assert read.voxel_size_angstrom == 5
    assert source.entries[3].tomogram == "tomo_ts01.mrc_15.00Apx.mrc"


@pytest.mark.parametrize(
    "name", ["../out.mrc", "sub/../../out.mrc", r"..\out.mrc", "{out}", "link.mrc", "linked/out.mrc"]
)
def test_paths_that_lead_out(tmp_path, name):
    project = tmp_path / "project"
    write_volume(project / "sub/1.mrc", 1)
    write_volume(tmp_path / "out.mrc", 2)
    (project / "link.mrc").symlink_to(tmp_path / "out.mrc")
    (project / "linked").symlink_to(tmp_path)
    rows = [("sub/1.mrc",), (name.format(out=tmp_path / "out.mrc"),)]
    path = write_star(project / "p.star", ("rlnImageName",), rows)
    assert "row 2" in refused(path, ReadOptions(root=project))
    assert "row 2" in refused(path)


def test_absolute_paths_inside_the_root(tmp_path):
    write_volume(tmp_path / "sub/1.mrc", 1)
    path = write_star(tmp_path / "p.star", ("rlnImageName",), [(tmp_path / "sub/1.mrc",)])
    assert len(recognize(path, OPTIONS).entries) == 1


def test_missing_files_are_counted(tmp_path):
    path = three(tmp_path)
    (tmp_path / "sub/2.mrc").unlink()
    (tmp_path / "sub/3.mrc").unlink()
    message = refused(path)
    assert "2 of 3 files are missing, the first in row 2" in message
    assert "sub/2.mrc" in message


def test_a_damaged_volume_is_named_with_its_row(tmp_path):
    path = three(tmp_path)
    (tmp_path / "sub/2.mrc").write_bytes(b"short")
    source = recognize(path, OPTIONS)
    with pytest.raises(DataError, match=r"p.star, row 2: .*2.mrc: 5 bytes are too few"):
        source.read(source.entries[1])


@pytest.mark.parametrize("number", ["0", "4", "9" * 30])
def test_a_number_that_is_not_in_the_stack(tmp_path, number):
    write_stack(tmp_path / "all.mrcs", 3)
    path = write_star(tmp_path / "p.star", ("rlnImageName",), [("1@all.mrcs",), (f"{number}@all.mrcs",)])
    assert "row 2: volume" in refused(path)


def test_a_stack_whose_header_claims_too_much(tmp_path):
    write_stack(tmp_path / "all.mrcs", 3)
    content = bytearray((tmp_path / "all.mrcs").read_bytes())
    content[8:12] = (6 * 10**8).to_bytes(4, "little")
    (tmp_path / "all.mrcs").write_bytes(content)
    message = refused(write_star(tmp_path / "p.star", ("rlnImageName",), [("1@all.mrcs",)]))
    assert "row 1" in message
    assert "claims 100000000 volumes" in message


# what is refused


def test_the_same_particle_twice(tmp_path):
    write_volume(tmp_path / "1.mrc", 1)
    path = write_star(tmp_path / "p.star", ("rlnImageName",), [("1.mrc",), ("1.mrc",)])
    assert "row 2: the particle '1.mrc' stands in row 1 already" in refused(path)


def test_several_tables_in_one_file(shared_data):
    message = refused(shared_data / "star_fixtures" / "relion31_optics.star")
    assert "2 blocks could be the table of particles (data_block_2, data_block_3)" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("data_\nloop_\n_rlnImageName #1000000000\n_rlnX #2\na.mrc\n", "line 5: 1 values, the block has 2 columns"),
        ("data_\nloop_\n" + "".join(f"_c{n}\n" for n in range(2000)), "more than 1000 columns"),
        ("data_\nloop_\n_rlnImageName\na.mrc 1\n", "2 values"),
        ("data_\nloop_\n_rlnImageName\na#1.mrc\n", "'#' inside a name"),
        ("data_\nloop_\n_rlnImageName\n# note\n_rlnTomoName\na.mrc t\n", "comments between the names of columns"),
        ("data_\nloop_\n_rlnTomoName\n_rlnImageName\ndata_1.mrc a.mrc\n", "starts a block"),
        ("data_\nloop_\n_rlnImageName\na.mrc\ndata_\nloop_\n_rlnImageName\nb.mrc\n", "starts a block"),
        ("data_particles\nloop_\n_rlnImageName\n", "lists no particles"),
        ("data_particles\n", "block data_particles is empty"),
        ("data_general\n_x 1\n", "no table of particles"),
        ("data_1ABC\n_cell.length 3\n", "no table of particles"),
        ("data_\nloop_\n_rlnImageName\n'a b\n", "2 values"),
        ("data_\nloop_\n_rlnImageName\n''\n", "row 1: '' is no file name"),
        ("data_\nloop_\n_rlnImageName\n" + "a" * 300 + "\n", "is no file name"),
        ("data_\nloop_\n_rlnImageName\n" + "a/" * 3000 + "\n", "is no file name"),
        ("data_\nloop_\n_rlnImageName\n" + "9" * 5000 + "@a.mrcs\n", "is no file name"),
        ("data_\nloop_\n_rlnCoordinateX\n1\n", "no column rlnImageName"),
        ("data_\nloop_\n_rlnImageName\n" + "a" * 200_000 + "\n", "more than 100000 characters"),
    ],
)
def test_tables_that_are_not_whole(tmp_path, content, words):
    path = tmp_path / "p.star"
    path.write_text(content)
    assert words in refused(path)


def test_text_that_turns_into_something_else(tmp_path):
    path = tmp_path / "p.star"
    path.write_bytes(b"data_\nloop_\n_rlnImageName\n" + b"a.mrc\n" * 30_000 + b"\xff\xfe\n")
    assert "not text" in refused(path)


def test_a_table_too_large_to_be_one(tmp_path, monkeypatch):
    path = three(tmp_path)
    monkeypatch.setattr(tables, "_MAX_BYTES", 50)
    assert "may have 50" in refused(path)


def test_what_is_no_star_file(tmp_path):
    (tmp_path / "a.csv").write_text("path,label\n")
    (tmp_path / "binary.star").write_bytes(b"data_\n\0\0")
    (tmp_path / "prose.star").write_text("data_ is a word\n")
    for path in (tmp_path, tmp_path / "missing.star", *tmp_path.iterdir()):
        assert recognize(path, OPTIONS) is None


def test_cutting_from_tomograms_is_for_another_reader(tmp_path):
    assert recognize(three(tmp_path), ReadOptions(tomograms=tmp_path, box=32)) is None
