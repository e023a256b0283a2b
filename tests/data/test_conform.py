from __future__ import annotations

import numpy as np
import pytest
import scipy.signal

from studytool.data.conform import (
    conform,
    conformed_shape,
    cropped_or_padded,
    rescaled,
    standardized,
    transposed,
)
from studytool.settings import ImportSettings


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def marked(side):
    """A box that is zero but for its middle voxel."""
    volume = np.zeros((side,) * 3, dtype=np.float32)
    volume[side // 2, side // 2, side // 2] = 1
    return volume


# crop and pad


@pytest.mark.parametrize("old", [8, 9])
@pytest.mark.parametrize("new", [4, 5, 8, 9, 12, 13])
def test_the_middle_stays_the_middle(old, new):
    out = cropped_or_padded(marked(old), new)
    assert out.shape == (new,) * 3
    assert np.unravel_index(out.argmax(), out.shape) == (new // 2,) * 3


def test_padding_is_the_mean_and_the_volume_is_unchanged():
    volume = noise(6, 6, 6) + 5
    out = cropped_or_padded(volume, 10)
    np.testing.assert_array_equal(out[2:8, 2:8, 2:8], volume)
    outside = np.ones((10,) * 3, bool)
    outside[2:8, 2:8, 2:8] = False
    np.testing.assert_allclose(out[outside], volume.mean(), rtol=1e-6)


def test_one_axis_may_be_cropped_while_another_is_padded():
    volume = noise(4, 8, 12)
    out = cropped_or_padded(volume, 8)
    np.testing.assert_array_equal(out[2:6], volume[:, :, 2:10])
    np.testing.assert_allclose(out[:2], volume.mean(), atol=1e-6)


# rescale


def wave(side, cycles, voxel, points=None, phase=0.4):
    """A wave of `cycles` over a box of `side` voxels, its phase counted from the middle."""
    points = np.arange(side) if points is None else points
    return np.cos(2 * np.pi * cycles * (points - (len(points) // 2)) * voxel / side + phase)


@pytest.mark.parametrize("target", [5.0, 7.3, 10.0, 14.9, 20.0])
@pytest.mark.parametrize("side", [24, 25])
def test_what_both_grids_can_hold_is_kept_exactly(side, target):
    """A wave below both limits, sampled at the new positions, about the middle voxel."""
    scale = target / 10
    new = int(side / scale + 0.01)
    old_wave, new_wave = wave(side, 4, 1), wave(side, 4, scale, np.arange(new))
    volume = (old_wave[:, None, None] * old_wave[None, :, None] * old_wave).astype(np.float32)
    expected = new_wave[:, None, None] * new_wave[None, :, None] * new_wave
    np.testing.assert_allclose(rescaled(volume, 10, target), expected, atol=1e-5)


def test_what_the_coarser_grid_cannot_hold_is_gone_and_does_not_alias():
    volume = np.broadcast_to(wave(24, 9, 1), (24, 24, 24)).astype(np.float32)
    assert np.abs(rescaled(volume, 10, 20)).max() < 1e-5
    assert np.abs(volume[:, :, ::2]).max() > 0.5  # plain subsampling would have shown it as another wave


def test_an_integer_ratio_is_fourier_cropping_as_scipy_has_it():
    volume = noise(24, 24, 24)
    expected = volume
    for axis in range(3):
        expected = scipy.signal.resample(expected, 16, axis=axis)
    found = rescaled(volume, 10, 15)
    for axis in range(3):  # but for the limit itself, where conventions differ
        nyquist = np.cos(np.pi * np.arange(16)).reshape([-1 if axis == a else 1 for a in range(3)])
        found, expected = (v - (v * nyquist).mean(axis=axis, keepdims=True) * nyquist for v in (found, expected))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_mean_and_the_middle_are_kept_and_the_same_size_changes_nothing():
    volume = noise(15, 16, 17)
    assert rescaled(volume, 10, 10.0005) is volume
    np.testing.assert_allclose(rescaled(np.full((16,) * 3, 3.5, np.float32), 10, 13), 3.5, rtol=1e-6)
    smooth = np.exp(-((np.indices((32,) * 3) - 16) ** 2).sum(axis=0) / 18).astype(np.float32)
    for target in (6.0, 13.0, 17.0):
        out = rescaled(smooth, 10, target)
        assert np.unravel_index(out.argmax(), out.shape) == tuple(side // 2 for side in out.shape)
        assert out.max() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("target", "side"), [(10, 32), (20, 16), (5, 64), (3.3333, 96), (15, 21), (400, 1)])
def test_the_new_side(target, side):
    settings = ImportSettings(rescale_to_angstrom=float(target))
    assert conformed_shape((32, 32, 32), 10, settings) == (side,) * 3
    assert rescaled(np.zeros((32, 2, 2), np.float32), 10, target).shape[0] == side


# axes, contrast, normalization


@pytest.mark.parametrize("order", ["xyz->zyx", "zyx->zyx", "yxz->zyx", "zxy->zyx"])
def test_axes_are_put_where_their_names_say(order):
    sides = {"z": 2, "y": 3, "x": 4}
    stored = np.zeros([sides[axis] for axis in order[:3]], np.float32)
    assert transposed(stored, order).shape == (2, 3, 4)
    point = {"z": 1, "y": 2, "x": 3}
    stored[tuple(point[axis] for axis in order[:3])] = 1
    assert transposed(stored, order)[1, 2, 3] == 1


def test_standardized():
    out = standardized(noise(16, 16, 16) * 1e-4 + 7)
    assert out.mean() == pytest.approx(0, abs=1e-5)
    assert out.std() == pytest.approx(1, abs=1e-3)
    for value in (0, 3.25, 3.3, -1e9 / 7):
        assert not standardized(np.full((5, 6, 7), value, np.float32)).any()


def test_the_input_is_left_alone():
    volume = noise(8, 8, 8)
    before = volume.copy()
    conform(volume, 10, ImportSettings(box=6, invert=True, normalize="standard", transpose="xyz->zyx"))
    np.testing.assert_array_equal(volume, before)


def test_all_steps_together_in_their_order():
    volume = noise(12, 10, 8)
    settings = ImportSettings(box=7, rescale_to_angstrom=12.0, invert=True, normalize="standard", transpose="xyz->zyx")
    out, voxel_size = conform(volume, 9.0, settings)
    expected = standardized(-cropped_or_padded(rescaled(volume.transpose(2, 1, 0), 9, 12), 7))
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert (voxel_size, out.shape, out.dtype, out.flags.c_contiguous) == (12.0, (7, 7, 7), np.float32, True)
    unboxed = settings.model_copy(update={"box": None})
    assert conform(volume, 9.0, unboxed)[0].shape == conformed_shape(volume.shape, 9.0, unboxed) == (6, 7, 9)


def test_without_settings_only_the_type_changes():
    volume = noise(4, 5, 6)
    out, voxel_size = conform(volume, 3.5, ImportSettings(normalize="none"))
    np.testing.assert_array_equal(out, volume)
    assert voxel_size == 3.5


@pytest.mark.parametrize("wrong", ["xyz", "xyz->zy", "xxy->zyx", "zyx->abc", ""])
def test_transpose_has_to_name_the_three_axes_twice(wrong):
    with pytest.raises(ValueError, match="in two orders"):
        ImportSettings(transpose=wrong)
