"""Filters and normalization of a batch of volumes, each by its own values, on whatever device the batch is.

Every function takes volumes [B, 1, D, H, W] of any floating dtype and returns float32 of the same shape. Filters work
in Fourier space, where a volume goes on at its opposite face.
"""

from __future__ import annotations

import math

import torch

from studytool import registry
from studytool.settings import InputSettings

_TAIL = 0.01


def network_input(volumes_B1DHW: torch.Tensor, voxel_size_angstrom: float, settings: InputSettings) -> torch.Tensor:
    """Floating volumes filtered and normalized as a study's `input:` says; what a network sees when it is evaluated."""
    apply = registry.lookup("filter", settings.filter, registry.FILTERS)
    normalize = registry.lookup("normalization", settings.normalize, registry.NORMALIZATIONS)
    prepared: torch.Tensor = normalize(apply(volumes_B1DHW, voxel_size_angstrom, settings))
    return prepared


def unfiltered(volumes_B1DHW: torch.Tensor, voxel_size_angstrom: float, settings: InputSettings) -> torch.Tensor:
    """The values as they are stored."""
    del voxel_size_angstrom, settings
    return volumes_B1DHW.float()


def low_pass(volumes_B1DHW: torch.Tensor, voxel_size_angstrom: float, settings: InputSettings) -> torch.Tensor:
    """Dampen what is finer than `low_pass_angstrom`, by a Gaussian, which does not ring; the mean stays."""
    shape_dhw = tuple(volumes_B1DHW.shape[2:])
    wave_number = _wave_number(shape_dhw, voxel_size_angstrom, volumes_B1DHW.device)
    return _multiplied(volumes_B1DHW, _gaussian(wave_number, settings.low_pass_angstrom))


def difference_of_gaussians(
    volumes_B1DHW: torch.Tensor, voxel_size_angstrom: float, settings: InputSettings
) -> torch.Tensor:
    """Keep what is between the two resolutions: the low-pass at `low_pass_angstrom` less that at `high_pass_angstrom`.

    The mean of every volume becomes 0.
    """
    shape_dhw = tuple(volumes_B1DHW.shape[2:])
    wave_number = _wave_number(shape_dhw, voxel_size_angstrom, volumes_B1DHW.device)
    fine = _gaussian(wave_number, settings.low_pass_angstrom)
    return _multiplied(volumes_B1DHW, fine - _gaussian(wave_number, settings.high_pass_angstrom))


def standard(volumes_B1DHW: torch.Tensor) -> torch.Tensor:
    """Mean 0 and deviation 1; a volume of one value throughout becomes 0."""
    flat = volumes_B1DHW.float().flatten(1)
    deviation, mean = torch.std_mean(flat, dim=1, correction=0, keepdim=True)
    return _scaled(flat - mean, deviation).view_as(volumes_B1DHW)


def percentile(volumes_B1DHW: torch.Tensor) -> torch.Tensor:
    """The 1st percentile becomes 0 and the 99th 1; what is beyond is clipped, so that no single voxel counts."""
    flat = volumes_B1DHW.float().flatten(1)
    beyond = 1 + round(_TAIL * (flat.shape[1] - 1))
    low = flat.topk(beyond, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    high = flat.topk(beyond, dim=1, largest=True, sorted=False).values.amin(1, keepdim=True)
    return _scaled(flat - low, high - low).clamp_(0, 1).view_as(volumes_B1DHW)


def minmax(volumes_B1DHW: torch.Tensor) -> torch.Tensor:
    """The lowest voxel becomes 0 and the highest 1, as studies before did it; a single voxel can dim all others."""
    flat = volumes_B1DHW.float().flatten(1)
    low, high = torch.aminmax(flat, dim=1, keepdim=True)
    return _scaled(flat - low, high - low).view_as(volumes_B1DHW)


def unchanged(volumes_B1DHW: torch.Tensor) -> torch.Tensor:
    """The values as they are stored."""
    return volumes_B1DHW.float()


def _wave_number(shape_dhw: tuple[int, ...], voxel_size_angstrom: float, device: torch.device) -> torch.Tensor:
    """The length of the spatial frequency in 1/Å of every coefficient of `rfftn`: [D, H, W // 2 + 1]."""
    depth, height, width = shape_dhw
    z, y = (torch.fft.fftfreq(side, voxel_size_angstrom, device=device) for side in (depth, height))
    x = torch.fft.rfftfreq(width, voxel_size_angstrom, device=device)
    return torch.sqrt(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2)


def _gaussian(wave_number: torch.Tensor, resolution_angstrom: float) -> torch.Tensor:
    """1 at 0 and one half at 1 / resolution: blurring with a deviation of 0.187 of the resolution."""
    return torch.exp(-math.log(2) * (wave_number * resolution_angstrom) ** 2)


def _multiplied(volumes_B1DHW: torch.Tensor, transfer: torch.Tensor) -> torch.Tensor:
    axes = (2, 3, 4)
    spectra = torch.fft.rfftn(volumes_B1DHW.float(), dim=axes)
    filtered: torch.Tensor = torch.fft.irfftn(spectra * transfer, s=volumes_B1DHW.shape[2:], dim=axes)
    return filtered


def _scaled(flat: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Divide by `spread`; where it is zero, `flat` is zero throughout and stays so."""
    return flat / torch.where(spread > 0, spread, 1)
