from __future__ import annotations

import numpy as np
import pytest

from studytool.data.imaging import contrast_transfer, electron_wavelength_angstrom, tilt_angles, wedge
from studytool.errors import DataError

MICROSCOPE = {
    "defocus_um": 4.0,
    "voltage_kv": 300.0,
    "spherical_aberration_mm": 2.7,
    "amplitude_contrast": 0.07,
    "b_factor_square_angstrom": 0.0,
}


def full(half, side):
    """The multiplier on all frequencies of `numpy.fft.fftn`, from those of `rfftn`."""
    return np.fft.fftn(np.fft.irfftn(half, s=(side,) * 3)).real


def wave(side, z=0, y=0, x=0):
    grid = np.arange(side)
    phase = z * grid[:, None, None] + y * grid[None, :, None] + x * grid[None, None, :]
    return np.cos(2 * np.pi * phase / side)


def passed(multiplier, volume):
    filtered = np.fft.irfftn(np.fft.rfftn(volume) * multiplier, s=volume.shape)
    return (filtered * volume).sum() / (volume**2).sum()


def test_a_wedge_of_60_degrees_keeps_71_percent():
    kept = full(wedge(32, (-60, 60), 3), 32).mean()
    assert kept == pytest.approx(0.710, abs=0.005)
    assert kept == pytest.approx(1 - np.tan(np.deg2rad(30)) / 2, abs=0.005)


@pytest.mark.parametrize("degrees", [50, 55, 70])
def test_other_wedges_keep_what_geometry_says(degrees):
    missing = np.deg2rad(90 - degrees)
    assert full(wedge(64, (-degrees, degrees), 1), 64).mean() == pytest.approx(1 - np.tan(missing) / 2, abs=0.006)


def test_all_tilts_keep_all():
    assert (wedge(24, (-90, 90), 1) == 1).all()


def test_the_tilt_axis_is_y_and_the_beam_goes_along_z():
    mask = wedge(32, (-60, 60), 3)
    assert passed(mask, wave(32, y=5)) == pytest.approx(1)
    assert passed(mask, wave(32, x=5)) == pytest.approx(1)
    assert passed(mask, wave(32, z=5)) == pytest.approx(0, abs=1e-6)
    assert passed(mask, wave(32, z=5, y=9)) == pytest.approx(0, abs=1e-6)
    assert passed(mask, np.ones((32, 32, 32))) == pytest.approx(1)


def test_an_uneven_range_is_uneven():
    mask = wedge(32, (-40, 70), 2)
    assert passed(mask, wave(32, z=6, x=3)) == pytest.approx(1)  # at 63 degrees
    assert passed(mask, wave(32, z=-6, x=3)) == pytest.approx(0, abs=1e-6)  # at -63 degrees


def test_the_last_tilt_counts_not_the_end_of_the_range():
    np.testing.assert_array_equal(tilt_angles((-60, 60), 50), [-60, -10, 40])
    np.testing.assert_array_equal(tilt_angles((-60, 60), 3)[[0, -1]], [-60, 60])
    assert wedge(32, (-60, 60), 7).sum() < wedge(32, (-60, 60), 3).sum()


def test_large_steps_leave_gaps_at_high_frequencies_only():
    sparse = wedge(32, (-60, 60), 20)
    dense = wedge(32, (-60, 60), 2)
    lost = (dense - sparse) > 0
    z, x = np.fft.fftfreq(32)[:, None, None] * 32, np.fft.rfftfreq(32)[None, None, :] * 32
    radius = np.broadcast_to(np.hypot(z, x), lost.shape)
    assert lost.any()
    assert radius[lost].min() > 1 / np.sin(np.deg2rad(10)) - 1e-6


def test_tilts_that_do_not_rise_are_refused():
    with pytest.raises(DataError, match="rise from low to high"):
        wedge(16, (60, -60), 3)


def test_wavelength():
    assert electron_wavelength_angstrom(300) == pytest.approx(0.019687, abs=2e-6)
    assert electron_wavelength_angstrom(200) == pytest.approx(0.025079, abs=2e-6)
    assert electron_wavelength_angstrom(100) == pytest.approx(0.037014, abs=2e-6)


def test_contrast_transfer_against_its_formula_at_one_frequency():
    """At 1/40 per Å: chi = pi 0.019687 40000 / 1600 - pi/2 2.7e7 0.019687^3 / 40^4 = 1.546126 - 0.000126."""
    ctf = contrast_transfer(32, 10.0, **MICROSCOPE)
    chi = np.pi * 0.0196875 * 4e4 / 1600 - np.pi / 2 * 2.7e7 * 0.0196875**3 / 40**4
    expected = np.sqrt(1 - 0.07**2) * np.sin(chi) + 0.07 * np.cos(chi)
    assert ctf[8, 0, 0] == pytest.approx(expected, abs=1e-4)  # 8 cycles in 32 voxels of 10 Å
    assert ctf[0, 8, 0] == ctf[0, 0, 8] == ctf[8, 0, 0]


def test_contrast_transfer_starts_at_the_amplitude_contrast_and_crosses_zero_where_it_has_to():
    ctf = contrast_transfer(128, 10.0, **{**MICROSCOPE, "spherical_aberration_mm": 0.0})
    assert ctf[0, 0, 0] == pytest.approx(0.07, abs=1e-6)
    profile = ctf[0, 0]
    (crossing,) = np.flatnonzero(np.diff(np.sign(profile)))[:1]
    # sin(chi + arcsin A) = 0 at chi = pi - arcsin A
    zero = np.sqrt((np.pi - np.arcsin(0.07)) / (np.pi * 0.0196875 * 4e4)) * 1280
    assert crossing < zero < crossing + 1
    assert (profile[1 : crossing + 1] > 0).all()  # protein is bright


def test_the_b_factor_dampens():
    plain = contrast_transfer(32, 10.0, **MICROSCOPE)
    damped = contrast_transfer(32, 10.0, **{**MICROSCOPE, "b_factor_square_angstrom": 1000.0})
    assert damped[0, 0, 0] == plain[0, 0, 0]
    assert damped[8, 0, 0] / plain[8, 0, 0] == pytest.approx(np.exp(-1000 / 4 / 1600), rel=1e-5)


def test_shapes_are_those_of_rfftn():
    assert wedge(24, (-60, 60), 3).shape == contrast_transfer(24, 10.0, **MICROSCOPE).shape == (24, 24, 13)
    assert wedge(24, (-60, 60), 3).dtype == contrast_transfer(24, 10.0, **MICROSCOPE).dtype == np.float32
