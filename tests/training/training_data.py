"""A small dataset that can be learned in a few epochs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from studytool.data.particles import Particle
from studytool.data.shards import write_dataset

SIDE = 12
CLASSES = ("ball", "rod", "sheet")
COUNTS = {"train": 7, "val": 4, "test": 4}  # of each class


def particles(seed: int = 0, classes: tuple[str, ...] = CLASSES, counts: dict[str, int] = COUNTS) -> Iterator[Particle]:
    """Balls, rods and sheets at random places in noise; one tomogram a split."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.arange(SIDE) - (SIDE - 1) / 2] * 3, indexing="ij")
    shapes = {
        "ball": np.exp(-(x**2 + y**2 + z**2) / 8),
        "rod": np.exp(-(x**2 + y**2) / 2),
        "sheet": np.exp(-(z**2) / 2),
    }
    for split, count in counts.items():
        for label in classes:
            for i in range(count):
                shifted = np.roll(shapes[label], rng.integers(-2, 3, size=3), axis=(0, 1, 2))
                volume = shifted + 0.3 * rng.standard_normal(shifted.shape)
                yield Particle(
                    particle_id=f"{split}-{label}-{i}",
                    label=label,
                    tomogram=f"tomogram-{split}",
                    split=split,
                    volume_DHW=volume.astype(np.float32),
                    voxel_size_angstrom=10.0,
                    snr=None,
                )


def write(folder: Path, items: Iterable[Particle], *, volumes_per_shard: int = 64) -> Path:
    """Write the particles as a dataset of float16."""
    write_dataset(
        items, folder, dtype="float16", provenance={"made": "for a test"}, volumes_per_shard=volumes_per_shard
    )
    return folder
