"""What a microscope and a tilt series do to a density, as multipliers in Fourier space."""

from __future__ import annotations

from typing import Any

import numpy as np

from studytool.errors import DataError

Spectrum = np.ndarray[Any, np.dtype[np.float32]]


def contrast_transfer(
    side: int,
    voxel_size_angstrom: float,
    *,
    defocus_um: float,
    voltage_kv: float,
    spherical_aberration_mm: float,
    amplitude_contrast: float,
    b_factor_square_angstrom: float,
) -> Spectrum:
    """Contrast transfer of a volume for `numpy.fft.rfftn`: float32 [side, side, side // 2 + 1].

    sqrt(1 - A^2) sin(chi) + A cos(chi) with chi = pi lambda dz k^2 - pi / 2 Cs lambda^3 k^4 and underfocus positive,
    times exp(-B k^2 / 4). The sign is that of inverted images: protein is bright. One defocus holds for the whole box
    and the function depends on |k| alone, as at the low resolution of subtomograms it may. Source: Rohou and
    Grigorieff, J. Struct. Biol. 192 (2015) 216-221.
    """
    wavelength = electron_wavelength_angstrom(voltage_kv)
    z, y, x = _frequencies(side)
    squared = (z**2 + y**2 + x**2) / voxel_size_angstrom**2
    chi = np.pi * wavelength * (defocus_um * 1e4) * squared
    chi -= np.pi / 2 * (spherical_aberration_mm * 1e7) * wavelength**3 * squared**2
    transfer = np.sqrt(1 - amplitude_contrast**2) * np.sin(chi) + amplitude_contrast * np.cos(chi)
    return np.asarray(transfer * np.exp(-b_factor_square_angstrom * squared / 4), dtype=np.float32)


def electron_wavelength_angstrom(voltage_kv: float) -> float:
    """Relativistic de Broglie wavelength of an electron, in Å; 0.0197 at 300 kV."""
    volts = voltage_kv * 1e3
    return float(12.2643 / np.sqrt(volts + 0.978466e-6 * volts**2))


def wedge(side: int, tilt_range_degrees: tuple[float, float], tilt_step_degrees: float) -> Spectrum:
    """Which frequencies a tilt series about y, with the beam along z, has measured: 1 or 0, for `numpy.fft.rfftn`.

    Float32 [side, side, side // 2 + 1]. The image at tilt angle a measures the plane through the origin that is turned
    by a about y. A frequency counts as measured when its angle lies between the first and the last tilt that the step
    makes, and the nearest plane is no more than one Fourier voxel away (so large steps leave gaps between planes).

    Raises:
        DataError: the range holds no tilt.
    """
    tilts = tilt_angles(tilt_range_degrees, tilt_step_degrees)
    z, y, x = (np.round(axis * side) for axis in _frequencies(side))
    angles = np.rad2deg(np.arctan2(z, x)) + 0 * y
    nearest = np.abs(angles[..., None] - tilts).min(axis=-1)
    distance = np.hypot(z, x) * np.sin(np.deg2rad(np.minimum(nearest, 90)))
    inside = (angles >= tilts[0] - 1e-6) & (angles <= tilts[-1] + 1e-6)
    on_axis = np.hypot(z, x) + 0 * y == 0  # the tilt axis is in every plane
    return np.asarray((inside & (distance <= 1)) | on_axis, dtype=np.float32)


def tilt_angles(tilt_range_degrees: tuple[float, float], tilt_step_degrees: float) -> np.ndarray[Any, Any]:
    """The angles of a tilt series: from the low end in steps, as far as the high end allows."""
    low, high = tilt_range_degrees
    if not low < high or tilt_step_degrees <= 0:
        raise DataError(
            f"tilts have to rise from low to high in positive steps, found {low} to {high} by {tilt_step_degrees}"
        )
    return np.arange(low, high + 1e-6, tilt_step_degrees)


def _frequencies(side: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Cycles per voxel along z, y and x in the order of `numpy.fft.rfftn`, ready to be broadcast."""
    full = np.fft.fftfreq(side)
    return full[:, None, None], full[None, :, None], np.fft.rfftfreq(side)[None, None, :]
