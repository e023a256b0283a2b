"""What can happen in a study, and who is told of it."""

from __future__ import annotations

from enum import Enum

from studytool.results import EpochResult, TrialRecord
from studytool.spec import Arm, TrialSpec


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
        """A trial finished an epoch; one that it had finished before, if nobody had written down its state."""

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
