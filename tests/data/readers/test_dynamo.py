from __future__ import annotations

import pickle

import emfile
import lab
import mrcfile
import numpy as np
import pytest

from studytool.data.readers.dynamo import picks_from_dynamo, recognize
from studytool.data.readers.source import ReadOptions
from studytool.errors import DataError

OPTIONS = ReadOptions()


def volume_of(tag):
    return np.full((4, 4, 4), tag, dtype=np.float32) + np.arange(4, dtype=np.float32)


def write_volumes(folder, tags, ending="em", width=6):
    folder.mkdir(parents=True, exist_ok=True)
    for tag in tags:
        path = folder / f"particle_{tag:0{width}d}.{ending}"
        if ending == "em":
            emfile.write(path, volume_of(tag), overwrite=True)
        else:
            with mrcfile.new(path, overwrite=True) as mrc:
                mrc.set_data(volume_of(tag))
                mrc.voxel_size = 7


def row(tag, shift=(0, 0, 0), tomogram=1, group=1, position=(1, 2, 3), annotation=0, columns=35):
    values = [0] * columns
    values[0:6] = [tag, 1, 1, *shift]
    values[19], values[21], values[22] = tomogram, group, annotation
    values[23:26] = position
    return values


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(" ".join(map(str, values)) + "\n" for values in rows))
    return path


def refused(path, options=OPTIONS, function=recognize):
    return lab.refused(lambda: function(path, options), path)


def test_the_columns(tmp_path):
    """1 tag, 4-6 shift, 20 tomogram, 22 class, 24-26 position; the refined position is coordinate plus shift."""
    rows = [row(7, (0.5, -1, 2), 3, 9, (10, 20, 30)), row(12, tomogram=4, group=0)]
    write_volumes(tmp_path, [7, 12])
    source = pickle.loads(pickle.dumps(recognize(write_table(tmp_path / "crop.tbl", rows), OPTIONS)))
    first, second = source.entries
    assert (first.particle_id, first.label, first.tomogram) == ("7", "class 9", "3")
    assert first.position_zyx == (31.5, 18.5, 10)  # from the centre of the first voxel
    assert (second.particle_id, second.label, second.tomogram) == ("12", "", "4")
    assert second.origin == f"{tmp_path / 'crop.tbl'}, row 2"
    np.testing.assert_array_equal(source.read(second).volume_DHW, volume_of(12))
    assert len(source.notes) == 1
    assert "no ground truth" in source.notes[0]


def test_a_real_table(shared_data, tmp_path):
    table = tmp_path / "t.tbl"
    table.write_bytes((shared_data / "star_fixtures" / "dynamo_t_double.tbl").read_bytes())
    picks = picks_from_dynamo(table, OPTIONS)
    assert len(picks) == 300
    assert (picks[0].particle_id, picks[0].label, picks[0].tomogram) == ("1", "class 9", "1")
    assert picks[0].position_zyx == pytest.approx((163.08 + 2.1043, 114.71 - 3.523, 141.28 + 2.5178))
    assert (picks[0].unit, picks[0].origin) == ("voxel", "outer corner")
    assert len({pick.tomogram for pick in picks}) == 2
    assert len({pick.label for pick in picks}) == 10
    assert "300 of 300 volumes are missing, the first in row 1" in refused(table)
    write_volumes(tmp_path / "particles", [int(pick.particle_id) for pick in picks])
    source = recognize(table, OPTIONS)
    np.testing.assert_array_equal(source.read(source.entries[299]).volume_DHW, volume_of(int(picks[299].particle_id)))


@pytest.mark.parametrize(("folder", "ending"), [(".", "em"), ("particles", "mrc"), ("run1.Particles", "em")])
def test_where_the_volumes_are(tmp_path, folder, ending):
    write_volumes(tmp_path / folder, [1, 2], ending, width=5 if ending == "mrc" else 6)
    source = recognize(write_table(tmp_path / "a.tbl", [row(2), row(1)]), OPTIONS)
    read = source.read(source.entries[0])
    np.testing.assert_array_equal(read.volume_DHW, volume_of(2))
    assert read.voxel_size_angstrom == (7 if ending == "mrc" else None)


def test_the_folder_of_volumes_can_be_told(tmp_path):
    write_volumes(tmp_path / "far/away", [1])
    table = write_table(tmp_path / "a.tbl", [row(1)])
    assert "1 of 1 volumes are missing" in refused(table)
    assert len(recognize(table, ReadOptions(volumes=tmp_path / "far/away")).entries) == 1
    with pytest.raises(DataError, match="is not there"):
        recognize(table, ReadOptions(volumes=tmp_path / "nowhere"))


