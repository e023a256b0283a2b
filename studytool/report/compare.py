"""Trial records -> one summary per arm: what it reached, how sure that is, what it cost, and which arm won."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from studytool.report.statistics import (
    CostRatio,
    Interval,
    PairedDifference,
    Spent,
    cost_ratio,
    mean_interval,
    paired_difference,
)
from studytool.results import METRICS, Cost, Outcome, TrialRecord, records_by_arm
from studytool.settings import MetricSettings
from studytool.spec import StudySpec
from studytool.training.cost import cost_to_target

ChosenBy = Literal["confirmation", "search"]


@dataclass(frozen=True)
class TargetCost:
    """What the confirm runs of an arm used until the validation metric first reached the target.

    `mean` is over the `reached` runs only; the `never` other ones would have needed more than they were given.
    """

    mean: Cost | None
    reached: int
    never: int


@dataclass(frozen=True)
class ArmSummary:
    """One arm of a study; what is not known (yet) is None or empty.

    `validation` is the study's metric at the selected epoch and `test` every metric by its name, over the seeds of the
    confirm runs. `gain` is `test` (see `headline_metric`) minus that of the arm `reference`, seed by seed, and
    `cost_ratio` the device-seconds to target over those of `reference`. `side_by_side` is how many trials shared a
    device at most: above 1, seconds are indicative only. `best_trial` is the confirm run with the best validation
    value (the best search trial where nothing is confirmed): the one to keep. `is_finished` says that no trial of the
    arm is left to run. `chosen_by` says what made it the winner, and is None for the others. `confirm_failed` confirm
    runs of the same configuration have failed, and are in no mean.
    """

    arm: str
    values: dict[str, Any]
    counts: dict[Outcome, int]
    best_search_value: float | None
    best_parameters: dict[str, Any]
    confirmed: int
    validation: Interval | None
    test: dict[str, Interval]
    search_cost: Cost
    confirm_cost: Cost
    mean_confirm_cost: Cost | None
    target: TargetCost | None
    side_by_side: int
    reference: str | None = None
    gain: PairedDifference | None = None
    cost_ratio: CostRatio | None = None
    chosen_by: ChosenBy | None = None
    best_trial: str | None = None
    is_finished: bool = False
    confirm_failed: int = 0

    @property
    def is_winner(self) -> bool:
        """Whether it is the best arm by validation."""
        return self.chosen_by is not None

    @property
    def cost(self) -> Cost:
        """All that the arm has used, search and confirmation."""
        return self.search_cost + self.confirm_cost


def summarize_arms(spec: StudySpec, records: Sequence[TrialRecord]) -> tuple[ArmSummary, ...]:
    """One summary per arm of the study file, in its order; trials of arms no longer in the file are left out.

    The winner is the arm with the best mean of the validation metric over its confirm runs (the best search value
    while an arm waits for its first one), over the seeds that all have; of equal ones the cheaper. An arm with less
    than half as many confirm runs as another, as they failed or are still to come, is not chosen. The test split has
    no part in it.
    """
    own_records = records_by_arm(records)
    runs = {arm.name: _Runs.of(spec, own_records.get(arm.name, [])) for arm in spec.list_arms()}
    winner, chosen_by = _winner(spec.metric, runs, all_finished=all(_is_finished(spec, own) for own in runs.values()))
    summaries = []
    for arm in spec.list_arms():
        reference = reference_arm(spec, arm.name)
        compared = runs[reference] if reference else None
        own = runs[arm.name]
        summaries.append(
            ArmSummary(
                arm=arm.name,
                values=dict(arm.values),
                counts={outcome: sum(r.outcome is outcome for r in own.all) for outcome in Outcome},
                best_search_value=own.best.last.best_value if own.best and own.best.last else None,
                best_parameters=_tuned(spec, own),
                confirmed=len(own.confirmed),
                validation=own.validation,
                test={name: mean_interval(list(v.values()), **_range(name)) for name, v in own.test.items()},
                search_cost=sum((r.cost_with_lost for r in own.all if r.phase == "search"), Cost()),
                confirm_cost=sum((r.cost_with_lost for r in own.all if r.phase == "confirm"), Cost()),
                mean_confirm_cost=mean_cost([r.cost for r in own.confirmed]),
                target=own.target_cost if spec.metric.target is not None else None,
                side_by_side=max((r.device.trials_side_by_side for r in own.all if r.device), default=1),
                reference=reference if compared else None,
                gain=_gain(spec, own, compared) if compared else None,
                cost_ratio=cost_ratio(own.spent, compared.spent) if compared and own.spent and compared.spent else None,
                chosen_by=chosen_by if arm.name == winner else None,
                best_trial=_trial_to_keep(spec.metric, own),
                is_finished=_is_finished(spec, own),
                confirm_failed=_confirm_failed(own),
            )
        )
    return tuple(summaries)


def headline_metric(spec: StudySpec) -> str:
    """The metric whose test value the tables show: the study's own, or balanced accuracy where that is the loss."""
    name = spec.metric.name.rpartition("/")[2]
    return "balanced_accuracy" if name == "loss" else name


