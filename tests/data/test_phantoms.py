from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from studytool.data.phantoms import PHANTOMS, phantom

SYMMETRY = {
    "proteasome_like": "D7",
    "ferritin_like": "O",
    "cdc48_like": "C6",
    "galactosidase_like": "D2",
    "dehydrogenase_like": "D3",
    "haemagglutinin_like": "C3",
    "rubisco_like": "D4",
}
UPRIGHT = np.eye(3)


def centre_of_mass(volume):
    return np.array([(grid * volume).sum() / volume.sum() for grid in np.indices(volume.shape)])


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def test_there_are_ten():
    assert len(PHANTOMS) == 10


@pytest.mark.parametrize("name", PHANTOMS)
def test_mass_and_centre_stay_in_any_pose(name):
    particle = phantom(name)
    rotation = Rotation.from_rotvec([0.3, -1.2, 0.7]).as_matrix()
    for offset in ([0, 0, 0], [23.0, -11.0, 5.0]):
        volume = particle.render(40, 10.0, rotation, offset)
        assert volume.sum() * 10.0**3 == pytest.approx(particle.masses.sum(), rel=2e-3)
        np.testing.assert_allclose(centre_of_mass(volume), 19.5 + np.array(offset)[::-1] / 10, atol=0.02)


@pytest.mark.parametrize("name", PHANTOMS)
def test_all_are_equally_bright_inside(name):
    volume = phantom(name).render(48, 5.0, UPRIGHT)
    assert (volume**2).sum() / volume.sum() == pytest.approx(1, rel=0.05)
    assert volume[volume > 0.1 * volume.max()].mean() == pytest.approx(0.75, rel=0.15)


@pytest.mark.parametrize("name", PHANTOMS)
@pytest.mark.parametrize(("side", "voxel_size_angstrom"), [(24, 10.0), (24, 14.0), (32, 10.0)])
def test_all_fit_the_boxes_of_subtomograms(name, side, voxel_size_angstrom):
    particle = phantom(name)
    whole = particle.masses.sum() / voxel_size_angstrom**3
    for rotation in Rotation.random(5, rng=np.random.default_rng(0)).as_matrix():
        assert particle.render(side, voxel_size_angstrom, rotation).sum() > 0.99 * whole


@pytest.mark.parametrize("name", SYMMETRY)
def test_symmetry(name):
    particle = phantom(name)
    upright = particle.render(32, 8.0, UPRIGHT)
    for rotation in Rotation.create_group(SYMMETRY[name]).as_matrix():
        np.testing.assert_allclose(particle.render(32, 8.0, rotation), upright, atol=1e-4)
    other = particle.render(32, 8.0, Rotation.from_euler("z", 20, degrees=True).as_matrix())
    assert np.abs(other - upright).max() > 0.05


@pytest.mark.parametrize("name", ["ribosome_like", "filament_like"])
def test_rotations_turn_the_way_they_say(name):
    """A turn by 90 degrees about z takes x to y, and so on: exact on the grid."""
    particle = phantom(name)
    upright = particle.render(30, 10.0, UPRIGHT)
    for axis, planes in {"z": (2, 1), "y": (0, 2), "x": (1, 0)}.items():
        rotation = Rotation.from_euler(axis, 90, degrees=True).as_matrix()
        np.testing.assert_allclose(particle.render(30, 10.0, rotation), np.rot90(upright, 1, planes), atol=1e-5)


def test_voxels_hold_means_so_that_coarse_volumes_are_binned_fine_ones():
    rotation = Rotation.from_rotvec([1, 0.2, 0.1]).as_matrix()
    particle = phantom("cdc48_like")
    fine = particle.render(48, 5.0, rotation, [3, 2, 1]).reshape(24, 2, 24, 2, 24, 2).mean((1, 3, 5))
    np.testing.assert_allclose(particle.render(24, 10.0, rotation, [3, 2, 1]), fine, atol=1e-6)


def test_they_are_deterministic():
    for name in PHANTOMS:
        np.testing.assert_array_equal(phantom(name).centres_xyz_angstrom, phantom(name).centres_xyz_angstrom)
    assert phantom("ribosome_like").centres_xyz_angstrom.shape == (55, 3)
    assert phantom("ribosome_like").radius_angstrom == pytest.approx(110, abs=1)


def test_no_two_look_alike_in_their_power_spectrum():
    """Rotational averages of the spectra, which no pose changes, differ for each pair."""
    cycles = 32 * np.fft.fftfreq(32)
    shells = np.round(np.sqrt(sum(np.meshgrid(*[cycles**2] * 3)))).astype(int).ravel()
    profiles = {}
    for name in PHANTOMS:
        amplitudes = np.abs(np.fft.fftn(phantom(name).render(32, 10.0, UPRIGHT)))
        profiles[name] = np.log(np.bincount(shells, amplitudes.ravel())[:12] / np.bincount(shells)[:12])
        profiles[name] -= profiles[name][0]
    for one, other in itertools.combinations(PHANTOMS, 2):
        assert np.abs(profiles[one] - profiles[other]).max() > 0.2, (one, other)
