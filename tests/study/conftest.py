from __future__ import annotations

import pytest
from synthetic_study import Driver


@pytest.fixture
def driver(tmp_path) -> Driver:
    return Driver(tmp_path)
