"""A backbone of the user's own, small enough for tests of what is around it."""

from __future__ import annotations

from torch import nn


def tiny() -> nn.Module:
    """Two stages: 16^3 volumes train in milliseconds."""
    net = nn.Sequential()
    net.add_module("entry", nn.Sequential(nn.Conv3d(1, 4, 3, stride=2, padding=1), nn.BatchNorm3d(4), nn.ReLU()))
    net.add_module("deep", nn.Sequential(nn.Conv3d(4, 8, 3, stride=2, padding=1), nn.BatchNorm3d(8), nn.ReLU()))
    return net
