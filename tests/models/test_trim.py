from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from network_cases import build, cases, needs, volumes
from torch import Tensor, nn

from studytool.models.trim import needed_taps, trim_kernels


def axes() -> Iterator[tuple[int, int, int, int, int]]:
    """Voxels, taps, stride, padding and dilation of every small convolution that there can be."""
    for axis in itertools.product((1, 2, 3, 5), (1, 2, 3, 5, 7), (1, 2), (0, 1, 2, 3), (1, 2)):
        voxels, taps, _stride, padding, dilation = axis
        if voxels + 2 * padding > dilation * (taps - 1):
            yield axis


def test_one_axis_against_torch():
    trimmed = 0
    for voxels, taps, stride, padding, dilation in axes():
        whole = nn.Conv1d(2, 3, taps, stride=stride, padding=padding, dilation=dilation).double()
        line = torch.randn(2, 2, voxels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        kept, rest = needed_taps(voxels, taps, stride, padding, dilation)
        found = nn.functional.conv1d(line, whole.weight[:, :, kept], whole.bias, stride, rest, dilation)
        torch.testing.assert_close(found, whole(line), msg=f"{(voxels, taps, stride, padding, dilation)}")
        trimmed += kept != slice(0, taps)
    assert trimmed == 34, "of them all"


def test_two_of_three_taps_meet_nothing_but_padding_at_a_single_voxel():
    assert needed_taps(1, 3, 1, 1, 1) == needed_taps(1, 3, 2, 1, 1) == (slice(1, 2), 0)
    assert needed_taps(2, 3, 1, 1, 1) == (slice(0, 3), 1)
    assert needed_taps(2, 3, 2, 1, 1) == (slice(1, 3), 0)
    assert needed_taps(2, 7, 1, 3, 1) == (slice(2, 5), 1)


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("name", cases({"r3d_18", "r2plus1d_tiny"}))
def test_a_network_gives_the_same_and_gets_the_same_gradients(name: str, side: int):
    needs(name)
    whole = build((side,) * 3, backbone=name).double().eval()
    trimmed = copy.deepcopy(whole)
    trim_kernels(trimmed)
    assert list(trimmed.state_dict()) == list(whole.state_dict())
    inputs = volumes(2, (side,) * 3).double()
    outputs = [model(inputs) for model in (whole, trimmed)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.square().sum().backward()
    for (parameter, expected), (_, found) in zip(whole.named_parameters(), trimmed.named_parameters(), strict=True):
        if expected.grad is not None:
            assert found.grad is not None, parameter
            torch.testing.assert_close(found.grad, expected.grad, msg=parameter)


def trimmed_stages(side: int) -> set[str]:
    """Those of R3D-18 with convolutions of which something is left out for volumes of that side."""
    model, seen = build((side,) * 3, backbone="r3d_18").eval(), set()

    def look(name: str, conv: nn.Conv3d, volumes_BCDHW: Tensor) -> None:
        sizes = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        for voxels, taps, *others in zip(volumes_BCDHW.shape[2:], *sizes, strict=True):
            if needed_taps(voxels, taps, *others)[0] != slice(0, taps):
                seen.add(name)

    for name, stage in model.stages.items():
        for module in stage.modules():
            if isinstance(module, nn.Conv3d):
                module.register_forward_pre_hook(lambda conv, inputs, name=name: look(name, conv, inputs[0]))
    model(volumes(1, (side,) * 3))
    return seen


def test_only_the_last_stage_of_a_small_volume_is_trimmed():
    assert trimmed_stages(16) == {"stage4"}
    assert trimmed_stages(32) == set()
