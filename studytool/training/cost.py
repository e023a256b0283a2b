"""Questions about costs, answered from a trial's epochs alone; `studytool.training.meter` measures them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace

from studytool.results import Cost, DeviceInfo, EpochResult

CHECKPOINT_SHARE = 0.05
"""With `checkpoints: auto` one is written when that takes no more than this share of the time since the last one.

A trial that is killed loses the running epoch and, before it, at most 20 times what writing takes. By J. W. Young, "A
first order approximation to the optimum checkpoint interval" (1974), that interval suits trials that are killed every
200 times as long, which is minutes; where it happens less often, a twentieth is all there would be to gain.
"""
MOST_SECONDS_UNSAVED = 600.0
"""After so long a checkpoint is due however long writing takes."""


def cost_to_target(epochs: Sequence[EpochResult], target: float, sign: int) -> tuple[Cost, bool]:
    """What it cost until the validation value first reached `target`, and whether it ever did.

    `sign` is +1 where larger values are better, -1 where smaller ones are. A trial that never reaches the target is
    censored: what all of its epochs cost (a lower bound) and False. What came after the last epoch is not counted.
    """
    # The best value so far reaches the target in the same epoch as the value itself.
    reached = next((e for e in epochs if sign * e.best_value >= sign * target), None)
    cost = (reached or epochs[-1]).cost if epochs else Cost()
    if cost.ending_device_seconds:
        # Taken from all phases alike, as device-seconds alone matter here.
        share = 1 - cost.ending_device_seconds / cost.device_seconds
        scaled = {name: share * getattr(cost, name) for name in ("device_seconds", *_PHASES)}
        cost = replace(cost, **scaled, ending_device_seconds=0.0)
    return cost, reached is not None


_PHASES = ("data_seconds", "train_seconds", "evaluate_seconds", "checkpoint_seconds")


def samples_per_second(epochs: Sequence[EpochResult]) -> float | None:
    """Training samples per second of the train phase: the median over the epochs after the first, the warm-up.

    None for fewer than two epochs.
    """
    rates = [
        (later.cost.samples - earlier.cost.samples) / (later.cost.train_seconds - earlier.cost.train_seconds)
        for earlier, later in itertools.pairwise(epochs)
    ]
    return statistics.median(rates) if rates else None


def share_of_peak(cost: Cost, device: DeviceInfo) -> float | None:
    """MFU of a trial: its operations over what the device could have done in all of its seconds; None if unknown.

    Waiting, evaluating and writing count as time. Of trials side by side on a GPU each has its own share; they add up.
    """
    if device.peak_flops is None or not cost.seconds:
        return None
    return cost.flops / cost.seconds / device.peak_flops
