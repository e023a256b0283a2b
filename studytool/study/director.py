"""What runs next and what stops: the study's decisions, without Ray, MLflow or torch.

A driver (Ray Tune, a test) asks `next_trial`, trains it, and hands every epoch to `epoch`, which answers whether to
stop, and at last calls `failed` if the trial broke. Everything that happens is written to the ledger first, then told
to the observers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum

from studytool.results import DeviceInfo, EpochResult, Outcome, TrialRecord
from studytool.seeds import derive_seed
from studytool.spec import Arm, StudySpec, TrialSpec
from studytool.study.armstate import ArmState
from studytool.study.budget import Budget
from studytool.study.choices import Choices
from studytool.study.ledger import Ledger

RETRIES = 2
"""How often a trial is begun again from its last checkpoint after its worker died or raised."""
PARTS = 4
"""A trial that ran out of memory computes its batches in so many times more parts when it is tried again."""


class Cause(Enum):
    """Why an attempt at a trial failed: the TRIAL itself, a WORKER that died or raised, a lost NODE, scarce MEMORY."""

    TRIAL = "trial"
    WORKER = "worker"
    NODE = "node"
    MEMORY = "memory"


class Observer:
    """Is told what happens, in the order it happens; overrides what it wants to know."""

    def trial_started(self, trial: TrialSpec, record: TrialRecord) -> None:
        """A trial begins, or is taken up again (`record.epochs` then holds what it has done)."""

    def epoch_ended(self, record: TrialRecord, result: EpochResult) -> None:
        """A trial finished an epoch."""

    def attempt_failed(self, record: TrialRecord, message: str, details: str, *, again: bool) -> None:
        """A running trial broke, with one line and a traceback or the like; `again`: it will be tried again."""

    def trial_ended(self, record: TrialRecord) -> None:
        """A trial is COMPLETE, PRUNED or FAILED."""

    def trial_set_aside(self, record: TrialRecord) -> None:
        """A running trial was stopped by the study's budget; a larger one lets it go on where it stands."""

    def arm_decided(self, arm: Arm, best: TrialRecord | None) -> None:
        """An arm's search is over: `best` is the configuration to confirm (None: no trial survived)."""

    def remarked(self, line: str) -> None:
        """Something that a person should know, of no one trial."""


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
        self._arms = [ArmState(arm, spec, ledger.of_arm(arm.name)) for arm in spec.list_arms()]
        self._by_name: Mapping[str, ArmState] = {state.arm.name: state for state in self._arms}
        self._running: dict[str, TrialSpec] = {}
        self._again: list[TrialSpec] = []
        self._deaths: Counter[str] = Counter()
        self.budget = Budget(spec, ledger)
        self.budget.allows(running=())

    def announce_decided(self) -> None:
        """Tell the observers of the arms that were already decided when the study was taken up again."""
        for state in self._arms:
            self._decide_if_over(state)

    def remark(self, line: str) -> None:
        """Have the observers say something that is of no one trial."""
        for observer in self._observers:
            observer.remarked(line)

    @property
    def running(self) -> tuple[str, ...]:
        """The ids of the trials that were handed out and have not ended."""
        return tuple(self._running)

    @property
    def finished(self) -> bool:
        """Whether nothing is running, and nothing is left to run or the budget does not allow it."""
        return not self._running and (self.stopped_by_budget or not self._left)

    @property
    def stopped_by_budget(self) -> bool:
        """Whether something is left to run that the study's budget does not allow."""
        if self.budget.used_up:
            return self._left
        return self._left and not self.budget.new_trial_allowed and not self._again and not self._begun

    @property
    def _left(self) -> bool:
        return bool(self._again) or not all(state.exhausted for state in self._arms)

    @property
    def _begun(self) -> bool:
        """Whether a trial of an earlier run is to go on."""
        begun = {(r.arm, r.source, r.number) for r in self._ledger.without_outcome if r.phase == "confirm"}
        queues = [(s, s.confirm_queue) for s in self._arms if begun and s.search_over]
        confirms = any((s.arm.name, s.source, number) in begun for s, queue in queues for number in queue)
        return confirms or any(s.interrupted for s in self._arms)

    @property
    def backbones(self) -> tuple[str, ...]:
        """The networks that are compared, each once."""
        arms = (state.arm for state in self._arms)
        trials = (self._spec.trial(arm, {}, phase="search", number=0, seed=self._spec.seed) for arm in arms)
        return tuple(dict.fromkeys(trial.model.backbone for trial in trials))

    @property
    def trials_left(self) -> dict[str, int]:
        """How many trials of each phase have not ended, running ones among them."""
        return {
            "search": sum(s.search_planned - s.search_ended for s in self._arms),
            "confirm": sum(s.confirms_left for s in self._arms),
        }

    def next_trial(self) -> TrialSpec | None:
        """A trial to run now; None if there is none at present (see `finished`).

        What broke and is tried again comes first; then search trials, from the arm that has had the fewest; then
        confirm trials, one seed of every decided arm before the next seed, so that a study cut short still has paired
        seeds. A trial that ran out of memory has a larger `accumulate` than the study file says, also after a resume;
        what the file leaves to be chosen is as the ledger says (see `studytool.study.choices`).
        """
        if not self.budget.allows(running=self._running):
            return None
        trial = self._again.pop(0) if self._again else self._next_search() or self._next_confirm()
        if trial is None:
            return None
        record = self._ledger.get(trial.trial_id) or new_record(trial, self._fingerprint)
        resumed = self._ledger.get(trial.trial_id) is not None
        record = self._ledger.put(replace(record, attempts=record.attempts + 1 if resumed else 1))
        self._running[trial.trial_id] = trial
        for observer in self._observers:
            observer.trial_started(trial, record)
        return (self._ledger.choices or Choices()).applied(_in_parts(trial, record.parts))

    def needs_room(self, trial_id: str) -> bool:
        """Whether a trial ran out of memory before and should share the machine with as little as possible."""
        record = self._ledger.get(trial_id)
        return record is not None and record.parts is not None

    def epoch(self, trial_id: str, result: EpochResult, device: DeviceInfo | None = None) -> bool:
        """Take an epoch of a running trial; True if the trial has to stop now. Epochs already known are ignored."""
        trial = self._running.get(trial_id)
        if trial is None:
            return True
        record = self._ledger.get(trial_id)
        assert record is not None
        if result.epoch <= len(record.epochs):
            return self._draw_consequence(trial, record, result)
        value = result.val.metric(self._spec.metric.name)
        if not math.isfinite(value):
            message = f"epoch {result.epoch}: {self._spec.metric.name} is {value}: it cannot be compared"
            self._end(trial, Outcome.FAILED, message)
            return True
        pruned = trial.phase == "search" and self._by_name[trial.arm].search.report(trial.number, result)
        outcome = Outcome.COMPLETE if result.is_last else Outcome.PRUNED if pruned else None
        record = self._ledger.add_epoch(trial_id, result, device, outcome)
        for observer in self._observers:
            observer.epoch_ended(record, result)
        if outcome is not None:
            self._ended(trial, record)
        elif not self.budget.allows(trial_id, running=self._running):
            self._set_aside(trial)
            return True
        return outcome is not None

    def _set_aside(self, trial: TrialSpec) -> None:
        del self._running[trial.trial_id]
        record = self._ledger.get(trial.trial_id)
        assert record is not None
        for observer in self._observers:
            observer.trial_set_aside(record)

    def _draw_consequence(self, trial: TrialSpec, record: TrialRecord, result: EpochResult) -> bool:
        """End a trial whose last epoch was written down by a driver that was killed before it could end the trial."""
        if result.epoch < len(record.epochs):
            return False
        pruned = trial.phase == "search" and trial.number in self._by_name[trial.arm].pruned_in_replay
        if result.is_last or pruned:
            self._end(trial, Outcome.COMPLETE if result.is_last else Outcome.PRUNED)
        return result.is_last or pruned

    def failed(self, trial_id: str, message: str, *, cause: Cause = Cause.TRIAL, details: str = "") -> None:
        """An attempt at a running trial broke: the trial will be tried again, or it ends as FAILED.

        Args:
            trial_id: a running trial; another one is ignored.
            message: one line.
            cause: a trial's own fault is not tried again, a worker's `RETRIES` times, want of memory once; the loss of
                a node says nothing of the trial, which is tried again however often.
            details: a traceback, for the log.
        """
        trial = self._running.get(trial_id)
        if trial is None:
            return
        if cause is Cause.MEMORY:
            message = f"out of memory: {message}"
        again = self._may_try_again(trial, cause)
        record = self._ledger.get(trial_id)
        assert record is not None
        for observer in self._observers:
            observer.attempt_failed(record, message, details, again=again)
        if again:
            self._again.append(self._running.pop(trial_id))
            return
        if cause is Cause.MEMORY:
            message += "; lower batch_size, model.input_size or resources.trials_at_once, or set a larger accumulate"
        self._end(trial, Outcome.FAILED, message)

    def _may_try_again(self, trial: TrialSpec, cause: Cause) -> bool:
        if cause is Cause.NODE:
            return True
        if cause is Cause.WORKER:
            self._deaths[trial.trial_id] += 1
            return self._deaths[trial.trial_id] <= RETRIES
        if cause is Cause.TRIAL or not trial.train.retry_out_of_memory or self.needs_room(trial.trial_id):
            return False
        record = self._ledger.get(trial.trial_id)
        assert record is not None
        parts = min(trial.train.accumulate * PARTS, trial.train.batch_size)
        self._ledger.put(replace(record, parts=parts))
        return True

    def _end(self, trial: TrialSpec, outcome: Outcome, message: str = "") -> None:
        self._ended(trial, self._ledger.end(trial.trial_id, outcome, message))

    def _ended(self, trial: TrialSpec, record: TrialRecord) -> None:
        del self._running[trial.trial_id]
        state = self._by_name[trial.arm]
        state.ended(record)
        for observer in self._observers:
            observer.trial_ended(record)
        self._settle_waiting(state)
        self._decide_if_over(state)

    def _decide_if_over(self, state: ArmState) -> None:
        if state.search_over and not state.announced:
            state.announced = True
            self._note_pareto_front(state)
            for observer in self._observers:
                observer.arm_decided(state.arm, state.best)

    def _note_pareto_front(self, state: ArmState) -> None:
        front = set(state.search.pareto_front)
        for record in self._ledger.of_arm(state.arm.name):
            is_on = record.phase == "search" and record.number in front
            if record.on_pareto_front != is_on:
                self._ledger.put(replace(record, on_pareto_front=is_on))

    def _next_search(self) -> TrialSpec | None:
        for state in self._arms:
            self._settle_waiting(state)
        while True:
            new = self.budget.new_trial_allowed
            states = [s for s in self._arms if s.interrupted or (new and s.search_started < s.search_planned)]
            if not states:
                return None
            state = min(states, key=lambda s: (not s.interrupted, s.search_started))
            if state.interrupted:
                return self._search_trial(state, *state.interrupted.pop(0))
            number, parameters = state.search.propose()
            state.search_started += 1
            trial = self._search_trial(state, number, parameters)
            same_as = state.trial_with(parameters)
            if same_as is None:
                state.hold(number, parameters)
                return trial
            self._ledger.put(replace(new_record(trial, self._fingerprint), same_as=same_as))
            state.waiting.append((number, parameters))
            self._settle_waiting(state)

    def _settle_waiting(self, state: ArmState) -> None:
        """End the trials whose configuration another one has trained meanwhile, with its result."""
        waiting, state.waiting = state.waiting, []
        for number, parameters in waiting:
            trial = self._search_trial(state, number, parameters)
            record = self._ledger.get(trial.trial_id)
            assert record is not None
            assert record.same_as is not None
            original = self._ledger.get(self._search_trial(state, record.same_as, parameters).trial_id)
            outcome = original.outcome if original else Outcome.FAILED
            if outcome is None:
                state.waiting.append((number, parameters))
                continue
            if outcome is Outcome.FAILED:
                # It may have been the worker's fault: this one is trained after all.
                self._ledger.put(replace(record, same_as=None))
                state.hold(number, parameters)
                state.interrupted.append((number, parameters))
                continue
            for observer in self._observers:
                observer.trial_started(trial, record)
            record = self._ledger.end(trial.trial_id, outcome, f"same as trial {record.same_as}")
            state.ended(record)
            for observer in self._observers:
                observer.trial_ended(record)
            self._decide_if_over(state)

    def _search_trial(self, state: ArmState, number: int, parameters: Mapping[str, object]) -> TrialSpec:
        return self._spec.trial(state.arm, parameters, phase="search", number=number, seed=self._spec.seed)

    def _next_confirm(self) -> TrialSpec | None:
        states = [s for s in self._arms if s.search_over and s.confirm_queue]
        for state in sorted(states, key=lambda s: s.confirm_queue[0]):
            number = state.confirm_queue[0]
            seed = derive_seed(self._spec.seed, "confirm", number)
            trial = self._spec.trial(
                state.arm, state.best_parameters, phase="confirm", number=number, seed=seed, source=state.source
            )
            if self.budget.new_trial_allowed or self._ledger.get(trial.trial_id):
                state.hand_out_confirm()
                return trial
        return None


def _in_parts(trial: TrialSpec, parts: int | None) -> TrialSpec:
    if parts is None:
        return trial
    return trial.model_copy(update={"train": trial.train.model_copy(update={"accumulate": parts})})


def new_record(trial: TrialSpec, data_fingerprint: str) -> TrialRecord:
    """The record of a trial that has not begun yet."""
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
