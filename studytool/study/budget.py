"""What a study may use, and whether a trial may begin or go on."""

from __future__ import annotations

from collections.abc import Collection

from studytool.results import TrialRecord
from studytool.spec import StudySpec
from studytool.study.ledger import Ledger


class Budget:
    """Keeps a study within `budget:`, counting what all its runs have used, as the ledger has it.

    Device-hours: no epoch is begun that would go beyond them together with the epochs under way, each taken to cost
    what its trial's epochs cost so far (for a trial that has none, what the study's do). Once one does not fit, no
    trial begins. Trials: so many are begun; each of these may run to its end.
    """

    def __init__(self, spec: StudySpec, ledger: Ledger) -> None:
        self._spec = spec
        self._ledger = ledger
        self._limit_seconds = device_seconds_allowed(spec)
        self.used_up = False

    @property
    def new_trial_allowed(self) -> bool:
        """Whether the number of trials allows one that was never begun."""
        most = self._spec.budget.trials
        return most is None or self._ledger.totals.begun < most

    def allows(self, trial_id: str | None = None, *, running: Collection[str]) -> bool:
        """Whether a trial (None: one more than those that run) may do an epoch beside those that are running."""
        if self._limit_seconds is None:
            return True
        if trial_id is None and self.used_up:
            return False
        totals = self._ledger.totals
        spent = totals.device_seconds
        typical = spent / totals.epochs if totals.epochs else 0.0
        ids = {*running, trial_id} if trial_id else running
        busy = [self._ledger.get(id_) for id_ in ids]
        ahead = sum(r.cost.device_seconds / len(r.epochs) if r and r.epochs else typical for r in busy)
        ahead += 0.0 if trial_id else typical
        if spent >= self._limit_seconds or spent + ahead > self._limit_seconds:
            # What has ended meanwhile may have cost less than was expected, but a stop is a stop.
            self.used_up = True
            return False
        return True

    def words(self) -> str:
        """One line: what was spent of what was allowed, and how to go on."""
        budget, resources = self._spec.budget, self._spec.resources
        hours = self._ledger.totals.device_seconds / 3600
        said, raise_by = [], []
        if budget.trials is not None:
            said.append(f"{self._ledger.totals.begun} of {budget.trials} trials begun")
            raise_by.append(f"--budget-trials {2 * budget.trials}")
        if budget.device_hours is not None:
            said.append(f"{hours:.3g} of {budget.device_hours:g} device-hours spent")
            raise_by.append(f"--budget-hours {2 * budget.device_hours:g}")
        if budget.max_cost is not None and resources.price_per_device_hour is not None:
            cost = hours * resources.price_per_device_hour
            said.append(f"{cost:.3g} of {budget.max_cost:g} {resources.currency} spent")
            raise_by.append(f"--set budget.max_cost={2 * budget.max_cost:g}")
        return f"stopped by the budget: {', '.join(said)}; a larger one goes on here, for example {' '.join(raise_by)}"


def device_seconds_allowed(spec: StudySpec) -> float | None:
    """The smaller of what `device_hours` and `max_cost` allow; None if there is no such limit."""
    hours = [spec.budget.device_hours] if spec.budget.device_hours is not None else []
    if spec.budget.max_cost is not None and spec.resources.price_per_device_hour is not None:
        hours.append(spec.budget.max_cost / spec.resources.price_per_device_hour)
    return min(hours) * 3600 if hours else None


def device_seconds_spent(records: Collection[TrialRecord]) -> float:
    """What was spent on all trials, those that were pruned, failed or interrupted too, and on what broke off."""
    return sum(record.cost_with_lost.device_seconds for record in records)
