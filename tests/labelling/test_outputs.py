from __future__ import annotations

import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from labelling_run import run

from studytool.data.readers.source import ReadOptions
from studytool.errors import DataError
from studytool.predict import Predictor


def changes_nothing(trial: Path, source: Path, out: Path, message: str, **options) -> None:
    """The request is refused in one line that has `message`, and every file beside the output stays as it is."""
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=message) as caught:
        run(trial, source, out, **options)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before


def test_the_source_is_never_overwritten(trial: Path, home: Path):
    star = home / "mrc" / "particles.star"
    before = star.read_bytes()
    with pytest.raises(DataError, match="is the source itself"):
        run(trial, star, star)
    assert star.read_bytes() == before


def test_nor_by_the_features_or_the_file_of_a_class(trial: Path, home: Path, tmp_path: Path):
    volumes = tmp_path / "volumes.npz"
    np.savez(volumes, volumes=np.zeros((1, 12, 12, 12), np.float32))
    star = tmp_path / "new_ball.star"
    star.write_bytes((home / "mrc" / "particles.star").read_bytes())
    before = volumes.read_bytes(), star.read_bytes()
    with pytest.raises(DataError, match="is the source itself"):
        run(trial, volumes, tmp_path / "a.csv", embed=volumes)
    with pytest.raises(DataError, match=r"new_ball\.star: is the source itself"):
        run(trial, star, tmp_path / "new.star", per_class=True, options=ReadOptions(label="", root=home / "mrc"))
    assert (volumes.read_bytes(), star.read_bytes()) == before


@pytest.mark.parametrize("options", [{}, {"embed": Path("a.npz")}])
def test_a_folder_of_that_name_is_refused_before_the_work(trial: Path, home: Path, tmp_path: Path, options):
    options = {name: tmp_path / value for name, value in options.items()}
    out = tmp_path / "a.csv"
    (options.get("embed", out)).mkdir()
    with pytest.raises(DataError, match="is a folder; give the name of a file"):
        run(trial, home / "data", out, **options)


def test_nor_the_table_of_coordinates(trial: Path, tmp_path: Path):
    (tmp_path / "tomo").mkdir()
    with mrcfile.new(tmp_path / "tomo" / "t1.mrc") as file:
        file.set_data(np.random.default_rng(0).standard_normal((40, 40, 40)).astype(np.float32))
        file.voxel_size = 10.0
    picks = tmp_path / "picks.csv"
    picks.write_text("tomogram,x,y,z\nt1,20,20,20\nt1,16,20,24\n")
    options = ReadOptions(label="", coordinates=picks, cut=16)
    changes_nothing(trial, tmp_path / "tomo", picks, r"picks\.csv: is a file of the source", options=options)
    run(trial, tmp_path / "tomo", tmp_path / "out.csv", options=options)


def test_nor_a_volume_that_a_row_names(trial: Path, home: Path, tmp_path: Path):
    copy = shutil.copytree(home / "mrc", tmp_path / "mrc")
    volume = sorted((copy / "ball").glob("*.mrc"))[0]
    link = tmp_path / "link.csv"
    link.symlink_to(volume)
    changes_nothing(trial, copy / "particles.star", link, r"link\.csv: is a file of the source")


def test_what_is_there_is_not_written_over(trial: Path, home: Path, tmp_path: Path):
    star = home / "mrc" / "particles.star"
    for name in ("old.csv", "old.npz", "old.star", "new_rejected.star"):
        (tmp_path / name).write_text("somebody's work")
    exists = "exists already; choose another name, or remove it"
    changes_nothing(trial, star, tmp_path / "old.csv", rf"old\.csv: {exists}")
    changes_nothing(trial, star, tmp_path / "old.star", rf"old\.star: {exists}")
    changes_nothing(trial, star, tmp_path / "new.csv", rf"old\.npz: {exists}", embed=tmp_path / "old.npz")
    changes_nothing(trial, star, tmp_path / "new.star", rf"new_rejected\.star: {exists}", per_class=True)


@pytest.mark.parametrize("change", ["other order", "fewer rows", "gone"])
def test_a_table_that_changes_meanwhile_gets_no_labels(
    trial: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
):
    star = tmp_path / "a.star"
    shutil.copy(home / "mrc" / "particles.star", star)
    lines = star.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if ".mrc" in line)
    rows = [line for line in lines[first:] if line]
    label_source = Predictor.label_source

    def slowly(*given, **options):
        if change == "gone":
            star.unlink()
        else:
            kept = rows[::-1] if change == "other order" else rows[:3]
            star.write_text("\n".join([*lines[:first], *kept, ""]))
        return label_source(*given, **options)

    monkeypatch.setattr(Predictor, "label_source", slowly)
    with pytest.raises(DataError, match=r"a\.star: was changed while its particles were labelled") as caught:
        run(trial, star, tmp_path / "out.star", options=ReadOptions(label="", root=home / "mrc"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.star").exists()
