"""Where particles sit in tomograms, as every particle table can tell it; what the cutting of boxes starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OUTER_CORNER = -0.5  # where the first voxel begins, in voxels from its centre


@dataclass(frozen=True)
class Pick:
    """One particle's refined position (origin shift already taken off) in a tomogram.

    `position_zyx` is in `unit` and counts from `origin`: the centre of the tomogram's first voxel ("corner"), the outer
    corner of that voxel, or the tomogram's centre. `tomogram` is the name in the table, not a path; `label` is "" where
    the table has none; `where` names the table and row.
    """

    particle_id: str
    label: str
    tomogram: str
    position_zyx: tuple[float, float, float]
    unit: Literal["voxel", "angstrom"]
    origin: Literal["corner", "outer corner", "centre"]
    where: str
