from __future__ import annotations

import numpy as np
import pytest
import torch

from studytool.data.particles import Particle
from studytool.data.shards import open_dataset, write_dataset
from studytool.data.stream import Stream
from studytool.data.voxels import store, widened, widened_tensor
from studytool.errors import DataError

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=(12, 12, 12)).astype(np.float32)


def test_uint8_moves_a_voxel_by_half_a_step_at_most():
    out = np.empty(NORMAL.shape, np.uint8)
    store(NORMAL, out, "p")
    error = widened(out) - NORMAL
    assert np.abs(error).max() <= 0.5 * 12 / 255 + 1e-6
    noise_db = 10 * np.log10(NORMAL.var() / error.var())
    assert noise_db == pytest.approx(37.3, abs=0.3)
    np.testing.assert_allclose(widened_tensor(torch.from_numpy(out)).numpy(), widened(out), atol=1e-6)


def test_values_beyond_the_ends_are_brought_to_them():
    volume = NORMAL.copy()
    volume[0, 0, 0] = 9.0
    out = np.empty(volume.shape, np.uint8)
    store(volume, out, "p")
    assert widened(out)[0, 0, 0] == pytest.approx(6.0)


@pytest.mark.parametrize("volume", [NORMAL * 100, NORMAL * 0.01, NORMAL + 8])
def test_a_volume_that_is_not_normalized_is_refused(volume):
    with pytest.raises(DataError, match=r"particle 'p7': uint8 keeps values from -6 to 6"):
        store(volume, np.empty(volume.shape, np.uint8), "p7")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_floating_volumes_are_widened_to_what_they_are(dtype):
    stored = NORMAL.astype(dtype)
    assert np.array_equal(widened(stored), stored.astype(np.float32))
    assert widened_tensor(torch.from_numpy(stored)).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@pytest.mark.filterwarnings("ignore:.*are compressed or of another layout")
def test_a_dataset_of_any_kind_is_streamed_as_it_was_written(tmp_path, dtype, compression):
    volumes = RNG.normal(size=(20, 8, 8, 8)).astype(np.float32)
    particles = [Particle(f"p{i}", "a", "", "train", volume, 10.0) for i, volume in enumerate(volumes)]
    write_dataset(particles, tmp_path / "d", dtype=dtype, provenance={}, volumes_per_shard=8, compression=compression)
    dataset = open_dataset(tmp_path / "d")
    assert dataset.manifest.dtype == dtype
    stream = Stream(dataset, np.arange(20), batch_size=6, seed=0, shuffle=True)
    seen = []
    for batch in stream.epoch(0):
        atol = 12 / 255 / 2 + 1e-6 if dtype == "uint8" else 4e-3
        expected = volumes[batch.rows_B]
        np.testing.assert_allclose(widened_tensor(batch.volumes_B1DHW).float().squeeze(1).numpy(), expected, atol=atol)
        seen += batch.rows_B.tolist()
    assert sorted(seen) == list(range(20))
