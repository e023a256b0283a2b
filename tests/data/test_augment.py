from __future__ import annotations

from collections import Counter

import pytest
import torch

from studytool import registry
from studytool.data.augment import NOISE_DEVIATION, half_turns, noise, shift
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
    augment = registry.lookup("augmentation", name, registry.AUGMENTATIONS)
    first = augment(copies, generator(1))
    assert (first.shape, first.dtype) == (copies.shape, torch.float32)
    torch.testing.assert_close(augment(copies, generator(1)), first, rtol=0, atol=0)
    assert (augment(copies, generator(2)) != first).any()
    assert (first[0] != first[1]).any() or (first[0] != first[2]).any()  # each volume has its own draw


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
