"""Augmentations that keep what a subtomogram is: each volume of a batch gets its own draw from the generator.

Of the 24 rotations of the cube only those here keep the missing wedge of a single tilt axis in place; mirror images
would change the handedness of the molecule. The generator may live on the CPU or on the device of the volumes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

SHIFT_FRACTION = 0.1
NOISE_DEVIATION = 0.3


def half_turns(volumes_B1DHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Leave each volume as it is or turn it by 180 degrees about z, y or x, each as likely.

    Turns about z and x are drawn independently; both together are the turn about y.
    """
    about_z, about_x = _uniform(2, volumes_B1DHW, generator) < 0.5
    turned = torch.where(about_z, volumes_B1DHW.flip(3, 4), volumes_B1DHW)
    return torch.where(about_x, turned.flip(2, 3), turned)


def shift(volumes_B1DHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move each volume by whole voxels along each axis, up to a tenth of its side, around the edges.

    What leaves at one face enters at the other, so that mean, deviation and noise stay as they are.
    """
    reach = [int(side * SHIFT_FRACTION) for side in volumes_B1DHW.shape[2:]]
    starts = [
        (_uniform(1, volumes_B1DHW, generator).flatten() * (2 * far + 1)).long().clamp_(max=2 * far) for far in reach
    ]
    z, y, x = reach
    windows = F.pad(volumes_B1DHW, (x, x, y, y, z, z), mode="circular").squeeze(1)
    for axis, side in enumerate(volumes_B1DHW.shape[2:], start=1):
        windows = windows.unfold(axis, side, 1)
    sample = torch.arange(len(volumes_B1DHW), device=volumes_B1DHW.device)
    return windows[sample, starts[0], starts[1], starts[2]].unsqueeze(1)


def noise(volumes_B1DHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add white noise of up to 0.3 of each volume's deviation, and scale back to the deviation that it had."""
    amount = NOISE_DEVIATION * _uniform(1, volumes_B1DHW, generator)[0]
    deviation, mean = torch.std_mean(volumes_B1DHW, dim=(1, 2, 3, 4), correction=0, keepdim=True)
    added = torch.empty(volumes_B1DHW.shape, device=generator.device).normal_(generator=generator)
    noisy = volumes_B1DHW - mean + amount * deviation * added.to(volumes_B1DHW.device)
    return mean + noisy / torch.sqrt(1 + amount**2)


def _uniform(draws: int, volumes_B1DHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Numbers in [0, 1): [draws, B, 1, 1, 1, 1] on the device of the volumes."""
    shape = (draws, len(volumes_B1DHW), 1, 1, 1, 1)
    return torch.rand(shape, generator=generator, device=generator.device).to(volumes_B1DHW.device)
