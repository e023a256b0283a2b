"""A backbone of the user's own, small enough for tests of what is around it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import nn


class _Entry(nn.Sequential):
    """Kills its own process in the middle of a step when there is a file `die` in the folder, and removes that file."""

    def forward(self, volumes_B1DHW: torch.Tensor) -> torch.Tensor:
        if Path("die").is_file():
            Path("die").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(volumes_B1DHW)


def tiny() -> nn.Module:
    """Two stages: 16^3 volumes train in milliseconds."""
    net = nn.Sequential()
    net.add_module("entry", _Entry(nn.Conv3d(1, 4, 3, stride=2, padding=1), nn.BatchNorm3d(4), nn.ReLU()))
    net.add_module("deep", nn.Sequential(nn.Conv3d(4, 8, 3, stride=2, padding=1), nn.BatchNorm3d(8), nn.ReLU()))
    return net
