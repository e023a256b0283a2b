from __future__ import annotations

from pathlib import Path

import pytest
from trained_trial import train_small_trial

from studytool.data.export import export_dataset
from studytool.data.shards import open_dataset


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, and its volumes as MRC files and `mrc/particles.star`."""
    folder = tmp_path_factory.mktemp("labelling")
    train_small_trial(folder)
    export_dataset(open_dataset(folder / "data"), folder / "mrc")
    return folder


@pytest.fixture(scope="session")
def trial(home: Path) -> Path:
    return home / "studies" / "trials" / "a.confirm-seed-0"
