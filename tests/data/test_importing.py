"""The import from end to end, with every trap of MRC files on its way through it."""

from __future__ import annotations

import bz2
import errno
import gzip
import os
import pickle
import shutil
import struct
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from lab import KEEP, load, make_lab, plan, refused, run, volume, write_mrc

from studytool import cli
from studytool.data.importing import READERS, recognize
from studytool.data.readers.source import ReadOptions
from studytool.data.shards import verify_dataset


@pytest.fixture
def lab(tmp_path):
    return make_lab(tmp_path / "lab")


# what is imported


def test_volumes_labels_and_ids_come_through(lab, tmp_path):
    manifest = run(lab, tmp_path / "out", **KEEP)
    assert manifest == verify_dataset(tmp_path / "out")
    dataset, volumes, names = load(tmp_path / "out")
    assert manifest.classes == ("0012", "ribosome")
    assert names == ["0012"] * 5 + ["ribosome"] * 5
    for number in range(10):
        np.testing.assert_array_equal(volumes[f"{('ribosome', '0012')[number % 2]}/p{number:02d}"], volume(number))
    assert (manifest.voxel_size_angstrom, manifest.dtype) == (10.0, "float32")
    assert set(dataset.tomograms) == {""}
    assert manifest.provenance["kind"] == "import"
    assert "no tomogram is known" in manifest.provenance["notes"][0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lab", "out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "part-00000.parquet"]


def test_the_default_is_normalized_float16_with_its_error_stated(lab, tmp_path):
    manifest = run(lab, tmp_path / "out")
    _, volumes, _ = load(tmp_path / "out")
    one = volume(3)
    expected = (one - one.mean()) / one.std()
    np.testing.assert_allclose(volumes["0012/p03"], expected, atol=2e-3)
    assert volumes["0012/p03"].dtype == np.float16
    assert 1e-5 < manifest.provenance["float16_error"] < 1e-3


def test_every_setting_reaches_the_volumes(lab, tmp_path):
    manifest = run(lab, tmp_path / "out", box=4, invert=True, transpose="xyz->zyx", voxel_size_angstrom=7.5, **KEEP)
    _, volumes, _ = load(tmp_path / "out")
    np.testing.assert_array_equal(volumes["ribosome/p02"], -volume(2).transpose(2, 1, 0)[1:5, 1:5, 1:5])
    assert manifest.voxel_size_angstrom == 7.5
    assert manifest.provenance["settings"]["transpose"] == "xyz->zyx"


def test_progress_ends_at_the_total(lab, tmp_path):
    told = []
    run(lab, tmp_path / "out", on_progress=lambda *numbers: told.append(numbers))
    assert told[-1] == (10, 10)


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_workers(lab, tmp_path):
    (lab / "0012" / "p01.mrc").write_bytes(b"")
    write_mrc(lab / "0012" / "p01.mrc", volume(1), patch={208: b"\0\0\0\0"})
    alone, together = run(lab, tmp_path / "a", workers=1), run(lab, tmp_path / "b", workers=2)
    assert alone == together
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["manifest.json", "part-00000.parquet"]
    assert together.provenance["oddities"]


# traps of MRC files, through the import


@pytest.mark.parametrize("useless", [0, 1.0])
def test_a_voxel_size_that_says_nothing_is_demanded(lab, tmp_path, useless):
    odd = write_mrc(lab / "0012" / "p01.mrc", volume(1), voxel_size=useless)
    refused(lambda: run(lab, tmp_path / "out"), odd, "voxel size is not known", "--voxel-size")
    assert run(lab, tmp_path / "out", voxel_size_angstrom=12.0).voxel_size_angstrom == 12.0


def test_voxel_sizes_that_disagree_are_refused_with_two_files(lab, tmp_path):
    odd = write_mrc(lab / "ribosome" / "p08.mrc", volume(8), voxel_size=10.2)
    refused(lambda: run(lab, tmp_path / "out"), odd, lab / "0012" / "p01.mrc", "10.2 Å", "10 Å", "--rescale")
    assert run(lab, tmp_path / "a", voxel_size_angstrom=10.0).voxel_size_angstrom == 10.0
    assert run(lab, tmp_path / "b", rescale_to_angstrom=20.0).voxel_size_angstrom == 20.0
    write_mrc(odd, volume(8), voxel_size=10.05)
    assert run(lab, tmp_path / "c").voxel_size_angstrom == 10.0


def test_a_volume_that_the_plan_did_not_look_at_is_held_against_the_first_too(tmp_path):
    for number in range(40):
        write_mrc(tmp_path / "lab" / "a" / f"p{number:02d}.mrc", volume(number), voxel_size=10 + (number == 3))
    assert plan(tmp_path / "lab").looked_at < 40
    refused(lambda: run(tmp_path / "lab", tmp_path / "out"), "p03.mrc", "11 Å", "p00.mrc")
    assert [p.name for p in tmp_path.iterdir()] == ["lab"]