def reference_arm(spec: StudySpec, arm: str) -> str | None:
    """The arm with random initialization that `arm` is compared with; None for such an arm itself, or without one.

    All other factors are the same. Where the study leaves that arm out because its layers are frozen (frozen random
    layers only lose), it is the one with nothing frozen.
    """
    values = {a.name: a.values for a in spec.list_arms()}
    own = values[arm]
    if "init" not in own or own["init"] == "random":
        return None
    for changes in ({"init": "random"}, {"init": "random", "freeze": "none"}):
        wanted = {**own, **{name: value for name, value in changes.items() if name in own}}
        for name, candidate in values.items():
            if candidate == wanted:
                return name
    return None


def confirm_runs(spec: StudySpec, records: Sequence[TrialRecord], arm: str) -> list[TrialRecord]:
    """The finished confirm runs that an arm stands for: those of one configuration, in the order of their seeds."""
    own = [r for r in records if r.arm == arm]
    return _confirm_runs(own, _best_search_trial(spec.metric, own))


def mean_cost(costs: Sequence[Cost]) -> Cost | None:
    """The mean of each kind of cost; peak memory is the highest; energy is None unless it is known for all."""
    if not costs:
        return None
    total = sum(costs[1:], costs[0])
    shares = {f.name: getattr(total, f.name) / len(costs) for f in fields(Cost) if f.name != "energy_joules"}
    known = [c.energy_joules for c in costs if c.energy_joules is not None]
    return Cost(
        **{
            **shares,
            "samples": round(shares["samples"]),
            "peak_memory_gib": total.peak_memory_gib,
            "energy_joules": sum(known) / len(known) if len(known) == len(costs) else None,
        }
    )


@dataclass(frozen=True)
class _Runs:
    """The trials of one arm, and what follows from its finished confirm runs, by seed."""

    all: list[TrialRecord]
    best: TrialRecord | None
    confirmed: list[TrialRecord]
    validation: Interval | None
    test: dict[str, dict[int, float]] = field(default_factory=dict)
    spent: dict[int, Spent] = field(default_factory=dict)
    target_cost: TargetCost | None = None

    @classmethod
    def of(cls, spec: StudySpec, records: list[TrialRecord]) -> _Runs:
        best = _best_search_trial(spec.metric, records)
        confirmed = _confirm_runs(records, best)
        values = [_selected_value(spec.metric, r) for r in confirmed]
        tests = {r.seed: r.test for r in confirmed if r.test}
        test = {name: {s: t.metric(name) for s, t in tests.items() if _has(t, name)} for name in METRICS}
        reached: list[Cost] = []
        spent: dict[int, Spent] = {}
        if spec.metric.target is not None:
            for record in confirmed:
                cost, is_reached = cost_to_target(record.epochs, spec.metric.target, spec.metric.sign)
                spent[record.seed] = Spent(cost.device_seconds_without_cache, is_reached)
                reached += [cost] if is_reached else []
        return cls(
            all=records,
            best=best,
            confirmed=confirmed,
            validation=mean_interval(values, **_range(spec.metric.name)) if values else None,
            test={name: by_seed for name, by_seed in test.items() if by_seed},
            spent={seed: s for seed, s in spent.items() if s.amount > 0},
            target_cost=TargetCost(mean_cost(reached), len(reached), len(spent) - len(reached)) if spent else None,
        )


def _best_search_trial(metric: MetricSettings, records: Sequence[TrialRecord]) -> TrialRecord | None:
    """As the study chooses what it confirms: a pruned trial only if none finished, of equal ones the first."""
    for outcome in (Outcome.COMPLETE, Outcome.PRUNED):
        ended = [r for r in records if r.phase == "search" and r.outcome is outcome and r.last]
        if ended:
            return max(ended, key=lambda r: (metric.sign * r.epochs[-1].best_value, -r.number))
    return None


