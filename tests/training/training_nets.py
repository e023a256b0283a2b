"""Networks of a user's own, small enough for fast tests; named in settings as "training_nets:function"."""

from __future__ import annotations

import torch
from torch import nn


def convolutional() -> nn.Module:
    """A stem and two stages, with batch normalization and dropout."""
    return nn.Sequential(
        nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU()),
        nn.Sequential(nn.Conv3d(4, 8, 3, stride=2, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Dropout(0.1)),
        nn.Sequential(nn.Conv3d(8, 8, 3, stride=2, padding=1), nn.BatchNorm3d(8), nn.ReLU()),
    )


def pointlike() -> nn.Module:
    """Ends with batch normalization of a single voxel, which a batch of one volume cannot feed."""
    return nn.Sequential(
        nn.Sequential(nn.Conv3d(1, 4, 3, stride=2, padding=1)),
        nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Conv3d(4, 8, 1), nn.BatchNorm3d(8)),
    )


def patches() -> nn.Module:
    """Mostly linear layers, like a transformer."""
    return nn.Sequential(nn.Sequential(nn.Conv3d(1, 4, 4, stride=4), _Tokens()), nn.Linear(4, 64), nn.Linear(64, 64))


def exploding() -> nn.Module:
    """Its output is infinite from the start."""
    return nn.Sequential(nn.Sequential(nn.Conv3d(1, 4, 3), _Infinite()))


def infinite_in_evaluation() -> nn.Module:
    """Trains well, but its output is infinite in eval mode."""
    return nn.Sequential(nn.Sequential(nn.Conv3d(1, 4, 3)), nn.Sequential(_InfiniteInEvaluation()))


class _Tokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)


class _Infinite(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 0.0


class _InfiniteInEvaluation(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.training else x / 0.0
