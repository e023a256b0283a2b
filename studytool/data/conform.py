"""What makes volumes alike: order of axes, voxel size, box, contrast, normalization.

The middle of a box is the voxel n // 2 of each axis, as RELION, EMAN2 and Dynamo have it; it stays the middle.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from studytool.settings import ImportSettings

Volume = np.ndarray[Any, np.dtype[np.float32]]

_SAME_SIZE = 1e-4  # voxel sizes this near are one: over a box of 256 voxels that is a fortieth of a voxel
_ROUNDING = 1e-5  # of a deviation; a mean this near zero is zero
_SQUARES_FIT = (1e-12, 1e12)  # sums of squares of values between these neither vanish in float32 nor overflow
_HUNDREDTH = 0.01  # of a voxel may be missing for a new voxel to fit: 3.3333 Å stands for a third of 10


def conform(volume_DHW: Volume, voxel_size_angstrom: float, settings: ImportSettings) -> tuple[Volume, float]:
    """The volume as `settings` wants it, and its voxel size in Å: transpose, rescale, crop or pad, invert, normalize.

    The input is left as it is. All values have to be finite.
    """
    volume = volume_DHW
    if settings.transpose is not None:
        volume = transposed(volume, settings.transpose)
    if settings.rescale_to_angstrom is not None:
        volume = rescaled(volume, voxel_size_angstrom, settings.rescale_to_angstrom)
        voxel_size_angstrom = settings.rescale_to_angstrom
    if settings.box is not None:
        volume = cropped_or_padded(volume, settings.box)
    if settings.invert:
        volume = -volume
    if settings.normalize == "standard":
        volume = standardized(volume)
    return np.ascontiguousarray(volume, dtype=np.float32), voxel_size_angstrom


def conformed_shape(
    shape_dhw: tuple[int, int, int], voxel_size_angstrom: float, settings: ImportSettings
) -> tuple[int, int, int]:
    """The shape that `conform` gives a volume of `shape_dhw`."""
    if settings.box is not None:
        return (settings.box,) * 3
    return uncropped_shape(shape_dhw, voxel_size_angstrom, settings)


def uncropped_shape(
    shape_dhw: tuple[int, int, int], voxel_size_angstrom: float, settings: ImportSettings
) -> tuple[int, int, int]:
    """The shape that a volume has before it is cropped or padded."""
    sides = list(shape_dhw)
    if settings.transpose is not None:
        sides = [shape_dhw[axis] for axis in _order(settings.transpose)]
    if settings.rescale_to_angstrom is not None:
        sides = [_rescaled_side(side, settings.rescale_to_angstrom / voxel_size_angstrom) for side in sides]
    depth, height, width = sides
    return depth, height, width


def transposed(volume: Volume, order: str) -> Volume:
    """The axes in another order: "xyz->zyx" for an array whose first axis is x, which becomes z, y, x."""
    return volume.transpose(_order(order))


def rescaled(volume: Volume, voxel_size_angstrom: float, target_angstrom: float) -> Volume:
    """The volume sampled at another voxel size, by its Fourier series cut off at the coarser of the two Nyquist limits.

    This is Fourier cropping and padding, as cryo-EM programs rescale, since nothing below the limit is dampened and
    nothing above it can alias; but it is evaluated at the very positions of the new voxels, so that the new voxel size
    is exact where cropping a 32^3 box could only give a fraction of 32. The volume is taken to go on at its opposite
    face, as everywhere in Fourier space. The new box has as many voxels as fit into the old one.
    """
    scale = target_angstrom / voxel_size_angstrom
    if abs(scale - 1) < _SAME_SIZE:
        return volume
    values: Any = volume
    for axis, side in enumerate(volume.shape):
        values = np.moveaxis(np.tensordot(_resampling(side, scale), values, axes=(1, axis)), 0, axis)
    result: Volume = values.astype(np.float32)
    return result


def cropped_or_padded(volume: Volume, side: int) -> Volume:
    """The box of `side` voxels about the middle; what it has beyond the volume is filled with the volume's mean."""
    if all(old >= side for old in volume.shape):
        middle = [slice(old // 2 - side // 2, old // 2 - side // 2 + side) for old in volume.shape]
        return volume[tuple(middle)]
    out = np.full((side,) * 3, volume.mean(dtype=np.float64), dtype=np.float32)
    inner, outer = zip(*(_overlap(old, side) for old in volume.shape), strict=True)
    out[outer] = volume[inner]
    return out


def standardized(volume: Volume) -> Volume:
    """Mean 0 and deviation 1 over all voxels; a volume of one value throughout becomes 0."""
    peak = max(volume.max(), -volume.min())
    if peak > 0 and not _SQUARES_FIT[0] < peak < _SQUARES_FIT[1]:
        volume = volume / peak
    mean = volume.mean()
    centred: Volume = volume - mean
    rest = centred.mean()  # what float32 could not hold of a mean that is large beside the deviation
    deviation = math.sqrt(max(0.0, float(np.vdot(centred, centred)) / centred.size - float(rest) ** 2))
    if deviation <= np.finfo(np.float32).eps * abs(mean):
        return np.zeros_like(centred)
    if abs(rest) > _ROUNDING * deviation:
        centred -= rest
    centred *= np.float32(1 / deviation)
    return centred


def _order(order: str) -> list[int]:
    found, _, wanted = order.partition("->")
    return [found.index(axis) for axis in wanted]


def _overlap(old: int, new: int) -> tuple[slice, slice]:
    """Which part of the old side comes where in the new one, middle on middle."""
    shift = new // 2 - old // 2
    first, last = max(0, shift), min(new, shift + old)
    return slice(first - shift, last - shift), slice(first, last)


def _rescaled_side(side: int, scale: float) -> int:
    if abs(scale - 1) < _SAME_SIZE:
        return side
    return max(1, math.floor(side / scale + _HUNDREDTH))


@lru_cache(maxsize=16)
def _resampling(side: int, scale: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The matrix [new side, side] that evaluates a periodic series, cut off at the coarser Nyquist limit."""
    new_side = _rescaled_side(side, scale)
    positions = side // 2 + scale * (np.arange(new_side) - new_side // 2)
    offsets = positions[:, None] - np.arange(side)
    cycles = np.arange(side // 2 + 1) / side
    kept = np.where(cycles == 0, 1.0, 2.0) * (cycles <= 0.5 / max(scale, 1) * (1 + 1e-9))
    kept[np.isclose(cycles * max(scale, 1), 0.5)] /= 2  # at the limit itself half, as two frequencies meet there
    matrix = np.zeros_like(offsets)
    for frequency, weight in zip(cycles[kept > 0], kept[kept > 0], strict=True):  # one by one, as all need much memory
        matrix += weight / side * np.cos(2 * np.pi * frequency * offsets)
    return matrix
