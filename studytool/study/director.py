"""What runs next and what stops: the study's decisions, without Ray, MLflow or torch.

A driver (Ray Tune, a test) asks `next_trial`, trains it, and hands every epoch to `epoch`, which answers whether to
stop, and at last calls `failed` if the trial broke. Everything that happens is written to the ledger first, then told
to the observers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from studytool.errors import StudytoolError
from studytool.results import DeviceInfo, EpochResult, Outcome, TrialRecord
from studytool.seeds import derive_seed
from studytool.spec import Arm, StudySpec, TrialSpec
from studytool.study.ledger import Ledger
from studytool.study.search import ArmSearch


class Observer(Protocol):
    """Who is told what happens, in the order it happens."""

    def trial_started(self, trial: TrialSpec, record: TrialRecord) -> None:
        """A trial begins, or is taken up again (`record.epochs` then holds what it has done)."""

    def epoch_ended(self, record: TrialRecord, result: EpochResult) -> None:
        """A trial finished an epoch."""

    def trial_ended(self, record: TrialRecord) -> None:
        """A trial is COMPLETE, PRUNED or FAILED."""

    def arm_decided(self, arm: Arm, best: TrialRecord | None) -> None:
        """An arm's search is over: `best` is the configuration to confirm (None: no trial survived)."""


