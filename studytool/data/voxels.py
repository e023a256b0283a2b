"""How voxels are stored: as float16 or float32, or as 256 even steps from -6 to 6 in uint8, for normalized volumes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from studytool.errors import DataError
from studytool.settings import Dtype

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

DTYPES: tuple[str, ...] = get_args(Dtype)

_LOWEST, _STEP = np.float32(-6.0), np.float32(12.0 / 255)
_MOST_CUT_OFF = 1e-3  # of the voxels; of white noise beyond 6 deviations there are 2e-9
_LEAST_DEVIATION, _MOST_DEVIATION = 0.5, 2.0


def store(volume_DHW: Array, out: Array, name: str) -> None:
    """Round a float32 volume into `out`, which is of a stored dtype; `name` is the particle's, for errors.

    The error of float16 is 2^-11 of each value. In uint8 values move by at most 0.024, beyond ±6 to the end: 37 dB for
    a volume of deviation 1.

    Raises:
        DataError: voxels are not finite or too large for the dtype, or the volume is not normalized as uint8 needs it.
    """
    peak = float(max(volume_DHW.max(), -volume_DHW.min()))  # NaN if any voxel is
    if not math.isfinite(peak):
        raise DataError(f"particle {name!r}: {np.count_nonzero(~np.isfinite(volume_DHW))} voxels are NaN or infinite")
    if out.dtype != np.uint8 and peak > float(np.finfo(out.dtype).max):
        raise DataError(
            f"particle {name!r}: a voxel of {peak:g} does not fit into {out.dtype}; normalize, or use float32"
        )
    if out.dtype != np.uint8:
        out[...] = volume_DHW
        return
    deviation = float(volume_DHW.std())
    cut_off = np.count_nonzero(np.abs(volume_DHW) > -_LOWEST) / volume_DHW.size
    if not _LEAST_DEVIATION <= deviation <= _MOST_DEVIATION or cut_off > _MOST_CUT_OFF:
        raise DataError(
            f"particle {name!r}: uint8 keeps values from -6 to 6, this volume has deviation {deviation:.3g} and "
            f"{cut_off:.1%} of its voxels beyond; normalize it to mean 0 and deviation 1, or use float16"
        )
    steps = np.rint((volume_DHW - _LOWEST) / _STEP)
    out[...] = np.clip(steps, 0, 255)


def widened(volumes: Array) -> Array:
    """Stored volumes as float32."""
    values: Array = volumes.astype(np.float32)
    return values * _STEP + _LOWEST if volumes.dtype == np.uint8 else values


def widened_tensor(volumes: torch.Tensor) -> torch.Tensor:
    """Stored volumes as floating numbers, float16 as they are, on any device."""
    if volumes.is_floating_point():
        return volumes
    return volumes.float().mul_(float(_STEP)).add_(float(_LOWEST))
