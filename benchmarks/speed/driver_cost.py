"""What the driver's own work costs per trial, as the trials of a study grow: no Ray, no training. Used by `scale.py`.

The real director, ledger, search, logs, MLflow (SQLite, the real tracking room) and progress (to nowhere) are fed
epochs that follow from the configuration. At every quarter the study is put down and taken up again, as after a signal.
"""

from __future__ import annotations

import gc
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from studytool.report.compare import summarize_arms
from studytool.results import Cost, DeviceInfo, EpochResult, Scores
from studytool.spec import StudySpec, TrialSpec, load_study
from studytool.study.director import Director
from studytool.study.events import Observer
from studytool.study.ledger import Ledger
from studytool.study.observers import Housekeeping, TellTracker, TrialLogs
from studytool.study.progress import Progress
from studytool.study.search import ArmSearch
from studytool.study.status import study_status
from studytool.study.tracking import Tracker

CLASSES, EPOCHS, SEEDS, QUARTERS = 4, 3, 2, 4
# Both limits are counted against after every epoch, and never reached.
STUDY = f"""
name: driver
data: {{path: data}}
arms: {{batch_size: BATCHES}}
search:
  learning_rate: {{log_uniform: [1.0e-5, 1.0e-1]}}
  weight_decay: {{log_uniform: [1.0e-6, 1.0e-2]}}
  trials_per_arm: TRIALS
  sampler: SAMPLER
  scheduler: {{asha: {{grace_epochs: 1, reduction_factor: 3}}}}
confirm: {{seeds: {SEEDS}}}
train: {{max_epochs: {EPOCHS}}}
budget: {{trials: 1000000, device_hours: 1000000}}
"""


@dataclass
class Shares:
    """CPU seconds so far, by whose they are; `trials` have ended."""

    trials: int
    driver: float
    optuna: float
    mlflow: float
    rss_mib: float


@dataclass
class Growth:
    """`shares` after every so many trials, and what taking the study up again took, by the trials it had then."""

    shares: list[Shares] = field(default_factory=list)
    resumes: list[dict[str, float]] = field(default_factory=list)
    end: dict[str, float] = field(default_factory=dict)


