"""What travels between the rooms: plain frozen records that know nothing of torch, Ray or MLflow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """How a trial ended; a pruned trial is never shown as finished."""

    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAILED = "FAILED"


@dataclass(frozen=True)
class Cost:
    """What a trial has used so far; costs of parts add up with `+`.

    Seconds are wall-clock seconds of the trial by phase; `device_seconds` is their sum times the number (or share)
    of devices the trial held. `flops` counts multiplications and additions of forward and, for what is trained,
    backward passes. `energy_joules` is None where the device reports none, and in a sum where a part lacks it.
    `idle_seconds` is the time that the trial held its place outside these phases, while its driver wrote things down;
    it is no part of `seconds`. Of those, `cache_fill_seconds` computed what is kept of frozen parts, or waited for
    another trial that did; `cache_saved_seconds` is what computing anew all that was used of it would have taken. Of
    the device-seconds, `lost_device_seconds` went into epochs that broke off or had to be trained again, which have no
    phases, and `ending_device_seconds` into what comes after the last epoch: writing the selected weights, and the test
    split.
    """

    data_seconds: float = 0.0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    device_seconds: float = 0.0
    samples: int = 0
    flops: float = 0.0
    peak_memory_gib: float = 0.0
    energy_joules: float | None = None
    idle_seconds: float = 0.0
    cache_fill_seconds: float = 0.0
    cache_saved_seconds: float = 0.0
    lost_device_seconds: float = 0.0
    ending_device_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all phases."""
        return self.data_seconds + self.train_seconds + self.evaluate_seconds + self.checkpoint_seconds

    @property
    def device_seconds_without_cache(self) -> float:
        """What `device_seconds` would be if frozen parts were computed every time: to compare trainings by.

        With the cache the first trial pays for all that read what it computed.
        """
        saved = self.cache_saved_seconds - self.cache_fill_seconds
        devices = (self.device_seconds - self.lost_device_seconds) / self.seconds if saved else 0.0
        return self.device_seconds + saved * devices

    def __add__(self, other: Cost) -> Cost:
        added = [f.name for f in fields(self) if f.name not in _NOT_SUMMED]
        summed = {name: getattr(self, name) + getattr(other, name) for name in added}
        joules = [c.energy_joules for c in (self, other) if c.seconds or c.energy_joules is not None]
        known = [j for j in joules if j is not None]
        return Cost(
            **summed,
            peak_memory_gib=max(self.peak_memory_gib, other.peak_memory_gib),
            energy_joules=sum(known) if known and len(known) == len(joules) else None,
        )

    def since(self, earlier: Cost) -> Cost:
        """What the trial has used after it had used `earlier`; the peak of memory is that of all of it."""
        parts = {
            f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self) if f.name not in _NOT_SUMMED
        }
        joules = None if self.energy_joules is None else self.energy_joules - (earlier.energy_joules or 0.0)
        return Cost(**parts, peak_memory_gib=self.peak_memory_gib, energy_joules=joules)

    def shared(self, count: int) -> Cost:
        """The part of each of `count` trials that did this together; all of them held the memory."""
        parts = {f.name: getattr(self, f.name) / count for f in fields(self) if f.name not in _NOT_SUMMED}
        joules = None if self.energy_joules is None else self.energy_joules / count
        parts["samples"] = self.samples // count
        return Cost(**parts, peak_memory_gib=self.peak_memory_gib, energy_joules=joules)


_NOT_SUMMED = {"peak_memory_gib", "energy_joules"}


@dataclass(frozen=True)
class Scores:
    """How well predictions match labels on one split of `count` volumes.

    `confusion[i][j]` counts volumes of class i labelled as class j. `macro_auc` is the mean one-versus-rest area
    under the ROC curve over the classes that occur; None where fewer than two do.
    """

    count: int
    loss: float
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    macro_auc: float | None
    confusion: tuple[tuple[int, ...], ...]

    def metric(self, name: str) -> float:
        """The value of `val/balanced_accuracy` and the like, by the part after the slash."""
        value = getattr(self, name.rpartition("/")[2])
        return float("nan") if value is None else float(value)


METRICS = ("loss", "accuracy", "balanced_accuracy", "macro_f1", "macro_auc")


