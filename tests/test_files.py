from __future__ import annotations

import hashlib
import os
import stat

import pytest

from studytool.files import sha256_of, whole_file, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail_half_way():
        with whole_file(path) as temporary:
            temporary.write_text("half of the new")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_rename_leaves_nothing_half_written(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on the system
        write_text(tmp_path / "folder", "a folder cannot be replaced by a file")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_files_get_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "sub" / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "sub" / "a.txt").stat().st_mode) == 0o640


def test_json_refuses_what_json_cannot_say(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_a_folder_of_that_name_is_named_and_stays(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(IsADirectoryError) as caught, whole_file(path):
        raise AssertionError("nothing is written")
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_given_up_is_written_over(tmp_path):
    path, given_up = tmp_path / "a", tmp_path / "old"
    given_up.write_bytes(b"something longer")
    before = given_up.stat().st_ino
    with whole_file(path, over=given_up) as temporary, temporary.open("r+b") as file:
        assert not given_up.exists()
        file.write(b"short")
        file.truncate()
    assert (path.read_bytes(), path.stat().st_ino) == (b"short", before)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
