"""What runs next and what stops: the study's decisions, without Ray, MLflow or torch.

A driver (Ray Tune, a test) asks `next_trial`, trains it, and hands every epoch to `epoch`, which answers whether to
stop, and at last calls `failed` if the trial broke. Everything that happens is written to the ledger first, then told
to the observers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from studytool.results import DeviceInfo, EpochResult, Outcome, TrialRecord
from studytool.seeds import derive_seed
from studytool.settings import MOST_TOGETHER
from studytool.spec import StudySpec, TrialSpec
from studytool.study.armstate import ArmState
from studytool.study.budget import Budget
from studytool.study.choices import Choices
from studytool.study.events import Cause, Observer
from studytool.study.ledger import Ledger
from studytool.study.records import new_record
from studytool.training.packs import may_train_together, trains_a_head

RETRIES = 2
"""How often a trial is begun again from its last checkpoint after its worker died or raised."""
PARTS = 4
"""A trial that ran out of memory computes its batches in so many times more parts when it is tried again."""


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
        self._regrouped: list[tuple[TrialSpec, ...]] = []
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

    def next_trials(self) -> tuple[TrialSpec, ...]:
        """What to run now in one place: a trial or several that are trained together; none if there is none at present.

        See `next_trial` for the order. Trials of a search that are trained together are all proposed before any of them
        has a result, also after a resume. One whose worker died, or that ran out of memory, is tried again alone.
        """
        if self._regrouped:
            return self._regrouped.pop(0)
        first = self.next_trial()
        if first is None:
            return ()
        together, pack = self._spec.resources.trials_together, [first]
        most = MOST_TOGETHER if together == "auto" else together
        if most > 1 and self._may_share(first):
            for trial in self._beside(first):
                if len(pack) == most or not self.budget.allows(running=self._running):
                    break
                self._take(trial)
                pack.append(self._begin(trial))
        return tuple(pack)

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
        return trial and self._begin(trial)

    def regroup(self, trial_ids: Sequence[str]) -> None:
        """Let those still running of trials trained together go on as the same attempt, once one of them has ended."""
        left = [self._running[trial_id] for trial_id in trial_ids if trial_id in self._running]
        if self.budget.used_up:
            for trial in left:
                self._set_aside(trial)
        elif left:
            self._regrouped.append(tuple(map(self._as_it_runs, left)))

    def _begin(self, trial: TrialSpec) -> TrialSpec:
        record = self._ledger.get(trial.trial_id) or new_record(trial, self._fingerprint)
        record = self._ledger.put(replace(record, attempts=record.attempts + 1))
        self._running[trial.trial_id] = trial
        for observer in self._observers:
            observer.trial_started(trial, record)
        return self._as_it_runs(trial)

    def _as_it_runs(self, trial: TrialSpec) -> TrialSpec:
        record = self._ledger.get(trial.trial_id)
        if record is not None and record.parts is not None:
            trial = trial.model_copy(update={"train": trial.train.model_copy(update={"accumulate": record.parts})})
        return (self._ledger.choices or Choices()).applied(trial)

    def _may_share(self, trial: TrialSpec) -> bool:
        return trains_a_head(trial) and not self._deaths[trial.trial_id] and not self.needs_room(trial.trial_id)

    def _beside(self, first: TrialSpec) -> Iterator[TrialSpec]:
        """What waits and may be trained together with a trial, in order, up to the first that may not.

        So whom a trial is compared with when it is pruned stays the same as one by one.
        """
        state = self._by_name[first.arm]
        if first.phase == "search":
            self._propose_with(state, first)
            waiting = [self._search_trial(state, *begun) for begun in state.interrupted]
        else:
            waiting = [self._confirm_trial(state, number) for number in state.confirm_queue]
        for trial in [*self._again, *waiting]:
            begun = self._ledger.get(trial.trial_id) is not None or self.budget.new_trial_allowed
            as_it_runs = self._as_it_runs(trial)
            if not begun or not may_train_together(first, as_it_runs) or not self._may_share(as_it_runs):
                return
            yield trial

    def _take(self, trial: TrialSpec) -> None:
        """Take a trial out of where it waits."""
        state = self._by_name[trial.arm]
        if trial in self._again:
            self._again.remove(trial)
        elif trial.phase == "search":
            state.interrupted = [begun for begun in state.interrupted if begun[0] != trial.number]
        else:
            state.hand_out_confirm(trial.number)

    def _propose_with(self, state: ArmState, first: TrialSpec) -> None:
        """Propose all that is proposed together with a trial."""
        together = self._spec.resources.trials_together
        while state.search_started < state.search_planned and self.budget.new_trial_allowed:
            if not state.search.proposed_together(first.number, state.search_started, together):
                return
            trial = self._propose(state)
            if trial is not None:
                self._ledger.put(new_record(trial, self._fingerprint))

    def needs_room(self, trial_id: str) -> bool:
        """Whether a trial ran out of memory before and should share the machine with as little as possible."""
        record = self._ledger.get(trial_id)
        return record is not None and record.parts is not None

    def epoch(self, trial_id: str, result: EpochResult, device: DeviceInfo | None = None) -> bool:
        """Take an epoch of a running trial; True if the trial has to stop now. A known one is not judged again."""
        trial = self._running.get(trial_id)
        if trial is None:
            return True
        record = self._ledger.get(trial_id)
        assert record is not None
        if result.epoch <= len(record.epochs):
            is_trained_again = result != record.epochs[result.epoch - 1]
            if is_trained_again:
                record = self._ledger.replace_epoch(trial_id, result, device)
                for observer in self._observers:
                    observer.epoch_ended(record, result)
            if self._draw_consequence(trial, record, result):
                return True
            return is_trained_again and self._is_beyond_budget(trial)
        value = result.val.metric(self._spec.metric.name)
        if not math.isfinite(value):
            self._ledger.add_lost(trial_id, result.cost.device_seconds - record.cost.device_seconds)
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
            return True
        return self._is_beyond_budget(trial)

    def _is_beyond_budget(self, trial: TrialSpec) -> bool:
        """Whether the budget does not allow the next epoch of a trial, which is set aside then."""
        if self.budget.allows(trial.trial_id, running=self._running):
            return False
        self._set_aside(trial)
        return True

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

    def failed(
        self, trial_id: str, message: str, *, cause: Cause = Cause.TRIAL, details: str = "", lost: float = 0.0
    ) -> None:
        """An attempt at a running trial broke: the trial will be tried again, or it ends as FAILED.

        Args:
            trial_id: a running trial; another one is ignored.
            message: one line.
            cause: a trial's own fault is not tried again, a worker's `RETRIES` times, want of memory once; the loss of
                a node says nothing of the trial, which is tried again however often.
            details: a traceback, for the log.
            lost: device-seconds of what broke off; the budget pays for them.
        """
        trial = self._running.get(trial_id)
        if trial is None:
            return
        if cause is Cause.MEMORY:
            message = f"out of memory: {message}"
        self._ledger.add_lost(trial_id, lost)
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
            if self._propose(state) is None:
                self._settle_waiting(state)

    def _propose(self, state: ArmState) -> TrialSpec | None:
        """A new search trial of an arm; None if its configuration is another one's, whose result it waits for."""
        number, parameters = state.search.propose()
        state.search_started += 1
        trial = self._search_trial(state, number, parameters)
        same_as = state.trial_with(parameters)
        if same_as is None:
            state.hold(number, parameters)
            state.interrupted.append((number, parameters))
            return trial
        self._ledger.put(replace(new_record(trial, self._fingerprint), same_as=same_as))
        state.waiting.append((number, parameters))
        return None

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
            if outcome is None or (outcome is Outcome.FAILED and not self.budget.new_trial_allowed):
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
        trials = [self._confirm_trial(state, state.confirm_queue[0]) for state in states]
        begun = {trial.trial_id: self._ledger.get(trial.trial_id) is not None for trial in trials}
        for trial in sorted(trials, key=lambda trial: (not begun[trial.trial_id], trial.number)):
            if self.budget.new_trial_allowed or begun[trial.trial_id]:
                self._by_name[trial.arm].hand_out_confirm(trial.number)
                return trial
        return None

    def _confirm_trial(self, state: ArmState, number: int) -> TrialSpec:
        seed = derive_seed(self._spec.seed, "confirm", number)
        return self._spec.trial(
            state.arm, state.best_parameters, phase="confirm", number=number, seed=seed, source=state.source
        )
