from __future__ import annotations

import pytest
import torch
from torch import nn

from studytool.models.tiny import STAGES, own_name, r2plus1d_tiny, split


@pytest.mark.parametrize("shape", [(24, 24, 24), (32, 32, 32), (20, 32, 32), (16, 16, 16)])
def test_volumes_of_any_side_pass(shape: tuple[int, int, int]) -> None:
    network = r2plus1d_tiny().eval()
    with torch.no_grad():
        output = network(torch.zeros(2, 1, *shape))
    assert output.shape == (2, STAGES[-1][0], *(side // 4 for side in shape))


def test_every_convolution_is_spatial_or_temporal() -> None:
    network = r2plus1d_tiny()
    assert sum(p.numel() for p in network.parameters()) <= 600_000
    kernels = [module.kernel_size for module in network.modules() if isinstance(module, nn.Conv3d)]
    assert kernels
    for t, h, w in kernels:
        assert h == w
        assert t == 1 or h == 1


def test_the_stages_are_the_network() -> None:
    network = r2plus1d_tiny().eval()
    anatomy = split(network, (16, 16, 16))
    assert list(anatomy.stages) == ["stem", "stage1", "stage2", "stage3"]
    x = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(x).mean((2, 3, 4))
        for stage in anatomy.stages.values():
            x = stage(x)
        features = anatomy.pool(x)
    torch.testing.assert_close(features, expected)
    assert features.shape == (2, anatomy.features)


def test_names_of_the_adapted_network_are_the_networks_own() -> None:
    assert own_name("stages.stem.0.weight") in r2plus1d_tiny().state_dict()
