"""Measuring what a trial costs: seconds by phase, samples, floating-point operations, memory, energy.

Which time counts: everything a trial does with its device, from building the model to the last score, each second in
one of four phases. *data* is opening the dataset and the wait for the next batch, *train* and *evaluate* are what is
done with it, *checkpoint* is reading and writing the trial's files. What the driver does between two epochs is *idle*:
it is measured, but no part of the cost. The first, slower steps count as cost; only throughput leaves them out
(`studytool.training.cost.samples_per_second`). The device is waited for at the ends of phases, not of steps.
An epoch's checkpoint is charged to the epoch after it, the last one's to the last epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from studytool.results import Cost
from studytool.training.device import synchronize
from studytool.training.sensors import PeakMemory, energy_reader

Phase = Literal["data", "train", "evaluate", "checkpoint"]
StepKind = Literal["train", "evaluate", "features"]


class CostMeter:
    """Adds up what a trial costs, from what it had `spent` before it was resumed.

    `device_seconds` and energy are divided by `trials_side_by_side`, the trials that share the device.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        trials_side_by_side: int = 1,
        clock: Callable[[], float] = time.perf_counter,
        joules: Callable[[], float] | None = None,
    ) -> None:
        self.spent = Cost()
        self._device = device
        self._share = 1.0 / trials_side_by_side
        self._clock = clock
        self._joules = joules if joules is not None else energy_reader(device)
        self._seconds: dict[Phase, float] = {"data": 0.0, "train": 0.0, "evaluate": 0.0, "checkpoint": 0.0}
        self._energy = 0.0
        self._samples = 0
        self._flops = 0.0
        self._flops_of: dict[tuple[str, tuple[int, ...]], float] = {}
        self._memory = PeakMemory(device)
        self._open: list[Phase] = []
        self._idle = 0.0
        self.cache_fill_seconds = 0.0
        self.cache_saved_seconds = 0.0
        self._since = clock()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time what is done within the block; a phase within another one interrupts it.

        The device is waited for at the end of a phase, but not at that of *data*: the device may well compute while
        the next batch is read.
        """
        outermost = not self._open
        energy_before = self._joules() if outermost and self._joules else 0.0
        self._pass_time_to_open_phase()
        self._open.append(name)
        try:
            yield
        finally:
            if name != "data":
                synchronize(self._device)
                self._memory.sample()
            self._pass_time_to_open_phase()
            self._open.pop()
            if outermost and self._joules:
                self._energy += self._joules() - energy_before

    def seconds(self, name: Phase) -> float:
        """What a phase has taken since the resume."""
        return self._seconds[name]

    @contextmanager
    def step(self, kind: StepKind, shape: tuple[int, ...]) -> Iterator[bool]:
        """Count the samples (of training) and floating-point operations of one step on a batch of this shape.

        Gives whether operations are counted as it runs, for which a network has to run uncompiled.

        Operations are those of matrix products, convolutions and attention, a multiplication and an addition being
        two. The first step of each shape is counted as it runs, and so without the backward pass of what is frozen;
        the others have as many.
        """
        key = (kind, shape)
        if key in self._flops_of:
            yield False
        else:
            with FlopCounterMode(display=False, custom_mapping=_CORRECTED) as counter:
                yield True
            self._flops_of[key] = float(counter.get_total_flops())
        self._flops += self._flops_of[key]
        if kind == "train":
            self._samples += shape[0]

    def forget_steps(self) -> None:
        """Count the operations of the next steps anew: something else is trained from now on."""
        self._flops_of.clear()

    def total(self) -> Cost:
        """The cost so far, before and since the resume."""
        since = Cost(
            **{f"{name}_seconds": seconds for name, seconds in self._seconds.items()},
            device_seconds=sum(self._seconds.values()) * self._share,
            samples=self._samples,
            flops=self._flops,
            peak_memory_gib=self._memory.gib,
            energy_joules=None if self._joules is None else self._energy * self._share,
            idle_seconds=self._idle,
            cache_fill_seconds=self.cache_fill_seconds,
            cache_saved_seconds=self.cache_saved_seconds,
        )
        return self.spent + since

    def go_on_from(self, cost: Cost) -> None:
        """Add what the trial had cost before it was resumed."""
        self.spent = cost

    def take(self) -> Cost:
        """The cost since the last call, outside of phases; counting begins anew."""
        total, self.spent = self.total(), Cost()
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._energy = self._flops = self._idle = self.cache_fill_seconds = self.cache_saved_seconds = 0.0
        self._samples = 0
        return total

    def _pass_time_to_open_phase(self) -> None:
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        else:
            self._idle += now - self._since
        self._since = now


class Share:
    """The cost of one of several trials that are trained together, under a meter that they have in common.

    What they do together is shared out by `settle`; a `phase` of this object is the trial's own, with all that the
    meter has counted since then. The peak of memory is that of all.
    """

    def __init__(self, meter: CostMeter) -> None:
        self.spent = Cost()
        self._meter = meter

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time what is done for this trial alone; see `CostMeter.phase`."""
        try:
            with self._meter.phase(name):
                yield
        finally:
            self.spent = self.spent + self._meter.take()

    def go_on_from(self, cost: Cost) -> None:
        """Add what the trial had cost before it was resumed."""
        self.spent = cost + self.spent

    def total(self) -> Cost:
        """The trial's cost so far."""
        return self.spent


def settle(meter: CostMeter, shares: Sequence[Share]) -> None:
    """Charge what was done since the last time to these trials, in equal parts."""
    if shares:
        part = meter.take().shared(len(shares))
        for share in shares:
            share.spent = share.spent + part


def _convolution_backward_flops(
    grad_out: Sequence[int], volumes: Sequence[int], weight: Sequence[int], *rest: Any, **_options: Any
) -> int:
    """Each gradient that is asked for takes as many operations as the forward pass.

    torch 2.15 counts the weight gradient of a grouped convolution once for every group: 64 times too much for a
    depthwise one of 64 channels.
    """
    transposed, output_mask = rest[4], rest[7]
    positions = math.prod((volumes if transposed else grad_out)[2:])
    forward = 2 * grad_out[0] * positions * math.prod(weight)
    return forward * (int(output_mask[0]) + int(output_mask[1]))


_CORRECTED = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