@pytest.mark.parametrize(("in_table", "read", "notes"), [(7.05, 7.05, 0), (6, 6, 1), (0, 7, 0)])
def test_the_voxel_size_of_the_table(tmp_path, in_table, read, notes):
    write_volumes(tmp_path, [1, 2], "mrc")
    rows = [[*row(tag, columns=36)[:35], in_table] for tag in (1, 2)]
    source = recognize(write_table(tmp_path / "a.tbl", rows), ReadOptions(label="x"))
    assert source.read(source.entries[1]).voxel_size_angstrom == read
    assert len(source.notes) == notes
    assert all("6 Å (2 particles)" in note and "7 Å; the table's is used" in note for note in source.notes)


def test_labels_and_groups_by_column(tmp_path):
    write_volumes(tmp_path, [1, 2])
    table = write_table(tmp_path / "a.tbl", [row(1, annotation=3), row(2, annotation=4)])
    source = recognize(table, ReadOptions(label_column="annotation", group_column="class"))
    assert [(entry.label, entry.tomogram) for entry in source.entries] == [("annotation 3", "1"), ("annotation 4", "1")]
    assert source.notes == ()
    assert recognize(table, ReadOptions(label="ribosome")).entries[0].label == "ribosome"
    assert "did you mean 'annotation'" in refused(table, ReadOptions(label_column="anotation"))


@pytest.mark.parametrize("name", ["a.doc", "indices_column20.doc"])
def test_tomograms_by_name(tmp_path, name):
    (tmp_path / name).write_text("1 tomograms/ts_01.mrc\n2 tomograms/0012.mrc\n")
    table = write_table(tmp_path / "a.tbl", [row(1, tomogram=2), row(2, tomogram=1), row(3, tomogram=5)])
    picks = picks_from_dynamo(table, OPTIONS)
    assert [pick.tomogram for pick in picks] == ["tomograms/0012.mrc", "tomograms/ts_01.mrc", "5"]


def test_no_tomogram(tmp_path):
    write_volumes(tmp_path, [1])
    table = write_table(tmp_path / "a.tbl", [row(1, tomogram=0, group=0)])
    assert any("tomogram" in note for note in recognize(table, OPTIONS).notes)
    assert "row 1: no tomogram" in refused(table, function=picks_from_dynamo)


def test_a_complex_number_beyond_the_coordinates(tmp_path):
    values = row(1)
    values[27] = "0+1.2074e-06i"
    write_volumes(tmp_path, [1])
    assert len(recognize(write_table(tmp_path / "a.tbl", [values]), OPTIONS).entries) == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(1), row(2)[:-1]], "line 2: 34 values, the first row has 35"),
        ([row(1), row(1)], "row 2: the particle '1' stands in row 1 already"),
        ([row(1), row("1.5")], "row 2: the tag (column 1) is 1.5"),
        ([row(1), row("x")], "row 2: the tag (column 1) is 'x'"),
        ([row(1), row(2, position=("nan", 1, 1))], "row 2: x is nan"),
        ([row(1), row(2, group="i")], "row 2: class is 'i'"),
        ([row(1), row(2), row(3)], "2 of 3 volumes are missing, the first in row 2"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, rows, words):
    write_volumes(tmp_path, [1])
    assert words in refused(write_table(tmp_path / "a.tbl", rows))


def test_two_volumes_for_one_tag(tmp_path):
    write_volumes(tmp_path, [1])
    write_volumes(tmp_path, [1], "mrc")
    table = write_table(tmp_path / "a.tbl", [row(1)])
    assert "particle_000001.em and particle_000001.mrc" in refused(table)
    write_volumes(tmp_path / "particles", [1])
    assert "volumes in 2 folders" in refused(table)


def test_a_link_out_of_the_folder(tmp_path):
    write_volumes(tmp_path / "elsewhere", [1])
    table = write_table(tmp_path / "set/a.tbl", [row(1)])
    (tmp_path / "set/particle_000001.em").symlink_to(tmp_path / "elsewhere/particle_000001.em")
    assert "row 1" in refused(table)


def test_a_damaged_volume_is_named_with_its_row(tmp_path):
    write_volumes(tmp_path, [1, 2])
    (tmp_path / "particle_000002.em").write_bytes(b"short")
    source = recognize(write_table(tmp_path / "a.tbl", [row(1), row(2)]), OPTIONS)
    with pytest.raises(DataError, match=r"a.tbl, row 2: .*particle_000002.em: 5 bytes are too few"):
        source.read(source.entries[1])


def test_what_is_no_dynamo_table(tmp_path):
    (tmp_path / "few.tbl").write_text("1 2 3\n")
    (tmp_path / "words.tbl").write_text("word " * 40)
    (tmp_path / "flags.txt").write_text("1 7 7" + " 0" * 40)
    (tmp_path / "binary.tbl").write_bytes(bytes(1000))
    for path in (*tmp_path.iterdir(), tmp_path / "missing.tbl", tmp_path):
        assert recognize(path, OPTIONS) is None
    refused(tmp_path / "few.tbl", function=picks_from_dynamo)
    assert recognize(write_table(tmp_path / "a.tbl", [row(1)]), ReadOptions(tomograms=tmp_path, box=8)) is None
