"""The quick part: the same code as the long part (`python -m tests.reliability`), with few kills."""

from __future__ import annotations

import pytest

from reliability import damage, disk, kills, writes

KILLS = 2


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("reliability")


@pytest.mark.end_to_end
@pytest.mark.timeout(600)
def test_workers_killed_at_random_moments(work):
    assert kills.worker_kills(work, KILLS, seed=0)["kills"] == KILLS


@pytest.mark.end_to_end
@pytest.mark.timeout(600)
def test_drivers_killed_at_random_moments(work):
    found = kills.driver_kills(work, KILLS, seed=0)
    assert found["kills"] == KILLS
    assert found["seconds until all processes were gone"] < 60


@pytest.mark.end_to_end
@pytest.mark.timeout(600)
def test_a_full_disk(work):
    if not disk.can_make_disks():
        pytest.skip("a small file system can only be mounted by the superuser")
    assert disk.disk_full(work)["trials kept"] >= 1


@pytest.mark.slow
def test_damaged_state_files(work):
    found = damage.state_damaged(work / "state", 12, seed=1)
    assert found["recovered"] + found["refused"] == 12


def test_flipped_bits_and_truncations_of_shards(work):
    assert damage.shards_damaged(work / "shards", flips=100, cuts=20, seed=0)["not noticed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", writes.KINDS)
def test_writers_killed(work, kind):
    assert writes.writers_killed(kind, work / f"killed-{kind}", 20, seed=0) == {"kills": 20}


@pytest.mark.slow
@pytest.mark.parametrize("kind", writes.KINDS)
def test_calls_that_fail(work, kind):
    assert writes.calls_failing(kind, work / f"failing-{kind}", 12)["failures"] > 12
