from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import starfile

from studytool.labelling.labels import label
from studytool.labelling.star import write_labelled_star, write_star_per_class

RELION = """\
# written by somebody

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnImagePixelSize #3
1 opticsGroup1 10.000


data_particles

loop_
_rlnImageName #1
_rlnClassNumber #2
_rlnCoordinateX #3
_rlnOpticsGroup #4
Extract/a.mrc   7   12.50   1
"Extract/b c.mrc" 3 1.0e+01 1   # odd
Extract/c.mrc 1 0012 1

data_other
_note kept
"""
CLASSES = ("ball", "long rod")
PROBABILITIES = np.array([[0.9, 0.1], [0.3, 0.7], [0.55, 0.45]])


def labels(reject_below: float | None = None):
    return label(PROBABILITIES, CLASSES, most_probable=PROBABILITIES.argmax(axis=1), reject_below=reject_below)


@pytest.fixture
def star(tmp_path: Path) -> Path:
    path = tmp_path / "particles.star"
    path.write_text(RELION)
    return path


def test_columns_are_added_and_all_else_stays_to_the_letter(star: Path, tmp_path: Path):
    out = tmp_path / "labelled.star"
    write_labelled_star(star, out, labels())
    lines = out.read_text().splitlines()
    before = RELION.splitlines()
    last_column = before.index("_rlnOpticsGroup #4")
    assert lines[: last_column + 1] == before[: last_column + 1]
    rows = lines.index("Extract/a.mrc 1 12.50 1 ball 0.900000 0.325083")
    assert lines[rows + 1 : rows + 3] == [
        '"Extract/b c.mrc" 2 1.0e+01 1 long_rod 0.700000 0.610864',
        "Extract/c.mrc 1 0012 1 ball 0.550000 0.688139",
    ]
    assert lines[rows - 3 : rows] == [
        "_studytoolClassName #5",
        "_studytoolClassProbability #6",
        "_studytoolClassEntropy #7",
    ]
    assert lines[-2:] == ["data_other", "_note kept"]
    blocks = starfile.read(out, always_dict=True, parse_as_string=["rlnCoordinateX"])
    assert list(blocks) == ["optics", "particles", "other"]
    assert blocks["particles"]["rlnClassNumber"].tolist() == [1, 2, 1]
    assert blocks["particles"]["rlnCoordinateX"].tolist() == ["12.50", "1.0e+01", "0012"]
    assert star.read_text() == RELION


def test_a_comment_before_the_rows_stays_before_them(tmp_path: Path):
    star, out = tmp_path / "a.star", tmp_path / "b.star"
    star.write_text(RELION.replace("Extract/a.mrc", "# the rows\n\nExtract/a.mrc", 1))
    write_labelled_star(star, out, labels())
    lines = out.read_text().splitlines()
    at = lines.index("_studytoolClassEntropy #7")
    assert lines[at + 1 : at + 3] == ["# the rows", ""]
    assert lines[at + 3].startswith("Extract/a.mrc 1 ")


def test_labels_of_an_earlier_prediction_are_replaced(star: Path, tmp_path: Path):
    first, second = tmp_path / "a.star", tmp_path / "b.star"
    write_labelled_star(star, first, labels(reject_below=0.6))
    assert starfile.read(first)["particles"]["rlnClassNumber"].tolist() == [1, 2, 0]
    write_labelled_star(first, second, labels())
    table = starfile.read(second)["particles"]
    assert table["studytoolClassName"].tolist() == ["ball", "long_rod", "ball"]
    assert list(table).count("studytoolClassName") == 1
    assert len(list(table)) == 7


def test_a_file_per_class_with_its_rows_and_all_blocks(star: Path, tmp_path: Path):
    paths = write_star_per_class(star, tmp_path / "out.star", labels(reject_below=0.6))
    assert {name: path.name for name, path in paths.items()} == {
        "ball": "out_ball.star",
        "long rod": "out_long_rod.star",
        "rejected": "out_rejected.star",
    }
    rows = {name: starfile.read(path)["particles"]["rlnImageName"].tolist() for name, path in paths.items()}
    assert rows == {"ball": ["Extract/a.mrc"], "long rod": ["Extract/b c.mrc"], "rejected": ["Extract/c.mrc"]}
    assert all(list(starfile.read(path)) == ["optics", "particles", "other"] for path in paths.values())


def test_a_table_of_one_row_without_a_loop(tmp_path: Path):
    star = tmp_path / "one.star"
    star.write_text("data_particles\n\n_rlnImageName a.mrc\n_rlnClassNumber 9\n")
    one = label(PROBABILITIES[:1], CLASSES, most_probable=np.array([0]), reject_below=None)
    write_labelled_star(star, tmp_path / "out.star", one)
    found = starfile.read(tmp_path / "out.star")
    assert {name: found[name] for name in ("rlnImageName", "rlnClassNumber", "studytoolClassName")} == {
        "rlnImageName": "a.mrc",
        "rlnClassNumber": 1,
        "studytoolClassName": "ball",
    }


def test_classes_stay_different_without_their_spaces(star: Path, tmp_path: Path):
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7], [0.55, 0.45]])
    found = label(probabilities, ("a b", "a_b"), most_probable=probabilities.argmax(axis=1), reject_below=None)
    write_labelled_star(star, tmp_path / "out.star", found)
    names = starfile.read(tmp_path / "out.star")["particles"]["studytoolClassName"].tolist()
    assert names == ["a_b", "a_b-2", "a_b"]
