"""What all tests share: one torch thread, paths to the optional sample files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real sample files; tests that need it are skipped where it is absent."""
    root = Path(__file__).parents[1] / os.environ.get("STUDYTOOL_SHARED", "../shared")
    if not (root / "data").is_dir():
        pytest.skip("no sample files: set STUDYTOOL_SHARED to the folder that holds data/")
    return root / "data"