@dataclass(frozen=True)
class EpochResult:
    """One finished epoch of one trial. `epoch` counts from 1; `cost` is the trial's total so far.

    `train_loss` is the mean over the epoch's batches. `test` is filled in once, with the last epoch of a trial of
    the confirm phase: the scores of the selected epoch's weights on the test split.
    """

    epoch: int
    steps: int
    train_loss: float
    learning_rate: float
    val: Scores
    cost: Cost
    best_epoch: int
    best_value: float
    test: Scores | None = None
    is_last: bool = False


@dataclass(frozen=True)
class DeviceInfo:
    """Where a trial ran. `trials_side_by_side` above 1 means that its seconds are not fit for cost claims.

    `peak_flops` is what it can do in a second at the trial's precision; see `studytool.training.peak`.
    """

    kind: str
    name: str
    trials_side_by_side: int = 1
    peak_flops: float | None = None


@dataclass(frozen=True)
class TrialRecord:
    """All that is kept of one trial: what it was, how it ended, its curve, and what it cost.

    `parameters` are the factors by their flat names. `phase` is "search" or "confirm"; a confirm trial's `source` is
    the number of the search trial that it trains again. `message` says why a trial failed. A trial that ran out of
    memory was tried again with its batches computed in `parts` parts. `checkpoint_sha256` is that of the selected
    weights, `mlflow_run` the id of its run; both may be empty. A search trial with the configuration
    of an earlier one of its arm is not run: `same_as` is that one's number, and there are no epochs. `on_pareto_front`
    is set where cost is searched for as well. `lost_device_seconds` went into epochs that broke off or had to be
    trained again.
    """

    trial_id: str
    arm: str
    phase: str
    number: int
    source: int | None
    seed: int
    parameters: dict[str, Any]
    config_hash: str
    outcome: Outcome | None = None
    epochs: tuple[EpochResult, ...] = ()
    message: str = ""
    device: DeviceInfo | None = None
    attempts: int = 1
    parts: int | None = None
    checkpoint_sha256: str = ""
    mlflow_run: str = ""
    same_as: int | None = None
    on_pareto_front: bool = False
    lost_device_seconds: float = 0.0

    @property
    def last(self) -> EpochResult | None:
        """The last epoch, if there was one."""
        return self.epochs[-1] if self.epochs else None

    @property
    def cost(self) -> Cost:
        """What the trial's epochs have used in all."""
        return self.epochs[-1].cost if self.epochs else Cost()

    @property
    def cost_with_lost(self) -> Cost:
        """The same with the device-seconds of what broke off: what was spent on the trial."""
        cost = self.cost
        lost = self.lost_device_seconds
        return replace(cost, device_seconds=cost.device_seconds + lost, lost_device_seconds=lost)

    @property
    def test(self) -> Scores | None:
        """The scores on the test split: only a finished confirm trial has them."""
        return self.epochs[-1].test if self.epochs else None


def records_by_arm(records: Iterable[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """The records of each arm that has any, in the order given."""
    arms: dict[str, list[TrialRecord]] = {}
    for record in records:
        arms.setdefault(record.arm, []).append(record)
    return arms


def to_dict(record: Any) -> dict[str, Any]:
    """A record as plain dicts, lists and numbers, ready for JSON."""
    return asdict(record)


def epoch_from_dict(values: dict[str, Any]) -> EpochResult:
    """The inverse of `to_dict` for an EpochResult (TypeError or KeyError if it is something else)."""
    scores = {name: _scores(values[name]) for name in ("val", "test")}
    return EpochResult(**{**values, **scores, "cost": Cost(**values["cost"])})


def trial_from_dict(values: dict[str, Any]) -> TrialRecord:
    """The inverse of `to_dict` for a TrialRecord (TypeError or KeyError if it is something else)."""
    return TrialRecord(
        **{
            **values,
            "outcome": Outcome(values["outcome"]) if values["outcome"] else None,
            "epochs": tuple(epoch_from_dict(epoch) for epoch in values["epochs"]),
            "device": DeviceInfo(**values["device"]) if values["device"] else None,
        }
    )


def _scores(values: dict[str, Any] | None) -> Scores | None:
    if values is None:
        return None
    return Scores(**{**values, "confusion": tuple(tuple(row) for row in values["confusion"])})
