from __future__ import annotations

import pytest
import torch

from studytool import registry
from studytool.data.preprocess import minmax, percentile, standard, unchanged


@pytest.fixture
def volumes():
    """Of different brightness and contrast, asymmetric, in float16."""
    generator = torch.Generator().manual_seed(0)
    volumes = torch.rand((5, 1, 8, 6, 10), generator=generator) ** 3
    scale = torch.tensor([0.1, 1, 10, 100, 1000]).view(-1, 1, 1, 1, 1)
    return (volumes * scale - scale).half()


@pytest.mark.parametrize("name", registry.NORMALIZATIONS)
def test_shape_dtype_and_independence_of_the_rest_of_the_batch(volumes, name):
    normalize = registry.lookup("normalization", name, registry.NORMALIZATIONS)
    result = normalize(volumes)
    assert (result.shape, result.dtype) == (volumes.shape, torch.float32)
    torch.testing.assert_close(normalize(volumes[2:3]), result[2:3])


@pytest.mark.parametrize("normalize", [standard, percentile, minmax])
def test_brightness_and_contrast_do_not_matter(volumes, normalize):
    volumes = volumes.float()
    torch.testing.assert_close(normalize(3 * volumes + 7), normalize(volumes), atol=2e-4, rtol=0)


@pytest.mark.parametrize("normalize", [standard, percentile, minmax])
def test_a_volume_of_one_value_becomes_zero(normalize):
    assert (normalize(torch.full((2, 1, 4, 4, 4), 7.0)) == 0).all()


def test_standard(volumes):
    result = standard(volumes).flatten(1)
    torch.testing.assert_close(result.mean(1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.std(1, correction=0), torch.ones(5))


def test_percentile_on_a_ramp():
    ramp = torch.randperm(1001, generator=torch.Generator().manual_seed(0)).float().view(1, 1, 7, 11, 13)
    expected = ((ramp - 10) / 980).clamp(0, 1)
    torch.testing.assert_close(percentile(ramp), expected)


def test_one_hot_voxel_moves_minmax_but_not_percentile(volumes):
    volumes = volumes.float()[:1]
    hot = volumes.clone()
    hot[0, 0, 1, 2, 3] = 1e4
    torch.testing.assert_close(percentile(hot)[hot != 1e4], percentile(volumes)[hot != 1e4], atol=0.02, rtol=0)
    assert minmax(hot)[hot != 1e4].max() < 0.01


def test_minmax(volumes):
    result = minmax(volumes).flatten(1)
    assert (result.amin(1) == 0).all()
    assert (result.amax(1) == 1).all()


def test_unchanged(volumes):
    torch.testing.assert_close(unchanged(volumes), volumes.float(), rtol=0, atol=0)
