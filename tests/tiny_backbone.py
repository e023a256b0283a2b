"""A backbone of the user's own, small enough for tests of what is around it; files in its folder make it misbehave.

die             it kills its own process in the middle of a step, once
slow            seconds that every training step takes longer
too-large       with more volumes than that at once it asks for more memory than any machine has
count-steps     every training step adds a byte to this file
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn


class _Entry(nn.Sequential):
    def forward(self, volumes_B1DHW: torch.Tensor) -> torch.Tensor:
        if Path("die").is_file():
            Path("die").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if Path("too-large").is_file() and len(volumes_B1DHW) > int(Path("too-large").read_text()):
            torch.empty(2**60, dtype=torch.uint8)
        if self.training:
            if Path("slow").is_file():
                time.sleep(float(Path("slow").read_text()))
            if Path("count-steps").is_file():
                with Path("count-steps").open("ab") as file:
                    file.write(b".")
        return super().forward(volumes_B1DHW)


def tiny() -> nn.Module:
    """Two stages: 16^3 volumes train in milliseconds."""
    net = nn.Sequential()
    net.add_module("entry", _Entry(nn.Conv3d(1, 4, 3, stride=2, padding=1), nn.BatchNorm3d(4), nn.ReLU()))
    net.add_module("deep", nn.Sequential(nn.Conv3d(4, 8, 3, stride=2, padding=1), nn.BatchNorm3d(8), nn.ReLU()))
    return net