def test_boxes_that_differ(lab, tmp_path):
    odd = write_mrc(lab / "ribosome" / "p08.mrc", volume(8, (6, 6, 8)))
    refused(lambda: run(lab, tmp_path / "out"), odd, "6 x 6 x 8", "6 x 6 x 6", "--box")
    assert run(lab, tmp_path / "out", box=6).shape_dhw == (6, 6, 6)


def test_axes_are_put_in_order(lab, tmp_path):
    """A file whose columns are z, rows x, sections y gives the same volume."""
    stored = np.ascontiguousarray(volume(1).transpose(1, 2, 0))
    write_mrc(lab / "0012" / "p01.mrc", stored, mapc=3, mapr=1, maps=2)
    run(lab, tmp_path / "out", **KEEP)
    np.testing.assert_array_equal(load(tmp_path / "out")[1]["0012/p01"], volume(1))


@pytest.mark.parametrize(
    ("patch", "words"),
    [({208: b"\0\0\0\0"}, 'lacks the id "MAP "'), ({212: b"\1\2\0\0"}, "unknown machine stamp")],
)
def test_odd_headers_are_read_and_named(lab, tmp_path, patch, words):
    for number in (1, 3):
        write_mrc(lab / "0012" / f"p{number:02d}.mrc", volume(number), patch=patch)
    manifest = run(lab, tmp_path / "out", **KEEP)
    (oddity,) = manifest.provenance["oddities"].values()
    assert words in oddity["first"]
    assert oddity["first"].startswith(str(lab / "0012" / "p01.mrc"))
    assert oddity["files"] == 2
    np.testing.assert_array_equal(load(tmp_path / "out")[1]["0012/p03"], volume(3))


def test_a_single_volume_marked_as_images_and_the_stamp_of_eman_are_nothing_odd(lab, tmp_path):
    write_mrc(lab / "0012" / "p01.mrc", volume(1), patch={212: b"\x44\x41\0\0"}, ispg=0)
    assert run(lab, tmp_path / "out", **KEEP).provenance["oddities"] == {}
    np.testing.assert_array_equal(load(tmp_path / "out")[1]["0012/p01"], volume(1))


@pytest.mark.parametrize(("compress", "ending"), [(gzip.compress, ".mrc.gz"), (bz2.compress, ".map.bz2")])
def test_compressed_files(lab, tmp_path, compress, ending):
    plain = lab / "0012" / "p01.mrc"
    plain.with_name("p01" + ending).write_bytes(compress(plain.read_bytes()))
    plain.unlink()
    run(lab, tmp_path / "out", **KEEP)
    np.testing.assert_array_equal(load(tmp_path / "out")[1]["0012/p01"], volume(1))


@pytest.mark.parametrize("mode", [3, 4, 101, 77])
def test_modes_that_are_no_densities(lab, tmp_path, mode):
    odd = write_mrc(lab / "0012" / "p05.mrc", volume(5), patch={12: struct.pack("<i", mode)})
    refused(lambda: run(lab, tmp_path / "out"), odd, f"mode {mode} ")


def test_a_header_that_claims_more_than_the_file_holds(lab, tmp_path):
    odd = write_mrc(lab / "0012" / "p05.mrc", volume(5), patch={0: struct.pack("<3i", 2000, 2000, 2000)})
    refused(lambda: run(lab, tmp_path / "out"), odd, "32000001024 bytes")


def test_a_small_gzip_that_claims_to_be_large(lab, tmp_path):
    head = write_mrc(lab / "0012" / "p05.mrc", volume(5), patch={0: struct.pack("<3i", 256, 128, 128)}).read_bytes()
    (lab / "0012" / "p05.mrc").write_bytes(gzip.compress(head[:1024] + bytes(256 * 128 * 128 * 4)))
    refused(lambda: run(lab, tmp_path / "out"), "p05.mrc", "that cannot be a volume")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of mrcfile, while the test writes the file
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_voxels_that_are_no_numbers(lab, tmp_path, bad):
    broken = volume(5)
    broken[0, 0, :2] = bad
    odd = write_mrc(lab / "0012" / "p05.mrc", broken)
    refused(lambda: run(lab, tmp_path / "out"), odd, "2 of 216 voxels are NaN or infinite")
    assert [p.name for p in tmp_path.iterdir()] == ["lab"]


