from __future__ import annotations

import math

import pytest
import torch

from studytool import registry
from studytool.data.preprocess import difference_of_gaussians, low_pass, minmax, percentile, standard, unchanged
from studytool.settings import InputSettings


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


def wave(shape_dhw, cycles_dhw):
    """A wave with so many periods along each axis: [1, 1, D, H, W]."""
    places = torch.meshgrid(*[torch.arange(side) / side for side in shape_dhw], indexing="ij")
    phase = sum(cycles * place for cycles, place in zip(cycles_dhw, places, strict=True))
    return torch.cos(2 * math.pi * phase + 0.3)[None, None]


# Periods and their wavelength in boxes of 12 x 16 x 20 voxels of 10 Å.
WAVES = [((0, 0, 5), 40.0), ((0, 4, 0), 40.0), ((3, 0, 0), 40.0), ((0, 0, 1), 200.0), ((3, 4, 0), 40 / math.sqrt(2))]


@pytest.mark.parametrize(("cycles", "wavelength"), WAVES)
def test_filters_multiply_a_wave_by_what_they_promise(cycles, wavelength):
    volumes = wave((12, 16, 20), cycles)
    settings = InputSettings(low_pass_angstrom=40.0, high_pass_angstrom=160.0)
    fine, coarse = (0.5 ** ((cutoff / wavelength) ** 2) for cutoff in (40.0, 160.0))
    torch.testing.assert_close(low_pass(volumes, 10.0, settings), fine * volumes, atol=1e-6, rtol=0)
    expected = (fine - coarse) * volumes
    torch.testing.assert_close(difference_of_gaussians(volumes, 10.0, settings), expected, atol=1e-6, rtol=0)


def test_low_pass_passes_half_at_its_resolution_most_above_and_little_below():
    settings = InputSettings(low_pass_angstrom=40.0)

    def passed(cycles):
        volumes = wave((32, 32, 32), (0, cycles, 0))
        return float(low_pass(volumes, 10.0, settings).std() / volumes.std())

    assert passed(8) == pytest.approx(0.5, abs=1e-5)
    assert passed(2) > 0.95  # 160 Å
    assert passed(15) < 0.1  # 21 Å


def test_low_pass_keeps_a_constant_and_dog_removes_it():
    volumes = torch.full((2, 1, 8, 9, 10), 5.0)
    torch.testing.assert_close(low_pass(volumes, 10.0, InputSettings()), volumes)
    assert difference_of_gaussians(volumes, 10.0, InputSettings()).abs().max() < 1e-5


def test_a_filter_knows_the_voxel_size():
    volumes = wave((16, 16, 16), (0, 0, 4))
    coarse, fine = (low_pass(volumes, size, InputSettings(low_pass_angstrom=40.0)).std() for size in (20.0, 5.0))
    assert float(coarse / volumes.std()) == pytest.approx(0.5 ** (1 / 4), abs=1e-5)  # a wave of 80 Å
    assert float(fine / volumes.std()) == pytest.approx(0.5**4, abs=1e-5)  # a wave of 20 Å


@pytest.mark.parametrize("name", registry.FILTERS)
def test_filters_give_float32_and_take_each_volume_for_itself(volumes, name):
    chosen = registry.lookup("filter", name, registry.FILTERS)
    result = chosen(volumes, 10.0, InputSettings())
    assert (result.shape, result.dtype) == (volumes.shape, torch.float32)
    torch.testing.assert_close(chosen(volumes[2:3], 10.0, InputSettings()), result[2:3])
    if name == "none":
        assert torch.equal(result, volumes.float())


def test_dog_needs_its_resolutions_in_order():
    with pytest.raises(ValueError, match=r"low_pass_angstrom \(200\) has to be below high_pass_angstrom \(150\)"):
        InputSettings(filter="dog", low_pass_angstrom=200.0)
    InputSettings(filter="low_pass", low_pass_angstrom=200.0)
