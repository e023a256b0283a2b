"""The record that every source of volumes delivers and every shard holds: one particle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SPLITS = ("train", "val", "test")
STORED = "stored"
"""The name of the split that came with the data."""


@dataclass(frozen=True)
class Particle:
    """One subtomogram with what is known of it.

    `volume_DHW` is float32 in the order z, y, x. `tomogram` is the group that may not stand in two splits; "" where it
    is not known. `split` is "train", "val", "test" or "" (none yet). `snr` is None where it is not known, infinity
    where there is no noise. `position_zyx` counts voxels in the tomogram.
    """

    particle_id: str
    label: str
    tomogram: str
    split: str
    volume_DHW: np.ndarray[Any, np.dtype[np.float32]]
    voxel_size_angstrom: float
    snr: float | None = None
    position_zyx: tuple[float, float, float] | None = None
