"""How far one arm of a study is, rebuilt from the ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from studytool.results import Outcome, TrialRecord
from studytool.spec import Arm, StudySpec
from studytool.study.search import ArmSearch


class ArmState:
    """One arm's progress, rebuilt from the ledger's records of this arm. No answer takes longer with more trials.

    Whoever only wants to know how far the arm is, and will not `go_on`, is spared telling Optuna all curves again.
    """

    def __init__(self, arm: Arm, spec: StudySpec, records: Sequence[TrialRecord], *, go_on: bool = True) -> None:
        self.arm = arm
        self.announced = False
        self._metric = spec.metric
        self._tuned = tuple(spec.search.space)
        self.search = ArmSearch(arm.name, spec.search, spec.metric, spec.seed, max_epochs=spec.most_epochs(arm))
        self.search_planned = spec.search.trials_planned
        self._searched: dict[int, TrialRecord] = {}
        self._best: dict[Outcome, TrialRecord] = {}
        self._number_of: dict[str, int] = {}
        self._held: dict[int, str] = {}
        self.pruned_in_replay: set[int] = set()
        self.interrupted: list[tuple[int, dict[str, object]]] = []
        self.waiting: list[tuple[int, dict[str, object]]] = []
        searched = [r for r in records if r.phase == "search"]
        for record in searched:
            while go_on and self.search.proposed < record.number:
                self._propose_again(records)
            if go_on:
                self._replay(record)
            elif record.outcome is not None:
                self._count(record)
        self.search_started = max((r.number + 1 for r in searched), default=0)
        self.search_planned = max(self.search_planned, self.search_started)
        self._seeds = range(spec.confirm.seeds)
        self._confirmed = {(r.source, r.number) for r in records if r.phase == "confirm" and r.outcome}
        self._handed_out = set(self._confirmed)

    @property
    def search_ended(self) -> int:
        """How many search trials have an outcome."""
        return len(self._searched)

    @property
    def search_over(self) -> bool:
        """Whether all search trials have an outcome."""
        return self.search_ended >= self.search_planned

    @property
    def confirm_queue(self) -> list[int]:
        """The seeds that the best configuration has not been handed out with; empty if none survived the search."""
        if self._tuned and self.search_over and self.best is None:
            return []
        return [k for k in self._seeds if (self.source, k) not in self._handed_out]

    @property
    def confirms_left(self) -> int:
        """How many confirm trials have no outcome, as far as can be foreseen."""
        if self._tuned and self.search_over and self.best is None:
            return 0
        done = {k for source, k in self._confirmed if source == self.source} if self.search_over else set()
        return len(set(self._seeds) - done)

    def hand_out_confirm(self, number: int) -> None:
        """Note that the best configuration is being confirmed with a seed."""
        self._handed_out.add((self.source, number))

    @property
    def exhausted(self) -> bool:
        """Whether the arm has no trial left to begin."""
        return self.search_over and not self.confirm_queue

    @property
    def best(self) -> TrialRecord | None:
        """The best finished search trial; a pruned one only if none finished (its curve was cut short)."""
        return self._best.get(Outcome.COMPLETE) or self._best.get(Outcome.PRUNED)

    @property
    def source(self) -> int | None:
        """The number of the search trial that the confirm phase trains again; None where nothing is tuned."""
        return self.best.number if self.best else None

    @property
    def best_parameters(self) -> dict[str, object]:
        """The tuned factors of the best configuration."""
        return {name: self.best.parameters[name] for name in self._tuned} if self.best else {}

    def ended(self, record: TrialRecord) -> None:
        """Note that a trial has an outcome."""
        if record.phase == "confirm":
            self._confirmed.add((record.source, record.number))
            return
        outcome = self._count(record)
        if outcome is Outcome.FAILED:
            # What broke may not break again: the configuration is free for another trial.
            self._forget(record.number)
        of = record if record.same_as is None else self._searched.get(record.same_as)
        self.search.tell(record.number, outcome, self._value(of) if of and of.last else None, _device_seconds(of))

    def _count(self, record: TrialRecord) -> Outcome:
        self._searched[record.number] = record
        outcome = record.outcome or Outcome.FAILED
        if record.last:
            self._best[outcome] = max(self._best.get(outcome, record), record, key=self._rank)
        return outcome

    def hold(self, number: int, parameters: Mapping[str, object]) -> None:
        """Note that a trial trains a configuration, so that the arm's later ones with the same take its result."""
        key = _key(parameters)
        if self._number_of.setdefault(key, number) == number:
            self._held[number] = key

    def trial_with(self, parameters: Mapping[str, object]) -> int | None:
        """The number of the trial that trains, or has trained, a configuration; None if none does."""
        return self._number_of.get(_key(parameters))

    def _forget(self, number: int) -> None:
        if number in self._held:
            del self._number_of[self._held.pop(number)]

    def _replay(self, record: TrialRecord) -> None:
        parameters = {name: record.parameters[name] for name in self._tuned}
        number = self.search.reopen(parameters)
        pruned = [self.search.report(number, result) for result in record.epochs]
        if pruned and pruned[-1]:
            self.pruned_in_replay.add(number)
        if record.same_as is None:
            self.hold(number, parameters)
        if record.outcome is not None:
            self.ended(record)
        elif record.same_as is None:
            self.interrupted.append((number, parameters))
        else:
            self.waiting.append((number, parameters))

    def _propose_again(self, records: Sequence[TrialRecord]) -> None:
        """Take up a search trial whose folder was removed, so that it is run again.

        It has the configuration of those that took its result or confirmed it, if there are any, else the proposal
        that follows from the trials before it: the same as then, if these had all ended by then.
        """
        gone = self.search.proposed
        heirs = (r for r in records if gone in (r.source, r.same_as))
        heir = next(heirs, None)
        if heir is None:
            number, parameters = self.search.propose()
        else:
            parameters = {name: heir.parameters[name] for name in self._tuned}
            number = self.search.reopen(parameters)
        self.hold(number, parameters)
        self.interrupted.append((number, parameters))

    def _rank(self, record: TrialRecord) -> tuple[float, int]:
        return self._metric.sign * self._value(record), -record.number

    def _value(self, record: TrialRecord) -> float:
        assert record.last is not None
        return record.last.best_value


def _key(parameters: Mapping[str, object]) -> str:
    """Equal for what Optuna proposed and for what the ledger says of it, where 1 may have become 1.0."""
    alike = {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in parameters.items()}
    return json.dumps(alike, sort_keys=True)


def _device_seconds(record: TrialRecord | None) -> float:
    return record.cost.device_seconds_without_cache if record else 0.0
