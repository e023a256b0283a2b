from __future__ import annotations

import pytest
import torch

from studytool.pretraining import clips as generator
from studytool.pretraining.clips import CLASSES, MOTIONS, SHAPES, generate_clips


def test_shapes_and_normalization() -> None:
    clips = generate_clips(64, seed=3, clip_thw=(12, 16, 20))
    assert clips.clips_B1THW.shape == (64, 1, 12, 16, 20)
    assert clips.clips_B1THW.dtype == torch.float32
    flat = clips.clips_B1THW.flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat.std(1), torch.ones(64), atol=1e-3, rtol=0)


def test_the_seed_decides_everything() -> None:
    first, second, other = (generate_clips(8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.clips_B1THW, second.clips_B1THW)
    assert torch.equal(first.motions_B, second.motions_B)
    assert not torch.equal(first.clips_B1THW, other.clips_B1THW)


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = generate_clips(4, seed=5)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(generate_clips(4, seed=5).clips_B1THW, first.clips_B1THW)


def test_every_class_comes_as_often() -> None:
    clips = generate_clips(2 * len(CLASSES), seed=0, clip_thw=(4, 8, 8))
    counts = torch.bincount(clips.shapes_B * len(MOTIONS) + clips.motions_B, minlength=len(CLASSES))
    assert counts.tolist() == [2] * len(CLASSES)
    assert 24 <= len(CLASSES) == len(SHAPES) * len(MOTIONS)


def _moved(name: str, count: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centres and sizes of undisturbed pairs at rest and under a motion, at 9 times from -1 to 1."""
    chance = generator._Chance(torch.Generator().manual_seed(0), count)
    centres, sizes, _ = generator._sprites(chance, torch.full((count,), list(SHAPES).index("pair")))
    time = torch.linspace(-1, 1, 9).expand(count, 9)
    return centres, sizes, *MOTIONS[name](chance, time, centres, sizes)


def _spread(centres: torch.Tensor) -> torch.Tensor:
    return (centres[:, :, 0] - centres[:, :, 1]).norm(dim=-1)


def test_a_spin_keeps_distances_and_a_drift_moves_all_blobs_alike() -> None:
    rest, _, spun, _ = _moved("spin")
    torch.testing.assert_close(_spread(spun), _spread(rest).expand(-1, 9))
    rest, _, drifted, _ = _moved("drift")
    path = drifted - rest
    torch.testing.assert_close(path, path[:, :, :1].expand_as(path))
    torch.testing.assert_close(path[:, 0], -path[:, -1])


def test_a_split_parts_and_a_merge_joins() -> None:
    assert bool((_spread(_moved("split")[2]).diff(dim=1) > 0).all())
    assert bool((_spread(_moved("merge")[2]).diff(dim=1) < 0).all())


def test_a_pulse_changes_sizes_and_a_drift_does_not() -> None:
    assert bool((_moved("pulse")[3].std(dim=1) > 0).any())
    _, sizes, _, drifted = _moved("drift")
    torch.testing.assert_close(drifted, sizes.expand_as(drifted))


def test_a_sprite_lives_within_the_clip_or_throughout() -> None:
    life_BT, time_BT = generator._life(generator._Chance(torch.Generator().manual_seed(0), 64), 96)
    throughout = (life_BT > 0).all(1)
    assert 0 < int(throughout.sum()) < 64
    assert bool((time_BT[~throughout].abs().amax(1) > 1).all())
    torch.testing.assert_close(time_BT[throughout][:, [0, -1]].abs(), torch.ones(int(throughout.sum()), 2))


@pytest.mark.parametrize("shape", list(SHAPES))
def test_no_shape_has_more_blobs_than_there_is_room_for(shape: str) -> None:
    assert 1 <= len(SHAPES[shape]) <= generator._BLOBS
