from __future__ import annotations

import bz2
import gzip

import mrcfile
import numpy as np
import pytest

from studytool.data.readers.folders import recognize
from studytool.data.readers.source import ReadOptions
from studytool.errors import DataError

NOTHING_SAID = ReadOptions()


def volume(number):
    return np.full((3, 4, 5), number, dtype=np.float32)


def write_mrc(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(volume(number))
        mrc.voxel_size = 13.5
    return path


def refused(path, *words, options=NOTHING_SAID):
    with pytest.raises(DataError) as caught:
        recognize(path, options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert str(word) in str(caught.value)


# folders


def test_a_folder_of_files_per_class(tmp_path):
    write_mrc(tmp_path / "0012" / "b.mrc", 1)
    write_mrc(tmp_path / "0012" / "a.rec", 2)
    write_mrc(tmp_path / "26S proteasome" / "c.MAP", 3)
    source = recognize(tmp_path, NOTHING_SAID)
    assert [(e.particle_id, e.label) for e in source.entries] == [
        ("0012/a", "0012"),
        ("0012/b", "0012"),
        ("26S proteasome/c", "26S proteasome"),
    ]
    assert {e.tomogram for e in source.entries} == {""}
    assert "no tomogram is known" in source.notes[0]
    for entry, number in zip(source.entries, (2, 1, 3), strict=True):
        read = source.read(entry)
        np.testing.assert_array_equal(read.volume_DHW, volume(number))
        assert read.voxel_size_angstrom == 13.5
        assert entry.origin == str(entry.where)


def test_files_are_known_by_their_content(tmp_path):
    content = write_mrc(tmp_path / "made.mrc", 7).read_bytes()
    folder = tmp_path / "lab" / "a"
    folder.mkdir(parents=True)
    for name, packed in (("plain", content), ("gz.dat", gzip.compress(content)), ("bz", bz2.compress(content))):
        (folder / name).write_bytes(packed)
    for name, packed in (("x.mrc.gz", gzip.compress(content)), ("y.rec.bz2", bz2.compress(content))):
        (folder / name).write_bytes(packed)
    (folder / "README").write_text("made by hand")
    (folder / "broken.dat").write_bytes(gzip.compress(content)[:30])
    (folder / ".hidden.mrc").write_bytes(content)
    source = recognize(tmp_path / "lab", NOTHING_SAID)
    assert [e.particle_id for e in source.entries] == ["a/bz", "a/gz.dat", "a/plain", "a/x", "a/y"]
    assert all((source.read(entry).volume_DHW == 7).all() for entry in source.entries)
    assert any("2 files that are no MRC files" in note for note in source.notes)


def test_files_beside_the_class_folders_are_left_out_and_said(tmp_path):
    write_mrc(tmp_path / "a" / "p.mrc")
    write_mrc(tmp_path / "mask.mrc")
    source = recognize(tmp_path, NOTHING_SAID)
    assert [e.particle_id for e in source.entries] == ["a/p"]
    assert any("1 MRC files directly in" in note for note in source.notes)


def test_a_flat_folder_needs_a_label(tmp_path):
    write_mrc(tmp_path / "p.mrc")
    assert recognize(tmp_path, NOTHING_SAID) is None
    (entry,) = recognize(tmp_path, ReadOptions(label="ribosome")).entries
    assert (entry.particle_id, entry.label) == ("p", "ribosome")


def test_folders_in_class_folders_are_not_guessed_at(tmp_path):
    write_mrc(tmp_path / "tomo1" / "ribosome" / "p.mrc")
    refused(tmp_path, "two folders below", "path,label,tomogram")


def test_what_is_none(tmp_path):
    assert recognize(tmp_path, NOTHING_SAID) is None
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("x" * 2000)
    assert recognize(tmp_path, NOTHING_SAID) is None
    write_mrc(tmp_path / "a" / "p.mrc")
    assert recognize(tmp_path, ReadOptions(coordinates=tmp_path / "x.csv")) is None


def test_one_file_alone_is_a_volume_or_a_stack_of_the_class_that_is_given(tmp_path):
    path = write_mrc(tmp_path / "p.mrc")
    refused(path, "of which no class is known", "--label", "--coordinates")
    source = recognize(path, ReadOptions(label="a"))
    assert [(e.particle_id, e.label, e.tomogram) for e in source.entries] == [("p", "a", "")]
    one = source.read(source.entries[0]).volume_DHW
    with mrcfile.new(tmp_path / "stack.mrc") as mrc:
        mrc.set_data(np.stack([one + number for number in range(3)]))
        mrc.voxel_size = 7.5
    source = recognize(tmp_path / "stack.mrc", ReadOptions(label="a"))
    assert [e.particle_id for e in source.entries] == [f"stack-{number:06d}" for number in (1, 2, 3)]
    third = source.read(source.entries[2])
    assert third.voxel_size_angstrom == 7.5
    np.testing.assert_array_equal(third.volume_DHW, one + 2)
    assert source.entries[2].origin == f"3@{tmp_path / 'stack.mrc'}"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_out_of_the_folder_are_refused_unless_the_root_says_otherwise(tmp_path, what):
    inside = write_mrc(tmp_path / "lab" / "a" / "p.mrc")
    outside = write_mrc(tmp_path / "other" / "b" / "q.mrc", 5)
    inside.with_name("same.mrc").symlink_to(inside)
    assert len(recognize(tmp_path / "lab", NOTHING_SAID).entries) == 2
    if what == "file":
        inside.with_name("q.mrc").symlink_to(outside)
    else:
        (tmp_path / "lab" / "b").symlink_to(outside.parent)
    refused(tmp_path / "lab", "a link to", outside.parent, "--root")
    assert len(recognize(tmp_path / "lab", ReadOptions(root=tmp_path)).entries) == 3


# CSV


@pytest.fixture
def lab(tmp_path):
    for number in range(3):
        write_mrc(tmp_path / "lab" / "maps" / f"p{number}.mrc", number)
    return tmp_path / "lab"


def table(lab, text, encoding="utf-8"):
    (lab / "list.csv").write_bytes(text.encode(encoding))
    return lab / "list.csv"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_of_paths(lab, separator, encoding):
    text = "path,label,tomogram\nmaps/p0.mrc,0012,t01\nmaps/p1.mrc,1e5,t02\n\nmaps/p2.mrc,0012,007\n"
    source = recognize(table(lab, text.replace(",", separator).replace("\n", "\r\n"), encoding), NOTHING_SAID)
    assert [(e.particle_id, e.label, e.tomogram) for e in source.entries] == [
        ("maps/p0", "0012", "t01"),
        ("maps/p1", "1e5", "t02"),
        ("maps/p2", "0012", "007"),
    ]
    assert (source.read(source.entries[2]).volume_DHW == 2).all()
    assert source.entries[1].origin.endswith("list.csv, row 2)")
    assert source.notes == ()


def test_quoted_names_other_columns_and_windows_paths(lab):
    path = table(lab, 'path,kind,note,run\nmaps\\p0.mrc,"a, b",x,t1\n')
    source = recognize(path, ReadOptions(label_column="kind", group_column="run"))
    (entry,) = source.entries
    assert (entry.label, entry.tomogram) == ("a, b", "t1")
    assert (source.read(entry).volume_DHW == 0).all()
    assert any("note are not used" in note for note in source.notes)
    refused(path, "unknown label column 'kin'", "'kind'", options=ReadOptions(label_column="kin"))


def test_no_tomogram_is_noted_and_one_label_for_all(lab):
    source = recognize(table(lab, "path\nmaps/p0.mrc\nmaps/p1.mrc\n"), ReadOptions(label="virus"))
    assert [e.label for e in source.entries] == ["virus", "virus"]
    assert any("no tomogram is known" in note for note in source.notes)
    assert [e.label for e in recognize(lab / "list.csv", NOTHING_SAID).entries] == ["", ""]


def test_paths_only_under_the_root(lab, tmp_path):
    outside = write_mrc(tmp_path / "secret.mrc")
    refused(table(lab, "path,label\nmaps/p0.mrc,a\n../secret.mrc,a\n"), "row 2", "..")
    refused(table(lab, "path,label\nmaps/../../secret.mrc,a\n"), "row 1", "..")
    refused(table(lab, f"path,label\n{outside},a\n"), "row 1", "outside", "--root")
    (lab / "maps" / "link.mrc").symlink_to(outside)
    refused(table(lab, "path,label\nmaps/link.mrc,a\n"), "row 1", "outside", "--root")
    inside = table(lab, f"path,label\n{lab / 'maps' / 'p1.mrc'},a\n")
    assert len(recognize(inside, NOTHING_SAID).entries) == 1
    moved = table(tmp_path, "path,label\nmaps/p1.mrc,a\n")
    assert len(recognize(moved, ReadOptions(root=lab)).entries) == 1


def test_rows_that_cannot_be_used(lab):
    refused(table(lab, "path,label\nmaps/p0.mrc\n"), "row 1", "1 values", "path, label")
    refused(table(lab, "path,label\nmaps/p0.mrc,a,b\n"), "row 1", "3 values")
    refused(table(lab, "path,label\nmaps/p9.mrc,a\n"), "row 1", "p9.mrc", "missing")
    refused(table(lab, 'path,label\n"maps/p0.mrc,a\n'), "not a CSV")
    refused(table(lab, "path,label\n"), "no rows")
    refused(table(lab, "path,label,path\na,b,c\n"), "'path' stands there 2 times")
    refused(table(lab, "path,label\n" + "x" * 200_000 + ",a\n"), "line 2")


def test_other_tables_are_none(lab):
    assert recognize(table(lab, "x,y,z\n1,2,3\n"), NOTHING_SAID) is None
    assert recognize(table(lab, "\n"), NOTHING_SAID) is None
    assert recognize(table(lab, "data_particles\nloop_\n"), NOTHING_SAID) is None
