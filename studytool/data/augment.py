"""Augmentations of a batch of volumes [B, 1, D, H, W]: each volume gets its own draw from the generator.

Half turns, shifts, noise and contrast keep what a subtomogram is; each of the others changes something of it, as its
first lines say, and is for who knows that it may change. The generator may live on the CPU or on the device of the
volumes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812

SHIFT_FRACTION = 0.1
NOISE_DEVIATION = 0.3
CONTRAST_RANGE = (0.75, 1.25)
IN_PLANE_DEGREES = 45.0
IN_PLANE_SHIFT = 0.1
IN_PLANE_SCALE = (0.9, 1.1)
CROP_AREA = (0.5, 1.0)


def half_turns(volumes_B1DHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Leave each volume as it is or turn it by 180 degrees about z, y or x, each as likely.

    Of the 24 rotations of the cube these alone keep the missing wedge of a single tilt axis in place. Turns about z
    and x are drawn independently; both together are the turn about y.
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


def contrast(volumes_B1DHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Multiply each volume's distance from its mean by 0.75 to 1.25."""
    factor = _between(CONTRAST_RANGE, _uniform(1, volumes_B1DHW, generator)[0])
    mean = volumes_B1DHW.mean(dim=(1, 2, 3, 4), keepdim=True)
    return mean + factor * (volumes_B1DHW - mean)


def flips(volumes_B1DHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each volume along each axis or not, each as likely. Half of the results have the other handedness.

    No molecule has a mirror image in nature, but at low resolution nothing may tell them apart.
    """
    mirrored = _uniform(3, volumes_B1DHW, generator) < 0.5
    for axis, chosen in enumerate(mirrored, start=2):
        volumes_B1DHW = torch.where(chosen, volumes_B1DHW.flip(axis), volumes_B1DHW)
    return volumes_B1DHW


def cube_rotations(volumes_B1DHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn each volume by one of the 24 rotations of the cube, each as likely; most turn the missing wedge as well.

    Raises:
        ValueError: the volumes are not cubes; `studytool.training.preflight` says so before a trial begins.
    """
    if len(set(volumes_B1DHW.shape[2:])) > 1:
        raise ValueError(f"the rotations of the cube need cubes, found {list(volumes_B1DHW.shape[2:])}")
    # Each rotation is one order of the axes and one half turn; an odd order mirrors, and so does the inversion.
    which, odd = _uniform(2, volumes_B1DHW, generator)
    once, twice = volumes_B1DHW.permute(0, 1, 3, 4, 2), volumes_B1DHW.permute(0, 1, 4, 2, 3)
    turned = torch.where(which < 1 / 3, volumes_B1DHW, torch.where(which < 2 / 3, once, twice))
    turned = torch.where(odd < 0.5, turned.transpose(3, 4).flip(2, 3, 4), turned)
    return half_turns(turned, generator)


def in_plane(volumes_B1DHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn half of the volumes about z by up to 45 degrees, move them by up to 0.1 and scale them by 0.9 to 1.1.

    All slices of a volume alike. It turns the missing wedge, changes the molecule's size and dampens noise, as values
    are interpolated. Beyond the edges the volume is reflected.
    """
    chosen, angle, down, right, size = _uniform(5, volumes_B1DHW, generator)
    reach = (-IN_PLANE_SHIFT, IN_PLANE_SHIFT)
    moved = resample_slices(
        volumes_B1DHW,
        degrees_B=_between((-IN_PLANE_DEGREES, IN_PLANE_DEGREES), angle).flatten(),
        shift_y_B=_between(reach, down).flatten(),
        shift_x_B=_between(reach, right).flatten(),
        scale_B=_between(IN_PLANE_SCALE, size).flatten(),
    )
    return torch.where(chosen < 0.5, moved, volumes_B1DHW)


def resized_crop(volumes_B1DHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cut 0.5 to 1 of the area of the slices of half of the volumes and enlarge it to the whole side.

    All slices of a volume alike. It changes the molecule's size in y and x and dampens noise, as values are
    interpolated.
    """
    chosen, area, down, right = _uniform(4, volumes_B1DHW, generator)
    side_B = torch.sqrt(_between(CROP_AREA, area)).flatten()
    # The crop's centre lies at (draw - 1/2) (1 - side) from the box's; it is moved there, enlarged.
    reach_B = (1 - side_B) / side_B
    cut = resample_slices(
        volumes_B1DHW,
        degrees_B=torch.zeros_like(side_B),
        shift_y_B=(0.5 - down.flatten()) * reach_B,
        shift_x_B=(0.5 - right.flatten()) * reach_B,
        scale_B=1 / side_B,
    )
    return torch.where(chosen < 0.5, cut, volumes_B1DHW)


def resample_slices(
    volumes_B1DHW: torch.Tensor,
    *,
    degrees_B: torch.Tensor,
    shift_y_B: torch.Tensor,
    shift_x_B: torch.Tensor,
    scale_B: torch.Tensor,
) -> torch.Tensor:
    """Scale each volume in y and x, turn it about z (from x towards y), then move it by fractions of its sides.

    The centre of the box stays where it is but for the move; values are interpolated linearly.
    """
    height, width = volumes_B1DHW.shape[3:]
    angle = degrees_B * (math.pi / 180)
    cosine, sine = torch.cos(angle) / scale_B, torch.sin(angle) / scale_B
    # From a place in the result to one in the volume; torch counts both from -1 to 1 along each side.
    from_x = torch.stack([cosine, -sine * (width / height)], dim=1)
    from_y = torch.stack([sine * (height / width), cosine], dim=1)
    offset = -2 * (from_x * shift_x_B[:, None] + from_y * shift_y_B[:, None])
    matrix_B = torch.stack([from_x, from_y, offset], dim=2)
    slices = volumes_B1DHW.squeeze(1)
    grid = F.affine_grid(matrix_B, list(slices.shape), align_corners=False)
    return F.grid_sample(slices, grid, padding_mode="reflection", align_corners=False).unsqueeze(1)


def _between(ends: tuple[float, float], uniform: torch.Tensor) -> torch.Tensor:
    return ends[0] + (ends[1] - ends[0]) * uniform


def _uniform(draws: int, volumes_B1DHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Numbers in [0, 1): [draws, B, 1, 1, 1, 1] on the device of the volumes."""
    shape = (draws, len(volumes_B1DHW), 1, 1, 1, 1)
    return torch.rand(shape, generator=generator, device=generator.device).to(volumes_B1DHW.device)