class Director:
    """Walks a study through its two phases: the search inside every arm, then paired seeds for every arm's best.

    Arms take turns and are never pruned against one another. An arm is confirmed as soon as its own search is over.
    With an empty search space there is nothing to tune: the arm goes straight to its confirmation.
    """

    def __init__(
        self, spec: StudySpec, ledger: Ledger, data_fingerprint: str, observers: Sequence[Observer] = ()
    ) -> None:
        self._spec = spec
        self._ledger = ledger
        self._fingerprint = data_fingerprint
        self._observers = observers
        self._arms = [_ArmState(arm, spec, ledger) for arm in spec.list_arms()]
        self._by_name: Mapping[str, _ArmState] = {state.arm.name: state for state in self._arms}
        self._running: dict[str, TrialSpec] = {}

    def announce_decided(self) -> None:
        """Tell the observers of the arms that were already decided when the study was taken up again."""
        for state in self._arms:
            self._decide_if_over(state)

    @property
    def running(self) -> tuple[str, ...]:
        """The ids of the trials that were handed out and have not ended."""
        return tuple(self._running)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to run and nothing is running."""
        return not self._running and all(state.exhausted for state in self._arms)

    @property
    def trials_left(self) -> dict[str, int]:
        """How many trials of each phase have not ended, running ones among them."""
        return {
            "search": sum(s.search_planned - s.search_ended for s in self._arms),
            "confirm": sum(s.confirms_left for s in self._arms),
        }

    def next_trial(self) -> TrialSpec | None:
        """A trial to run now; None if there is none at present (see `finished`).

        Search trials come first, from the arm that has had the fewest; then confirm trials, one seed of every decided
        arm before the next seed, so that a study cut short still has paired seeds.
        """
        trial = self._next_search() or self._next_confirm()
        if trial is None:
            return None
        record = self._ledger.get(trial.trial_id) or _new_record(trial, self._fingerprint)
        resumed = self._ledger.get(trial.trial_id) is not None
        record = self._ledger.put(replace(record, attempts=record.attempts + 1 if resumed else 1))
        self._running[trial.trial_id] = trial
        for observer in self._observers:
            observer.trial_started(trial, record)
        return trial

    def epoch(self, trial_id: str, result: EpochResult, device: DeviceInfo | None = None) -> bool:
        """Take an epoch of a running trial; True if the trial has to stop now. Epochs already known are ignored."""
        trial = self._running.get(trial_id)
        if trial is None:
            return True
        record = self._ledger.get(trial_id)
        assert record is not None
        if result.epoch <= len(record.epochs):
            return False
        if device is not None and record.device != device:
            self._ledger.put(replace(record, device=device))
        value = result.val.metric(self._spec.metric.name)
        if not math.isfinite(value):
            message = f"epoch {result.epoch}: {self._spec.metric.name} is {value}: it cannot be compared"
            self._end(trial, Outcome.FAILED, message)
            return True
        record = self._ledger.add_epoch(trial_id, result)
        for observer in self._observers:
            observer.epoch_ended(record, result)
        state = self._by_name[trial.arm]
        pruned = trial.phase == "search" and state.search.report(trial.number, result)
        if result.is_last:
            self._end(trial, Outcome.COMPLETE)
        elif pruned:
            self._end(trial, Outcome.PRUNED)
        return result.is_last or pruned

    def retried(self, trial_id: str) -> None:
        """Note that a running trial is begun again from its last checkpoint, its worker having died."""
        record = self._ledger.get(trial_id)
        if record is not None:
            self._ledger.put(replace(record, attempts=record.attempts + 1))

    def failed(self, trial_id: str, message: str) -> None:
        """End a running trial as FAILED; `message` is one line."""
        if trial_id in self._running:
            self._end(self._running[trial_id], Outcome.FAILED, message)

    def _end(self, trial: TrialSpec, outcome: Outcome, message: str = "") -> None:
        del self._running[trial.trial_id]
        state = self._by_name[trial.arm]
        record = self._ledger.end(trial.trial_id, outcome, message)
        state.ended(record)
        for observer in self._observers:
            observer.trial_ended(record)
        self._decide_if_over(state)

    def _decide_if_over(self, state: _ArmState) -> None:
        if state.search_over and not state.announced:
            state.announced = True
            for observer in self._observers:
                observer.arm_decided(state.arm, state.best)

    def _next_search(self) -> TrialSpec | None:
        states = [s for s in self._arms if s.interrupted or s.search_started < s.search_planned]
        if not states:
            return None
        state = min(states, key=lambda s: (not s.interrupted, s.search_started))
        if state.interrupted:
            number, parameters = state.interrupted.pop(0)
        else:
            number, parameters = state.search.propose()
            state.search_started += 1
        return self._spec.trial(state.arm, parameters, phase="search", number=number, seed=self._spec.seed)

    def _next_confirm(self) -> TrialSpec | None:
        states = [s for s in self._arms if s.search_over and s.confirm_queue]
        if not states:
            return None
        state = min(states, key=lambda s: s.confirm_queue[0])
        number = state.hand_out_confirm()
        seed = derive_seed(self._spec.seed, "confirm", number)
        return self._spec.trial(
            state.arm, state.best_parameters, phase="confirm", number=number, seed=seed, source=state.source
        )


class _ArmState:
    """One arm's progress, rebuilt from the ledger."""

    def __init__(self, arm: Arm, spec: StudySpec, ledger: Ledger) -> None:
        self.arm = arm
        self.announced = False
        self._metric = spec.metric
        self._tuned = tuple(spec.search.space)
        self.search = ArmSearch(arm.name, spec.search, spec.metric, spec.seed)
        self.search_planned = spec.search.trials_per_arm if spec.search.space else 0
        self._searched: list[TrialRecord] = []
        self.interrupted: list[tuple[int, dict[str, object]]] = []
        records = [r for r in ledger.records if r.arm == arm.name]
        for record in (r for r in records if r.phase == "search"):
            self._replay(record)
        self.search_started = self.search.proposed
        self.search_planned = max(self.search_planned, self.search_started)
        self._seeds = range(spec.confirm.seeds)
        self._confirmed = {(r.source, r.number) for r in records if r.phase == "confirm" and r.outcome}
        self._handed_out = set(self._confirmed)

    @property
    def search_ended(self) -> int:
        return len(self._searched)

    @property
    def search_over(self) -> bool:
        return self.search_ended >= self.search_planned

    @property
    def confirm_queue(self) -> list[int]:
        """The seeds that the best configuration has not been handed out with; empty if none survived the search."""
        if self._tuned and self.search_over and self.best is None:
            return []
        return [k for k in self._seeds if (self.source, k) not in self._handed_out]

    @property
    def confirms_left(self) -> int:
        if self._tuned and self.search_over and self.best is None:
            return 0
        done = {k for source, k in self._confirmed if source == self.source} if self.search_over else set()
        return len(set(self._seeds) - done)

    def hand_out_confirm(self) -> int:
        """The next seed to confirm the best configuration with."""
        number = self.confirm_queue[0]
        self._handed_out.add((self.source, number))
        return number

    @property
    def exhausted(self) -> bool:
        return self.search_over and not self.confirm_queue

    @property
    def best(self) -> TrialRecord | None:
        """The best finished search trial; a pruned one only if none finished (its curve was cut short)."""
        for outcome in (Outcome.COMPLETE, Outcome.PRUNED):
            ended = [r for r in self._searched if r.outcome is outcome and r.last]
            if ended:
                return max(ended, key=lambda r: (self._metric.sign * self._value(r), -r.number))
        return None

    @property
    def source(self) -> int | None:
        """The number of the search trial that the confirm phase trains again; None where nothing is tuned."""
        return self.best.number if self.best else None

    @property
    def best_parameters(self) -> dict[str, object]:
        return {name: self.best.parameters[name] for name in self._tuned} if self.best else {}

    def ended(self, record: TrialRecord) -> None:
        if record.phase == "confirm":
            self._confirmed.add((record.source, record.number))
            return
        self._searched.append(record)
        self.search.tell(record.number, record.outcome or Outcome.FAILED, self._value(record) if record.last else None)

    def _replay(self, record: TrialRecord) -> None:
        parameters = {name: record.parameters[name] for name in self._tuned}
        number = self.search.reopen(parameters)
        if number != record.number:
            raise StudytoolError(
                f"{record.arm}: the ledger has search trial {record.number} but not trial {number}; put its folder "
                "back from a backup, or give the study another name"
            )
        for result in record.epochs:
            self.search.report(number, result)
        if record.outcome is None:
            self.interrupted.append((number, parameters))
        else:
            self.ended(record)

    def _value(self, record: TrialRecord) -> float:
        assert record.last is not None
        return record.last.best_value


def _new_record(trial: TrialSpec, data_fingerprint: str) -> TrialRecord:
    return TrialRecord(
        trial_id=trial.trial_id,
        arm=trial.arm,
        phase=trial.phase,
        number=trial.number,
        source=trial.source,
        seed=trial.seed,
        # As JSON knows them: a tuple would come back from the ledger as a list.
        parameters={name: list(v) if isinstance(v, tuple) else v for name, v in trial.parameters.items()},
        config_hash=trial.config_hash(data_fingerprint),
    )
