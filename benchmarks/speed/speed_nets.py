"""Networks for measuring what is around the training."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

SECONDS_PER_BATCH = 0.1
PASSES = "STUDYTOOL_BENCHMARK_PASSES"
"""The environment variable with the folder for `PID.txt`: begin and end of every pass, and whether it trained."""


class _Waiting(nn.Sequential):
    """A layer that takes a tenth of a second, whatever it computes."""

    def forward(self, volumes_B1DHW: torch.Tensor) -> torch.Tensor:
        begun = time.time()
        time.sleep(SECONDS_PER_BATCH)
        with Path(os.environ[PASSES], f"{os.getpid()}.txt").open("a") as file:
            file.write(f"{begun} {time.time()} {int(torch.is_grad_enabled() and self.training)}\n")
        return super().forward(volumes_B1DHW)


def waiting() -> nn.Module:
    """Hardly any computing: with 10 batches in training and validation together a trial takes a second."""
    return nn.Sequential(
        _Waiting(nn.Conv3d(1, 4, 3, stride=4)), nn.Sequential(nn.Conv3d(4, 8, 3, stride=2, padding=1), nn.ReLU())
    )
