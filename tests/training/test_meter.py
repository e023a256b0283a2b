from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from studytool.models.build import build_model
from studytool.results import Cost
from studytool.settings import ModelSettings
from studytool.training.meter import CostMeter

CPU = torch.device("cpu")


class Hand:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_seconds_go_to_the_innermost_phase_and_idle_time_is_no_cost():
    hand = Hand()
    meter = CostMeter(CPU, clock=hand, trials_side_by_side=2)
    with meter.phase("train"):
        hand.time += 1
        with meter.phase("data"):
            hand.time += 10
        hand.time += 2
    hand.time += 1000  # the driver's own business
    with meter.phase("evaluate"):
        hand.time += 20
    with meter.phase("checkpoint"):
        hand.time += 40
    cost = meter.total()
    assert (cost.train_seconds, cost.data_seconds) == (3, 10)
    assert (cost.evaluate_seconds, cost.checkpoint_seconds) == (20, 40)
    assert cost.seconds == 73
    assert cost.device_seconds == 73 / 2
    assert cost.idle_seconds == 1000


def test_a_phase_that_fails_is_closed():
    hand = Hand()
    meter = CostMeter(CPU, clock=hand)

    def fail() -> None:
        with meter.phase("train"):
            hand.time += 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    hand.time += 5
    with meter.phase("evaluate"):
        hand.time += 2
    assert (meter.total().train_seconds, meter.total().evaluate_seconds) == (1, 2)


def test_cost_before_a_resume_is_kept():
    hand = Hand()
    meter = CostMeter(CPU, clock=hand)
    meter.spent = Cost(train_seconds=5, device_seconds=5, samples=7, flops=11.0, peak_memory_gib=1000.0, idle_seconds=3)
    hand.time += 2
    with meter.phase("train"):
        hand.time += 1
        with meter.step("train", (3, 1, 4, 4, 4)):
            pass
    cost = meter.total()
    assert (cost.train_seconds, cost.device_seconds, cost.samples, cost.flops) == (6, 6, 10, 11.0)
    assert (cost.peak_memory_gib, cost.idle_seconds) == (1000.0, 5)


def counter(joules: list[float]) -> Callable[[], float]:
    readings: Iterator[float] = iter(joules)
    return lambda: next(readings)


def test_energy_is_read_at_the_ends_of_outer_phases():
    meter = CostMeter(CPU, trials_side_by_side=2, joules=counter([10.0, 16.0, 100.0, 104.0]))
    with meter.phase("train"), meter.phase("data"):
        pass
    with meter.phase("evaluate"):
        pass
    assert meter.total().energy_joules == (6 + 4) / 2


def test_energy_is_unknown_unless_all_of_it_was_measured():
    assert CostMeter(CPU).total().energy_joules is None
    meter = CostMeter(CPU, joules=counter([1.0, 2.0]))
    meter.spent = Cost(train_seconds=1.0, energy_joules=None)
    with meter.phase("train"):
        pass
    assert meter.total().energy_joules is None
    half = CostMeter(CPU)
    half.spent = Cost(train_seconds=1.0, energy_joules=5.0)
    assert half.total().energy_joules == 5.0  # nothing was spent since
    with half.phase("train"):
        pass
    assert half.total().energy_joules is None


def step_flops(model: nn.Module, x: torch.Tensor) -> float:
    meter = CostMeter(CPU)
    with meter.step("train", tuple(x.shape)):
        model(x).sum().backward()
    return meter.total().flops


def test_operations_of_a_linear_layer():
    # 2 B I O forward, as many for the gradient of the weight; the input needs none.
    assert step_flops(nn.Linear(5, 7), torch.randn(3, 5)) == 2 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_operations_of_a_convolution_with_groups(groups: int):
    model = nn.Sequential(nn.Conv3d(8, 8, 1), nn.Conv3d(8, 16, 3, padding=1, groups=groups))
    first = 2 * 2 * 6**3 * 8 * 8
    second = 2 * 2 * 6**3 * 16 * (8 // groups) * 27
    # Forward and weight gradients of both; the gradient that the second hands back to the first.
    assert step_flops(model, torch.randn(2, 8, 6, 6, 6)) == 2 * first + 3 * second


def test_operations_of_a_transposed_convolution():
    model = nn.ConvTranspose3d(4, 6, 2, stride=2)
    assert step_flops(model, torch.randn(2, 4, 3, 3, 3)) == 2 * (2 * 2 * 27 * 4 * 6 * 8)


def test_what_is_frozen_has_no_backward_pass():
    flops = {}
    for freeze in ("none", "stem", "backbone"):
        settings = ModelSettings(backbone="training_nets:convolutional", freeze=freeze)
        model = build_model(settings, num_classes=3, volume_shape_dhw=(8, 8, 8), seed=0).train()
        flops[freeze] = step_flops(model, torch.randn(2, 1, 8, 8, 8))
    # 2 x batch x voxels x weights of each layer: voxels 8^3, 4^3, 2^3.
    stem, stage1, stage2 = (2 * 2 * n**3 * w for n, w in ((8, 4 * 27), (4, 4 * 8 * 27), (2, 8 * 8 * 27)))
    head = 2 * 2 * 8 * 3
    assert flops["none"] == 2 * stem + 3 * (stage1 + stage2 + head)
    assert flops["stem"] == stem + 2 * stage1 + 3 * (stage2 + head)
    assert flops["backbone"] == stem + stage1 + stage2 + 2 * head


def test_later_steps_of_the_same_shape_cost_as_much_as_the_first():
    model, meter = nn.Linear(5, 7), CostMeter(CPU)
    for size in (3, 3, 3, 2):
        with meter.step("train", (size, 5)):
            model(torch.randn(size, 5)).sum().backward()
    with meter.step("evaluate", (3, 5)), torch.no_grad():
        model(torch.randn(3, 5))
    cost = meter.total()
    assert cost.samples == 3 + 3 + 3 + 2
    assert cost.flops == (3 + 3 + 3 + 2) * 2 * (2 * 5 * 7) + 3 * 2 * 5 * 7


def test_forgotten_steps_are_counted_anew():
    model, meter = nn.Linear(5, 7), CostMeter(CPU)
    with meter.step("train", (3, 5)):
        model(torch.randn(3, 5)).sum().backward()
    model.requires_grad_(False)
    meter.forget_steps()
    with meter.step("train", (3, 5)):
        model(torch.randn(3, 5))
    assert meter.total().flops == 3 * (2 * 3 * 5 * 7)


def test_peak_memory_is_what_was_held_above_the_start():
    meter = CostMeter(CPU)
    with meter.phase("train"):
        block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    with meter.phase("evaluate"):
        pass
    assert 0.06 < meter.total().peak_memory_gib < 0.2


def test_the_clock_is_a_real_one():
    meter = CostMeter(CPU)
    before = time.perf_counter()
    with meter.phase("train"):
        time.sleep(0.01)
    assert 0.01 <= meter.total().train_seconds <= time.perf_counter() - before
