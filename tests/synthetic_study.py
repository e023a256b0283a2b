"""A study without training: scores follow from the configuration, so that every decision can be foreseen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from studytool.results import Cost, EpochResult, Outcome, Scores
from studytool.spec import TrialSpec, load_study
from studytool.study.director import Director
from studytool.study.ledger import Ledger

STUDY = """
name: small
data: {path: data/small}
arms:
  freeze: [none, backbone]
search:
  learning_rate: {log_uniform: [1e-4, 1e-1]}
  trials_per_arm: 6
  scheduler: {asha: {grace_epochs: 1, reduction_factor: 2}}
confirm: {seeds: 2}
train: {max_epochs: 4}
"""


def scores(value: float) -> Scores:
    return Scores(10, 1 - value, value, value, value, value, ((5, 0), (0, 5)))


def synthetic_epochs(trial: TrialSpec) -> Iterator[EpochResult]:
    """Scores rise with the epochs and are highest at a learning rate of 0.01; 'none' beats 'backbone'."""
    quality = 1 / (1 + abs(math.log10(trial.train.learning_rate) + 2)) * (1.0 if trial.model.freeze == "none" else 0.8)
    for epoch in range(1, trial.train.max_epochs + 1):
        value = quality * epoch / trial.train.max_epochs
        last = epoch == trial.train.max_epochs
        yield EpochResult(
            epoch=epoch,
            steps=epoch,
            train_loss=1 - value,
            learning_rate=trial.train.learning_rate,
            val=scores(value),
            cost=Cost(train_seconds=float(epoch), device_seconds=float(epoch), samples=epoch),
            best_epoch=epoch,
            best_value=value,
            test=scores(value * 0.9) if last and trial.phase == "confirm" else None,
            is_last=last,
        )


class Driver:
    """Runs a director's trials as Ray Tune would with one slot, one after another or together where they may be.

    It can be killed after some epochs. `packs` are the trials that were handed out together.
    """

    def __init__(self, folder: Path, text: str = STUDY, fingerprint: str = "data") -> None:
        (folder / "a.yaml").write_text(text)
        self.spec = load_study(folder / "a.yaml", [f"output={folder / 'studies'}"])
        self.fingerprint = fingerprint
        self.epochs_run: list[tuple[str, int]] = []
        self.packs: list[tuple[str, ...]] = []

    def run(self, kill_after: int | None = None) -> Ledger:
        ledger = Ledger(self.spec, self.fingerprint)
        try:
            director = Director(self.spec, ledger, self.fingerprint)
            while not director.finished:
                trials = director.next_trials()
                if not trials:  # the last one had the configuration of another one, and takes its result
                    assert director.finished
                    break
                self.packs.append(tuple(trial.trial_id for trial in trials))
                walks = {trial.trial_id: synthetic_epochs(trial) for trial in trials}
                stopped: list[bool] = []
                while not any(stopped):
                    stopped = []
                    for trial_id, walk in walks.items():
                        result, record = next(walk), ledger.get(trial_id)
                        assert record is not None
                        if result.epoch > len(record.epochs):  # else it was done before, and is only told again
                            if kill_after == len(self.epochs_run):
                                return ledger
                            self.epochs_run.append((trial_id, result.epoch))
                        stopped.append(director.epoch(trial_id, result))
                director.regroup(tuple(walks))
        finally:
            ledger.close()
        return ledger

    def outcome_of(self, ledger: Ledger) -> dict[str, tuple[Outcome | None, int, float]]:
        return {r.trial_id: (r.outcome, len(r.epochs), r.parameters["learning_rate"]) for r in ledger.records}
