from __future__ import annotations

import matplotlib.image
import pytest

from studytool.data.montage import write_montage
from studytool.data.shards import open_dataset


def test_a_picture_with_a_row_per_class(dataset_folder, tmp_path):
    write_montage(open_dataset(dataset_folder), tmp_path / "montage.png", per_class=2)
    picture = matplotlib.image.imread(tmp_path / "montage.png")
    assert picture.shape[:2] == (pytest.approx(380, abs=2), pytest.approx(840, abs=2))
    assert len({float(value) for value in picture[..., 0].ravel()}) > 50  # there are shades of grey in it
    assert [path.name for path in tmp_path.iterdir()] == ["montage.png"]