def test_values_that_float16_cannot_hold(lab, tmp_path):
    odd = write_mrc(lab / "0012" / "p05.mrc", volume(5) + 2000)
    raw = {"normalize": "none"}
    refused(lambda: run(lab, tmp_path / "a", **raw), odd, "float16", "--normalize standard", "--dtype float32")
    write_mrc(odd, volume(5) * 1e6)
    refused(lambda: run(lab, tmp_path / "b", **raw), odd, "float16")
    run(lab, tmp_path / "c", normalize="standard")
    run(lab, tmp_path / "d", normalize="none", dtype="float32")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of mrcfile, while the test writes the file
@pytest.mark.parametrize("scale", [1e-30, 3e37])
def test_values_near_the_limits_of_float32(lab, tmp_path, scale):
    write_mrc(lab / "0012" / "p05.mrc", volume(5) * np.float32(scale))
    run(lab, tmp_path / "out")
    one = load(tmp_path / "out")[1]["0012/p05"].astype(np.float32)
    np.testing.assert_allclose(one, (volume(5) - volume(5).mean()) / volume(5).std(), atol=2e-3)
    if scale > 1:
        refused(lambda: run(lab, tmp_path / "x", normalize="none"), "p05.mrc", "--normalize standard")


def test_a_volume_of_one_value_is_said(lab, tmp_path):
    write_mrc(lab / "0012" / "p05.mrc", np.full((6, 6, 6), 3.5, dtype=np.float32))
    (oddity,) = run(lab, tmp_path / "out").provenance["oddities"].values()
    assert oddity["files"] == 1
    assert "p05.mrc: every voxel has the same value" in oddity["first"]


def test_source_files_are_not_written(lab, tmp_path):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in lab.rglob("*.mrc")}
    for path in before:
        path.chmod(0o444)
    run(lab, tmp_path / "out")
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in lab.rglob("*.mrc")}


def test_real_maps(shared_data, tmp_path):
    """Real densities of several boxes, as one class each; and EMDB maps, plain and compressed, that are one volume."""
    for path in (shared_data / "macromolecules_10A").glob("*.mrc"):
        (tmp_path / "real" / path.stem).mkdir(parents=True)
        shutil.copy(path, tmp_path / "real" / path.stem)
    manifest = run(tmp_path / "real", tmp_path / "a", box=32)
    assert (len(manifest.classes), manifest.shape_dhw, manifest.voxel_size_angstrom) == (10, (32, 32, 32), 10.0)
    for name in ("EMD-3197.map", "EMD-3197.map.bz2", "emd_3197.map.gz"):
        (tmp_path / "emdb" / "map").mkdir(parents=True, exist_ok=True)
        shutil.copy(shared_data / "mrc_fixtures" / name, tmp_path / "emdb" / "map" / f"{len(name)}-{name}")
    assert run(tmp_path / "emdb", tmp_path / "b").voxel_size_angstrom == pytest.approx(11.4)
    first, second, third = load(tmp_path / "b")[1].values()
    assert (first == second).all()
    assert (first == third).all()


# what is not recognized


class Malice:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_are_refused_by_their_content_and_not_run(tmp_path, protocol):
    path = tmp_path / "particles.mrc"
    path.write_bytes(pickle.dumps([Malice(tmp_path / "ran")] * 3, protocol=protocol))
    refused(lambda: recognize(path, ReadOptions()), path, "a Python pickle", "can run code", "numpy.savez")
    path.write_bytes(pickle.dumps({"v": np.zeros((4, 4, 4))}, protocol=protocol))
    refused(lambda: recognize(path, ReadOptions()), path, "a Python pickle")
    assert not (tmp_path / "ran").exists()


def test_an_mrc_file_of_640_columns_is_no_pickle(tmp_path):
    write_mrc(tmp_path / "lab" / "a" / "wide.mrc", volume(0, (2, 2, 640)))
    assert (tmp_path / "lab" / "a" / "wide.mrc").read_bytes()[:2] == pickle.dumps(0, protocol=2)[:2]
    assert run(tmp_path / "lab", tmp_path / "out").shape_dhw == (2, 2, 640)


def test_what_is_missing_or_nothing_that_is_read(tmp_path, monkeypatch):
    refused(lambda: recognize(tmp_path / "absent", ReadOptions()), "absent: no such file or folder")
    (tmp_path / "letter.txt").write_text("dear all,\n")
    refused(lambda: recognize(tmp_path / "letter.txt", ReadOptions()), "not recognized", "STAR", "copick", "EMAN2")
    (tmp_path / "empty").mkdir()
    refused(lambda: recognize(tmp_path / "empty", ReadOptions()), "an empty folder")
    (tmp_path / "empty" / "p.star").touch()
    refused(lambda: recognize(tmp_path / "empty" / "p.star", ReadOptions()), "an empty file")
    refused(lambda: recognize(tmp_path / "empty", ReadOptions()), "not recognized")
    (tmp_path / "empty" / "a.pkl").write_bytes(pickle.dumps([1, 2, 3]))
    refused(lambda: recognize(tmp_path / "empty", ReadOptions()), "a.pkl", "a Python pickle")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "x\udcff"])
