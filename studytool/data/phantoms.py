"""Ten particles made of Gaussian subunits, in the symmetry and the rough measures of real complexes.

They are made to be told apart the way real particles are: by shape. Each is rendered analytically in any pose and at
any voxel size, so that neither interpolation nor a file is needed. The measures are rounded from textbook descriptions
of the complexes that give the names; none is a model of a structure, and the ribosome is shrunk to fit the others' box.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation
from scipy.special import erf

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Phantom:
    """Isotropic Gaussians about their common centre of mass.

    `centres_xyz_angstrom` is [K, 3]; `sigmas_angstrom` and `masses` (density times Å^3) are [K].
    """

    name: str
    centres_xyz_angstrom: Array
    sigmas_angstrom: Array
    masses: Array

    @property
    def radius_angstrom(self) -> float:
        """Distance from the centre that no subunit's two-sigma sphere goes beyond."""
        return float((np.linalg.norm(self.centres_xyz_angstrom, axis=1) + 2 * self.sigmas_angstrom).max())

    def render(
        self, side: int, voxel_size_angstrom: float, rotation: Array, offset_xyz_angstrom: ArrayLike = (0, 0, 0)
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Density [side, side, side] (z, y, x) after the 3 x 3 `rotation` about the centre of mass and the offset.

        Each voxel holds the mean of the density over its cube, so that no mass is lost between voxels; the centre of
        mass stands in the middle of the box, (side - 1) / 2. The mean inside the particle is about 1.
        """
        centres = self.centres_xyz_angstrom @ rotation.T + np.asarray(offset_xyz_angstrom)
        edges = (np.arange(side + 1) - side / 2) * voxel_size_angstrom
        scaled = (edges[None, None, :] - centres.T[:, :, None]) / (np.sqrt(2) * self.sigmas_angstrom[None, :, None])
        x, y, z = np.diff(erf(scaled), axis=2) / (2 * voxel_size_angstrom)  # each [K, side]
        columns = np.einsum("k,kz,ky->zyk", self.masses, z, y).reshape(side * side, -1)
        density = (columns @ x).reshape(side, side, side)
        return np.asarray(density, dtype=np.float32)


def phantom(name: str) -> Phantom:
    """The phantom called `name`, one of `PHANTOMS`: centred, and of mean density 1 inside."""
    centres, sigmas, masses = PHANTOMS[name]()
    centres = centres - np.average(centres, axis=0, weights=masses)
    return Phantom(name, centres, sigmas, masses / _mean_inside(centres, sigmas, masses))


def _mean_inside(centres: Array, sigmas: Array, masses: Array) -> float:
    """Mean density inside the particle, each place weighted by its density, in closed form.

    Two Gaussians of unit mass overlap by a Gaussian of their distance with the sum of their variances.
    """
    variances = sigmas[:, None] ** 2 + sigmas[None, :] ** 2
    squares = ((centres[:, None] - centres[None, :]) ** 2).sum(-1)
    overlaps = np.exp(-squares / (2 * variances)) / (2 * np.pi * variances) ** 1.5
    return float(masses @ overlaps @ masses / masses.sum())


Subunits = tuple[Array, Array, Array]


def _subunits(points: Sequence[Sequence[float]]) -> Array:
    return np.array(points, dtype=np.float64)


def _copies(group: Rotation, units: Sequence[tuple[float, float, float, float]]) -> Subunits:
    """All copies under `group` of units (x, y, z, sigma), with masses as of equal peak density."""
    base = _subunits(units)
    centres = np.concatenate([base[:, :3] @ matrix.T for matrix in group.as_matrix()])
    sigmas = np.tile(base[:, 3], len(group))
    return centres, sigmas, sigmas**3


def proteasome_like() -> Subunits:
    """20S proteasome: four stacked rings of seven (D7), a barrel 150 Å long and 115 Å wide with three chambers."""
    return _copies(Rotation.create_group("D7"), [(38, 0, 20, 11.5), (36, 8, 57, 11.5)])


def ferritin_like() -> Subunits:
    """Apoferritin: an octahedral shell of 24 subunits, 125 Å across and hollow."""
    return _copies(Rotation.create_group("O"), [(44, 20, 12, 11)])


def cdc48_like() -> Subunits:
    """p97/Cdc48: two stacked rings of six (C6) of different width, 160 Å across."""
    return _copies(Rotation.create_group("C6"), [(34, 0, -22, 14), (36, 8, 18, 14), (66, 10, 22, 11)])


def galactosidase_like() -> Subunits:
    """beta-Galactosidase: a flat, long tetramer (D2) of 175 x 135 x 90 Å."""
    return _copies(Rotation.create_group("D2"), [(32, 26, 14, 17), (64, 24, -8, 12), (24, 48, 8, 11)])


def dehydrogenase_like() -> Subunits:
    """Glutamate dehydrogenase: two stacked trimers (D3) with an antenna at either end."""
    return _copies(Rotation.create_group("D3"), [(32, 0, 26, 17), (14, 8, 62, 9), (40, 16, 12, 11)])


def haemagglutinin_like() -> Subunits:
    """Influenza haemagglutinin: a slender trimer (C3), 135 Å long, with a stem and a wider head."""
    return _copies(
        Rotation.create_group("C3"),
        [(9, 0, -60, 8), (10, 3, -36, 9), (11, 6, -10, 9), (20, 4, 24, 14), (18, 10, 48, 13)],
    )


def ribosome_like() -> Subunits:
    """Ribosome: a round large lobe with two stalks and a long small lobe beside it, no symmetry; shrunk to 190 Å."""
    lattice = 24.0 * np.stack(np.meshgrid(*[np.arange(-4, 5)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    lattice = lattice + np.random.default_rng(70).uniform(-7, 7, lattice.shape)
    large = lattice[np.linalg.norm((lattice - [-24, 0, 0]) / [46, 54, 50], axis=1) < 1]
    small = lattice[np.linalg.norm((lattice - [50, 6, -4]) / [20, 72, 38], axis=1) < 1]
    stalks = _subunits([(-44, 58, 14), (-56, 70, 20), (-30, -62, -16)])
    centres = np.concatenate([large, small, stalks])
    sigmas = np.concatenate([np.full(len(large), 14.0), np.full(len(small), 12.0), np.full(len(stalks), 9.0)])
    return centres, sigmas, sigmas**3


def filament_like() -> Subunits:
    """F-actin: a stretch of a thin helix, rise 27.6 Å and turn -166.6 degrees a subunit of two domains."""
    units = []
    for number in range(-3, 4):
        for radius, lift, sigma in ((16, -6, 13), (30, 8, 9)):
            angle = np.deg2rad(-166.6 * number)
            units.append((radius * np.cos(angle), radius * np.sin(angle), 27.6 * number + lift, sigma))
    return _copies(Rotation.identity(1), units)


def nucleosome_like() -> Subunits:
    """Nucleosome: DNA wound 1.65 times around a disc of histones (C2), 110 Å across and 60 Å thick."""
    turns = np.linspace(-0.825, 0.825, 25)
    angles = 2 * np.pi * turns
    dna = [(42 * np.cos(a), 42 * np.sin(a), 26 * t, 9.0) for a, t in zip(angles, turns, strict=True)]
    histones = _copies(
        Rotation.from_rotvec([[0, 0, 0], [np.pi, 0, 0]]), [(20, 10, 8, 12), (-4, 22, -6, 12), (-20, 6, 8, 11)]
    )[0]
    units = dna + [(x, y, z, 11.5) for x, y, z in histones]
    return _copies(Rotation.identity(1), units)


def rubisco_like() -> Subunits:
    """Rubisco: eight large and eight small subunits (D4), compact, 110 Å across with a channel along the axis."""
    return _copies(Rotation.create_group("D4"), [(34, 6, 18, 15), (24, 20, 46, 10)])


PHANTOMS: Mapping[str, Callable[[], Subunits]] = {
    make.__name__: make
    for make in (
        proteasome_like,
        ferritin_like,
        cdc48_like,
        galactosidase_like,
        dehydrogenase_like,
        haemagglutinin_like,
        ribosome_like,
        filament_like,
        nucleosome_like,
        rubisco_like,
    )
}
