from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest
from trained_trial import train_small_trial

from studytool.errors import DataError
from studytool.showing import write_trial_picture


def test_a_picture_of_a_trial_and_its_particles(tmp_path: Path):
    trial = train_small_trial(tmp_path)
    lines = write_trial_picture(trial, tmp_path / "a.png", count=5)
    assert lines[0].startswith("tiny_backbone:tiny: stem, stage1; ")
    assert lines[0].endswith("takes 16 x 16 x 16 voxels of 10 Å, knows ball, long rod")
    assert lines[1] == f"{tmp_path / 'a.png'}: 5 of 20 particles of the test split"
    picture = matplotlib.image.imread(tmp_path / "a.png")
    assert picture.shape[:2] == (890, 1300)
    assert picture[..., :3].std() > 0.1
    write_trial_picture(trial, tmp_path / "b.png", count=5)
    write_trial_picture(trial, tmp_path / "c.png", count=5, seed=1)
    same, other = (matplotlib.image.imread(tmp_path / name) for name in ("b.png", "c.png"))
    assert (picture == same).all()
    assert (picture != other).any()


def test_a_search_trial_is_shown_on_its_validation_split_and_the_test_split_stays_unread(tmp_path: Path):
    trial = train_small_trial(tmp_path, phase="search")
    assert write_trial_picture(trial, tmp_path / "a.png")[1].endswith("12 of 16 particles of the val split")


def test_a_trial_whose_data_is_gone(tmp_path: Path):
    trial = train_small_trial(tmp_path, phase="search")
    record = json.loads((trial / "best.json").read_text())
    record["trial"]["data_path"] = "gone"
    (trial / "best.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"gone: the dataset of .* is not there or was changed"):
        write_trial_picture(trial, tmp_path / "a.png")