def test_names_that_no_screen_or_file_can_hold(tmp_path, name):
    for path in (tmp_path / "label" / name / "p.mrc", tmp_path / "id" / "a" / f"{name}.mrc"):
        write_mrc(path, volume(1))
        message = refused(lambda path=path: run(path.parents[1], tmp_path / "out"), ascii(name)[1:-1], "rename it")
        assert message.isprintable()
    write_mrc(tmp_path / name / "a" / "p.mrc", volume(1))
    assert refused(lambda: recognize(tmp_path / name, ReadOptions()), "rename it").isprintable()


def test_a_pipe_among_the_files_is_not_waited_for(lab, tmp_path):
    os.mkfifo(lab / "0012" / "notes")
    assert len(plan(lab).entries) == 10
    os.mkfifo(lab / "0012" / "p99.mrc")
    refused(lambda: run(lab, tmp_path / "out"), lab / "0012" / "p99.mrc", "no regular file")


def test_the_source_is_not_written_into(lab, tmp_path, command):
    for out in (lab, lab / "new", lab / "0012" / "new"):
        code, _, error = command(lab, "--out", out)
        assert code == 1
        assert "lies in the source" in error
    assert sorted(p.name for p in lab.iterdir()) == ["0012", "ribosome"]


def test_an_existing_folder_is_left_alone(lab, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused(lambda: run(lab, tmp_path / "out"), "exists already")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


# the command


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """`studytool data import WORDS` in this process: the exit code, and what it printed."""

    def call(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["studytool", "data", "import", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capsys.readouterr()

    return call


def test_a_dry_run_says_all_and_writes_nothing(lab, tmp_path, command):
    write_mrc(lab / "0012" / "p01.mrc", volume(1), patch={208: b"\0\0\0\0"})
    code, said, _ = command(lab, "--out", "out", "--dry-run", "--box", 4, "--exclude", "ribosome")
    assert code == 0
    for line in (
        "note: no tomogram is known",
        "5 volumes of 1 classes",
        "  0012: 5",
        "tomograms: not known",
        "left out: 5 of classes that are not wanted",
        "box: 6 x 6 x 6 voxels of 10 Å",
        "becomes: 4 x 4 x 4 voxels of 10 Å",
        f"warning: {lab / '0012' / 'p01.mrc'}: ",
    ):
        assert line in said
    assert [p.name for p in tmp_path.iterdir()] == ["lab"]


def test_the_command(lab, tmp_path, command):
    for number in (1, 3):
        write_mrc(lab / "0012" / f"p{number:02d}.mrc", volume(number), patch={208: b"\0\0\0\0"})
    code, said, _ = command(lab, "--out", "out", "--box", 4, "--invert", "--dtype", "float32", "--normalize", "none")
    assert code == 0
    assert said.count("note: no tomogram is known") == 1
    assert said.count("warning: ") == 1
    assert "(as in 1 others)" in said
    assert said.rstrip().endswith("out: 10 volumes of 2 classes")
    np.testing.assert_array_equal(load(tmp_path / "out")[1]["0012/p05"], -volume(5)[1:5, 1:5, 1:5])


def test_ctrl_c_is_one_line(lab, tmp_path, command, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("studytool.data.importing.import_dataset", stop)
    code, _, error = command(lab, "--out", "out")
    assert code == 130
    assert error == "out: interrupted; the same command goes on where it stopped\n"


def test_a_full_disk_is_one_line(lab, tmp_path, command, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    monkeypatch.setattr("studytool.data.importing.import_dataset", full)
    code, _, error = command(lab, "--out", "out")
    assert code == 1
    assert error == "studytool: out: no space left; make room, and the same command goes on where it stopped\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--box", "1"], "studytool: --box: "),
        (["--voxel-size", "-3"], "studytool: --voxel-size: "),
        (["--rescale", "0"], "studytool: --rescale: "),
        (["--transpose", "xy->yx"], "studytool: --transpose: it names x, y, z"),
        (["--dtype", "int8"], "studytool: --dtype: "),
        (["--include", "a", "--exclude", "a"], "studytool: include and exclude both name 'a'"),
    ],
)
def test_wrong_options_are_one_line(words, said, lab, tmp_path, command):
    code, _, error = command(lab, "--out", "x", *words)
    assert code == 1
    assert error.startswith(said)
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["lab"]


def test_every_reader_is_there():
    for name in READERS:
        assert callable(import_module(f"studytool.data.readers.{name}").recognize)
