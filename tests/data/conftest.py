"""Small datasets that the tests of the data room share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from studytool.data.particles import Particle
from studytool.data.shards import write_dataset

SPLIT_OF_TOMOGRAM = ("train", "train", "train", "val", "test")


@pytest.fixture(scope="session")
def make_particles() -> Callable[..., Iterator[Particle]]:
    """`make_particles(count, side)`: volumes of noise, three classes and five tomograms taking turns."""

    def make(count: int, side: int = 6, seed: int = 0) -> Iterator[Particle]:
        for number in range(count):
            volume = np.random.default_rng([seed, number]).standard_normal((side, side, side), dtype=np.float32)
            tomogram = number % 5
            yield Particle(
                particle_id=f"p{number:04d}",
                label=("ribosome", "apoferritin", "0012")[number % 3],
                tomogram=f"t{tomogram}",
                split=SPLIT_OF_TOMOGRAM[tomogram],
                volume_DHW=volume,
                voxel_size_angstrom=13.5,
                snr=None if number % 2 else 0.1,
                position_zyx=(number, 2.0 * number, 0.5) if number % 4 == 0 else None,
            )

    return make


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory, make_particles) -> Path:
    """600 volumes of 6^3 in float16, in shards of 400, so in three row groups. Not to be written to."""
    folder = tmp_path_factory.mktemp("data") / "small"
    write_dataset(make_particles(600), folder, dtype="float16", provenance={"made": "here"}, volumes_per_shard=400)
    return folder


@pytest.fixture(scope="session")
def volumes(make_particles) -> np.ndarray:
    """The volumes of `dataset_folder` in the order of its rows, as stored."""
    return np.stack([particle.volume_DHW for particle in make_particles(600)]).astype(np.float16)
