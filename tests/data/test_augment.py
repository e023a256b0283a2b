from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from studytool import registry
from studytool.data import augment
from studytool.data.augment import (
    NOISE_DEVIATION,
    contrast,
    cube_rotations,
    flips,
    half_turns,
    in_plane,
    noise,
    resample_slices,
    resized_crop,
    shift,
)
from studytool.data.imaging import wedge


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def copies():
    """The same asymmetric volume 400 times."""
    one = torch.randn((1, 1, 10, 12, 20), generator=generator(7))
    return one.expand(400, -1, -1, -1, -1)


@pytest.mark.parametrize("name", registry.AUGMENTATIONS)
def test_the_generator_decides(copies, name):
    chosen = registry.lookup("augmentation", name, registry.AUGMENTATIONS)
    if name == "rotations24":
        copies = copies[..., :10, :10]
    first = chosen(copies, generator(1))
    assert (first.shape, first.dtype) == (copies.shape, torch.float32)
    torch.testing.assert_close(chosen(copies, generator(1)), first, rtol=0, atol=0)
    assert (chosen(copies, generator(2)) != first).any()
    assert any((first[0] != other).any() for other in first[1:9])  # each volume has its own draw


def test_half_turns_are_the_three_turns_and_nothing_else(copies):
    one = copies[0]
    turns = {
        "none": one,
        "about z": torch.rot90(one, 2, (2, 3)),
        "about y": torch.rot90(one, 2, (1, 3)),
        "about x": torch.rot90(one, 2, (1, 2)),
    }
    counts = Counter()
    for turned in half_turns(copies, generator()):
        (name,) = [name for name, volume in turns.items() if torch.equal(volume, turned)]
        counts[name] += 1
    assert set(counts) == set(turns)
    assert all(70 <= count <= 130 for count in counts.values())


def test_half_turns_keep_the_missing_wedge_in_place():
    half = torch.from_numpy(wedge(16, (-60, 60), 3))
    measured = torch.fft.irfftn(half * torch.fft.rfftn(torch.randn((40, 1, 16, 16, 16), generator=generator()), dim=(2, 3, 4)), s=(16, 16, 16))  # fmt: skip # noqa: E501
    spectra = torch.fft.rfftn(half_turns(measured, generator()), dim=(2, 3, 4)).abs()
    inside = spectra[:, 0, half == 1].mean()
    assert spectra[:, 0, half == 0].max() < 1e-4 * inside


def test_shift_moves_by_whole_voxels_up_to_a_tenth_around_the_edges(copies):
    one = copies[0, 0]
    seen = [set(), set(), set()]
    for moved in shift(copies, generator())[:, 0]:
        places = [
            (z, y, x)
            for z in (-1, 0, 1)
            for y in (-1, 0, 1)
            for x in (-2, -1, 0, 1, 2)
            if torch.equal(one.roll((z, y, x), (0, 1, 2)), moved)
        ]
        assert len(places) == 1
        for axis, steps in enumerate(places[0]):
            seen[axis].add(steps)
    assert seen == [{-1, 0, 1}, {-1, 0, 1}, {-2, -1, 0, 1, 2}]


def test_shift_of_a_volume_too_small_to_shift_leaves_it():
    volumes = torch.randn((3, 1, 8, 8, 8), generator=generator())
    torch.testing.assert_close(shift(volumes, generator()), volumes)


def test_noise_is_independent_of_the_volume_and_keeps_mean_and_deviation():
    volumes = 5 + 3 * torch.randn((64, 1, 16, 16, 16), generator=generator(3))
    noisy = noise(volumes, generator())
    before, after = volumes.flatten(1), noisy.flatten(1)
    torch.testing.assert_close(after.mean(1), before.mean(1), atol=0.1, rtol=0)
    torch.testing.assert_close(after.std(1), before.std(1), atol=0.15, rtol=0)
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(before, after, strict=True)])
    added = torch.sqrt(1 / correlation**2 - 1)  # deviation of the noise, of that of the volume
    assert added.max() < NOISE_DEVIATION * 1.1
    assert added.max() > NOISE_DEVIATION * 0.8
    assert added.mean() == pytest.approx(NOISE_DEVIATION / 2, rel=0.25)


def count(results, expected):
    """How often each of the expected volumes is among the results, each of which has to be one of them."""
    counts = Counter()
    for result in results:
        (name,) = [name for name, volume in expected.items() if torch.equal(volume, result)]
        counts[name] += 1
    return counts


def test_flips_are_the_eight_mirrorings(copies):
    one = copies[0]
    axes = [axes for n in range(4) for axes in itertools.combinations((1, 2, 3), n)]
    counts = count(flips(copies, generator()), {chosen: one.flip(chosen) for chosen in axes})
    assert len(counts) == 8
    assert min(counts.values()) >= 25


def test_cube_rotations_are_the_24_proper_ones_each_as_likely():
    one = torch.randn((1, 4, 4, 4), generator=generator(7))
    expected = {}
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            if round(np.linalg.det(np.eye(3)[list(order)] * signs)) == 1:
                mirrored = [1 + axis for axis in range(3) if signs[axis] < 0]
                expected[order, signs] = one.permute(0, *(1 + axis for axis in order)).flip(mirrored)
    assert len(expected) == 24
    counts = count(cube_rotations(one.expand(2400, 1, 4, 4, 4), generator()), expected)
    assert len(counts) == 24
    assert min(counts.values()) >= 65
    assert max(counts.values()) <= 140


def test_cube_rotations_are_for_cubes():
    with pytest.raises(ValueError, match=r"need cubes, found \[4, 4, 5\]"):
        cube_rotations(torch.zeros(1, 1, 4, 4, 5), generator())


