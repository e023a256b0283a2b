"""Convolutions without the taps of their kernels that meet nothing but padding.

Where a small volume has shrunk to one voxel along an axis, two of three taps there only ever multiply zeros, and their
gradients are 0. Kernels of 3 x 3 x 3 taps shrink to a ninth where two axes have, as in the last stage of R3D-18 at a
side of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


def trim_kernels(model: nn.Module) -> None:
    """Let the convolutions of a network leave out what meets nothing but padding; weights and names stay as they are.

    In float32 outputs and gradients are the same but for the order in which numbers are added. A network trimmed can be
    copied, but not pickled.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv3d)]
    for module in convolutions:
        is_plain = type(module)._conv_forward is nn.Conv3d._conv_forward and not is_parametrized(module)
        if is_plain and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = _trimmed(type(module))


def needed_taps(voxels: int, taps: int, stride: int, padding: int, dilation: int) -> tuple[slice, int]:
    """Which taps of a kernel meet a voxel, along one axis, and the padding on both sides that is right for them alone.

    All of them, with the padding as it was, where these would need more padding on one side than on the other.
    """
    if voxels > dilation * (taps - 1) + stride:
        return slice(0, taps), padding
    outputs, met = _outputs(voxels, taps, stride, padding, dilation), []
    for j in range(taps):
        # With output i it meets voxel i * stride + before.
        before = j * dilation - padding
        if max(0, -(before // stride)) <= min(outputs - 1, (voxels - 1 - before) // stride):
            met.append(j)
    first, last = (met[0], met[-1]) if met else (0, taps - 1)
    rest = padding - first * dilation
    if rest < 0 or _outputs(voxels, last - first + 1, stride, rest, dilation) != outputs:
        return slice(0, taps), padding
    return slice(first, last + 1), rest


def _outputs(voxels: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    return (voxels + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


class _Trimmed(nn.Conv3d):
    """Mixed into the class of a convolution."""

    def _conv_forward(self, volumes: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert not isinstance(self.padding, str)
        of_axes = zip(volumes.shape[-3:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        kept, paddings = zip(*(needed_taps(*of_axis) for of_axis in of_axes), strict=True)
        if any(taps.stop - taps.start < size for taps, size in zip(kept, self.kernel_size, strict=True)):
            weight = weight[:, :, kept[0], kept[1], kept[2]]
        return torch.conv3d(volumes, weight, bias, self.stride, paddings, self.dilation, self.groups)


_KINDS: dict[type[nn.Conv3d], type[nn.Conv3d]] = {}


def _trimmed(kind: type[nn.Conv3d]) -> type[nn.Conv3d]:
    if kind not in _KINDS:
        # By its name the cache of frozen parts tells it from the class without.
        _KINDS[kind] = type(f"Trimmed{kind.__name__}", (_Trimmed, kind), {"__module__": kind.__module__})
    return _KINDS[kind]