def _confirm_runs(records: Sequence[TrialRecord], best: TrialRecord | None) -> list[TrialRecord]:
    """The finished confirm runs of one configuration: the best one, or while it has none, the one with most runs."""
    by_source: dict[int | None, list[TrialRecord]] = {}
    for record in records:
        if record.phase == "confirm" and record.outcome is Outcome.COMPLETE and record.last:
            by_source.setdefault(record.source, []).append(record)
    if best is not None and best.number in by_source:
        return by_source[best.number]
    return max(by_source.values(), key=len, default=[])


def _selected_value(metric: MetricSettings, record: TrialRecord) -> float:
    """The validation metric of the weights that were tested."""
    last = record.epochs[-1]
    return last.best_value if metric.select == "best" else last.val.metric(metric.name)


def _winner(metric: MetricSettings, runs: Mapping[str, _Runs], *, all_finished: bool) -> tuple[str | None, ChosenBy]:
    confirmed = _over_shared_seeds(metric, {name: r for name, r in runs.items() if r.validation})
    searched = {name: (metric.sign * r.best.last.best_value, r) for name, r in runs.items() if r.best and r.best.last}
    # While some arms wait for their confirmation all are held against one another by their search.
    settled = all_finished or all(r.validation for _, r in searched.values())
    by_search = bool(searched) and not (confirmed and settled)
    candidates = searched if by_search else confirmed
    if not candidates:
        return None, "search"

    def merit(name: str) -> tuple[float, float]:
        value, own = candidates[name]
        cost = mean_cost([r.cost for r in own.confirmed])
        return value, -(cost.device_seconds_without_cache if cost else 0.0)

    return max(candidates, key=merit), "search" if by_search else "confirmation"


def _over_shared_seeds(metric: MetricSettings, runs: Mapping[str, _Runs]) -> dict[str, tuple[float, _Runs]]:
    """The mean validation value of arms with enough confirm runs over the seeds that they share, if there are any."""
    most = max((len(r.confirmed) for r in runs.values()), default=0)
    values = {
        name: {record.seed: metric.sign * _selected_value(metric, record) for record in r.confirmed}
        for name, r in runs.items()
        if 2 * len(r.confirmed) >= most
    }
    shared = set.intersection(*map(set, values.values())) if values else set()
    return {
        name: (statistics.fmean(value for seed, value in own.items() if seed in (shared or own)), runs[name])
        for name, own in values.items()
    }


def _confirm_failed(runs: _Runs) -> int:
    sources = {r.source for r in runs.confirmed} or {runs.best.number if runs.best else None}
    failed = (r for r in runs.all if r.phase == "confirm" and r.outcome is Outcome.FAILED)
    return sum(r.source in sources for r in failed)


def _trial_to_keep(metric: MetricSettings, runs: _Runs) -> str | None:
    if runs.confirmed:
        return max(runs.confirmed, key=lambda r: metric.sign * _selected_value(metric, r)).trial_id
    return runs.best.trial_id if runs.best else None


def _is_finished(spec: StudySpec, runs: _Runs) -> bool:
    search = [r for r in runs.all if r.phase == "search"]
    planned = spec.search.trials_planned
    if len(search) < planned or any(r.outcome is None for r in search):
        return False
    if planned and runs.best is None:
        return True
    source = runs.best.number if runs.best else None
    confirmed = {r.number for r in runs.all if r.phase == "confirm" and r.source == source and r.outcome is not None}
    return set(range(spec.confirm.seeds)) <= confirmed


def _tuned(spec: StudySpec, runs: _Runs) -> dict[str, Any]:
    """The tuned factors of the configuration that the confirm runs have or, without any, of the best search trial."""
    source = runs.confirmed[0] if runs.confirmed else runs.best
    return {name: source.parameters[name] for name in spec.search.space} if source else {}


def _gain(spec: StudySpec, own: _Runs, reference: _Runs) -> PairedDifference | None:
    name = headline_metric(spec)
    if name not in own.test or name not in reference.test:
        return None
    return paired_difference(own.test[name], reference.test[name])


def _range(metric: str) -> dict[str, float]:
    return {"lowest": 0.0} if metric.endswith("loss") else {"lowest": 0.0, "highest": 1.0}


def _has(scores: Any, name: str) -> bool:
    return getattr(scores, name) is not None
