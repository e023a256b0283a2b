from __future__ import annotations

import matplotlib.image
import pytest

from studytool.data.montage import write_montage
from studytool.data.shards import open_dataset
from studytool.errors import DataError


def test_a_picture_with_a_row_per_class(dataset_folder, tmp_path):
    write_montage(open_dataset(dataset_folder), tmp_path / "montage.png", per_class=2)
    picture = matplotlib.image.imread(tmp_path / "montage.png")
    assert picture.shape[:2] == (pytest.approx(380, abs=2), pytest.approx(840, abs=2))
    assert len({float(value) for value in picture[..., 0].ravel()}) > 50  # there are shades of grey in it
    assert [path.name for path in tmp_path.iterdir()] == ["montage.png"]


def test_the_seed_draws_the_volumes(dataset_folder, tmp_path):
    dataset = open_dataset(dataset_folder)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_montage(dataset, tmp_path / name, per_class=1, seed=seed)
    a, b, c = (matplotlib.image.imread(tmp_path / name, format="png") for name in "abc")
    assert (a == b).all()
    assert (a != c).any()


def test_pictures_that_would_be_too_large(dataset_folder, tmp_path):
    for count in (0, 51):
        with pytest.raises(DataError, match=f"{count} volumes of each of 3 classes; a picture takes 1 to 50"):
            write_montage(open_dataset(dataset_folder), tmp_path / "a.png", per_class=count)
    assert list(tmp_path.iterdir()) == []
