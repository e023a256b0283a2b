"""Normalization of a batch of volumes, each by its own values, on whatever device the batch is.

Every function takes volumes [B, 1, D, H, W] of any floating dtype and returns float32 of the same shape.
"""

from __future__ import annotations

import torch

_TAIL = 0.01


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


def _scaled(flat: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Divide by `spread`; where it is zero, `flat` is zero throughout and stays so."""
    return flat / torch.where(spread > 0, spread, 1)