def measure_driver(folder: Path, trials: int, arms: int, sampler: str, every: int, *, with_mlflow: bool) -> Growth:
    """Walk a study of `trials` search trials in `arms` arms in `folder`, and look every so many trials."""
    spec = _spec(folder, trials, arms, sampler)
    growth, clock = Growth(), _Clock()
    total = trials + arms * SEEDS
    for quarter in range(1, QUARTERS + 1):
        _walk(folder, spec, total * quarter // QUARTERS, every, growth, clock, with_mlflow=with_mlflow)
    for name, step in {
        "status": lambda: study_status(spec),
        "summary": lambda: summarize_arms(spec, _records(spec)),
    }.items():
        with _timed(growth.end, name):
            step()
    return growth


def _spec(folder: Path, trials: int, arms: int, sampler: str) -> StudySpec:
    batches = str([8 + k for k in range(arms)])
    text = STUDY.replace("BATCHES", batches).replace("TRIALS", str(trials // arms)).replace("SAMPLER", sampler)
    (folder / "driver.yaml").write_text(text)
    (folder / "manifest.json").write_text(json.dumps({"classes": [f"class-{k}" for k in range(CLASSES)]}))
    own = [f"output={folder / 'studies'}", f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"]
    return load_study(folder / "driver.yaml", own)


def _records(spec: StudySpec) -> Any:
    with closing(Ledger(spec, "data")) as ledger:
        return ledger.records


def _walk(
    folder: Path, spec: StudySpec, until: int, every: int, growth: Growth, clock: _Clock, *, with_mlflow: bool
) -> None:
    """Take the study up, run it until so many trials have ended, and put it down."""
    took: dict[str, float] = {}
    with ExitStack() as stack:
        with _timed(took, "ledger"):
            ledger = stack.enter_context(closing(Ledger(spec, "data")))
        observers: list[Observer] = [TrialLogs(ledger), Housekeeping(ledger)]
        tracker = None
        if with_mlflow:
            tracker = stack.enter_context(Tracker(spec.tracking.uri, spec, uid=ledger.uid))
            with _timed(took, "MLflow"):
                tracker.open_study("", {}, folder / "manifest.json")
                tracker.catch_up(ledger.records)
                _settle(tracker)
            observers.insert(1, TellTracker(tracker, ledger))
        with _timed(took, "replay"):
            director = Director(spec, ledger, "data", observers)
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        progress = stack.enter_context(Progress(spec, Console(file=nowhere), slots=1))
        observers.append(progress)
        with _timed(took, "progress"):
            progress.take_up(ledger.records)
            director.announce_decided()
        ended = sum(record.outcome is not None for record in ledger.records)
        growth.resumes.append({"trials": ended, **took})
        clock.begin()
        if not growth.shares:
            growth.shares.append(clock.shares(ended))
        while ended < until:
            ended += _run_one(director)
            if ended % every == 0:
                _settle(tracker)
                growth.shares.append(clock.shares(ended))
        _settle(tracker)
        clock.pause()


def _run_one(director: Director) -> int:
    """What Ray's bridge asks and tells for a trial."""
    assert not director.finished
    assert not any(map(director.needs_room, director.running))
    trial = director.next_trial()
    assert trial is not None
    for result in _epochs(trial):
        if director.epoch(trial.trial_id, result, DeviceInfo("cpu", "none")):
            break
    return 1


def _settle(tracker: Tracker | None) -> None:
    """Wait until MLflow has been told all."""
    if tracker is not None:
        tracker._outbox.ask("all before", lambda: None, timeout_seconds=600)


class _Clock:
    """CPU seconds of the walking itself: this thread's without Optuna's, Optuna's, and those of MLflow's thread."""

    def __init__(self) -> None:
        self._optuna = Counter[str]()
        self._before = self._begun = (0.0, 0.0, 0.0)
        for name in ("propose", "report", "tell"):
            setattr(ArmSearch, name, self._counted(getattr(ArmSearch, name)))

    def begin(self) -> None:
        self._begun = self._now()

    def pause(self) -> None:
        self._before = self._so_far()

    def shares(self, trials: int) -> Shares:
        gc.collect()
        driver, optuna, mlflow = self._so_far()
        return Shares(trials, driver - optuna, optuna, mlflow, psutil.Process().memory_info().rss / 2**20)

    def _so_far(self) -> tuple[float, float, float]:
        pairs = zip(self._before, self._now(), self._begun, strict=True)
        return tuple(before + now - begun for before, now, begun in pairs)  # type: ignore[return-value]

    def _now(self) -> tuple[float, float, float]:
        outboxes = [thread.ident for thread in threading.enumerate() if thread.name == "studytool-outbox"]
        mlflow = sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in outboxes if ident is not None)
        return time.thread_time(), self._optuna["seconds"], mlflow

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            begin = time.thread_time()
            try:
                return call(*arguments)
            finally:
                self._optuna["seconds"] += time.thread_time() - begin

        return counted


@contextmanager
def _timed(into: dict[str, float], name: str) -> Iterator[None]:
    """CPU seconds of the whole process."""
    begin = time.process_time()
    yield
    into[name] = time.process_time() - begin


def _epochs(trial: TrialSpec) -> Iterator[EpochResult]:
    """Scores rise with the epochs and are highest at a learning rate of 0.001."""
    quality = 1 / (1 + abs(math.log10(trial.train.learning_rate) + 3))
    for epoch in range(1, EPOCHS + 1):
        last = epoch == EPOCHS
        value = quality * epoch / EPOCHS
        yield EpochResult(
            epoch=epoch,
            steps=epoch,
            train_loss=1 - value,
            learning_rate=trial.train.learning_rate,
            val=_scores(value),
            cost=Cost(train_seconds=float(epoch), device_seconds=float(epoch), samples=100 * epoch),
            best_epoch=epoch,
            best_value=value,
            test=_scores(value) if last and trial.phase == "confirm" else None,
            is_last=last,
        )


def _scores(value: float) -> Scores:
    confusion = tuple(tuple(25 * (i == j) for j in range(CLASSES)) for i in range(CLASSES))
    return Scores(100, 1 - value, value, value, value, value, confusion)