def test_contrast_keeps_the_mean_and_the_picture(copies):
    one = copies[0] + 5
    factors = []
    for changed in contrast(copies + 5, generator()):
        factors.append(float(changed.std() / one.std()))
        torch.testing.assert_close(changed, one.mean() + factors[-1] * (one - one.mean()), atol=1e-4, rtol=0)
    assert 0.75 <= min(factors) < 0.78
    assert 1.22 < max(factors) <= 1.25


def resampled(volumes, degrees=0.0, shift_yx=(0.0, 0.0), scale=1.0):
    batch = len(volumes)
    return resample_slices(
        volumes,
        degrees_B=torch.full((batch,), degrees),
        shift_y_B=torch.full((batch,), shift_yx[0]),
        shift_x_B=torch.full((batch,), shift_yx[1]),
        scale_B=torch.full((batch,), scale),
    )


def test_resampling_by_nothing_changes_nothing(copies):
    torch.testing.assert_close(resampled(copies[:2]), copies[:2], atol=1e-5, rtol=1e-5)


def test_a_quarter_turn_goes_from_x_towards_y(copies):
    square = copies[:1, ..., :12]
    turned = resampled(square, degrees=90.0)
    torch.testing.assert_close(turned, torch.rot90(square, 1, (4, 3)), atol=1e-4, rtol=0)
    # What was beside the centre along x is now beside it along y.
    volume = torch.zeros(1, 1, 1, 9, 9)
    volume[..., 4, 7] = 1.0
    assert resampled(volume, degrees=90.0)[0, 0, 0, 7, 4] == pytest.approx(1.0, abs=1e-4)


def blob(shape_yx, centre_yx, deviation):
    y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float32) for side in shape_yx], indexing="ij")
    square = (y - centre_yx[0]) ** 2 + (x - centre_yx[1]) ** 2
    return torch.exp(-square / (2 * deviation**2)).expand(1, 1, 3, *shape_yx)


def centre_and_deviation(volume):
    height, width = volume.shape[3:]
    weights = volume[0, 0, 1] / volume[0, 0, 1].sum()
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cy, cx = float((weights * y).sum()), float((weights * x).sum())
    return cy, cx, math.sqrt(float((weights * ((y - cy) ** 2 + (x - cx) ** 2)).sum()) / 2)


def test_turn_scale_and_shift_of_a_blob_in_a_box_that_is_not_square():
    # 6 voxels along x from the centre (15.5, 23.5) of the slice.
    volume = blob((32, 48), (15.5, 29.5), 2.0)
    moved = resampled(volume, degrees=30.0, shift_yx=(0.1, -0.05), scale=1.1)
    reach = 6 * 1.1
    expected_y = 15.5 + reach * math.sin(math.radians(30)) + 0.1 * 32
    expected_x = 23.5 + reach * math.cos(math.radians(30)) - 0.05 * 48
    cy, cx, deviation = centre_and_deviation(moved)
    assert (cy, cx) == pytest.approx((expected_y, expected_x), abs=0.05)
    assert deviation == pytest.approx(2.2, rel=0.03)


def test_in_plane_moves_half_of_the_volumes_within_its_bounds(copies, monkeypatch):
    drawn = {}
    resample = augment.resample_slices

    def watched(volumes, **chosen):
        drawn.update(chosen)
        return resample(volumes, **chosen)

    monkeypatch.setattr(augment, "resample_slices", watched)
    results = in_plane(copies, generator())
    moved = [i for i, one in enumerate(results) if not torch.equal(one, copies[0])]
    assert 160 <= len(moved) <= 240
    for values, low, high in (
        (drawn["degrees_B"], -45, 45),
        (drawn["shift_y_B"], -0.1, 0.1),
        (drawn["shift_x_B"], -0.1, 0.1),
        (drawn["scale_B"], 0.9, 1.1),
    ):
        margin = 0.05 * (high - low)
        assert low <= values[moved].min() < low + margin
        assert high - margin < values[moved].max() <= high
    assert torch.corrcoef(torch.stack(list(drawn.values()))).fill_diagonal_(0).abs().max() < 0.2, "drawn independently"
    alone = resample(copies[:1], **{name: values[moved[0] : moved[0] + 1] for name, values in drawn.items()})
    torch.testing.assert_close(results[moved[0]], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("resampling", [in_plane, resized_crop])
def test_slices_are_not_mixed(resampling):
    """Volumes that change along z alone stay what they are."""
    volumes = torch.randn(40, 1, 6, 1, 1, generator=generator()).expand(40, 1, 6, 8, 10)
    torch.testing.assert_close(resampling(volumes, generator()), volumes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", [3, 4])
def test_a_crop_of_a_ramp_is_a_part_of_the_ramp(axis):
    ramp = torch.arange(32, dtype=torch.float32).view([32 if a == axis else 1 for a in range(5)])
    volumes = ramp.expand(300, 1, 2, 32, 32)
    crops = resized_crop(volumes, generator())
    changed = torch.stack([one for one in crops if not torch.equal(one, volumes[0])])
    assert 115 <= len(changed) <= 185
    lines = changed.amax((1, 2, 7 - axis))
    slopes = (lines[:, 30] - lines[:, 1]) / 29
    assert math.sqrt(0.5) - 0.01 < slopes.min() < 0.74
    assert 0.97 < slopes.max() <= 1.001
    assert lines.min() >= -1e-4
    assert lines.max() <= 31 + 1e-4
    assert (lines.mean(1) - 15.5).min() < -2
    assert (lines.mean(1) - 15.5).max() > 2
