"""What a person sees while a study runs: a table that updates on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from studytool.results import EpochResult, Outcome, TrialRecord
from studytool.spec import Arm, StudySpec, TrialSpec
from studytool.study.events import Observer


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    def or_else(self, value: float) -> float:
        return self.total / self.count if self.count else value


@dataclass
class _ArmView:
    planned: dict[str, int]
    ended: dict[str, int] = field(default_factory=lambda: {"search": 0, "confirm": 0})
    best: float | None = None
    running: dict[str, str] = field(default_factory=dict)
    epoch_seconds: _Mean = field(default_factory=_Mean)


class Progress(Observer):
    """An observer of the director that shows what runs, what is left and how long that may take.

    The estimate takes the seconds per epoch seen so far in each arm (in all arms, for one not yet seen) and the epochs
    that ended search trials ran on average.
    """

    def __init__(self, spec: StudySpec, console: Console, slots: int, *, verbose: bool = False) -> None:
        self._spec = spec
        self._console = console
        self._slots = slots
        self._verbose = verbose
        self._begun = time.monotonic()
        self._arms = {
            arm.name: _ArmView({"search": spec.search.trials_planned, "confirm": spec.confirm.seeds})
            for arm in spec.list_arms()
        }
        self._epoch_seconds = _Mean()
        self._search_epochs = _Mean()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2, transient=True)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def take_up(self, records: tuple[TrialRecord, ...]) -> None:
        """Count the trials that an earlier run of the study has ended."""
        for record in records:
            if record.outcome is not None and record.arm in self._arms:
                self._count(record)
        done = sum(sum(view.ended.values()) for view in self._arms.values())
        if done:
            say(self._console, f"taking the study up again: {done} trials are done")

    def trial_started(self, trial: TrialSpec, record: TrialRecord) -> None:
        """Show the trial as running."""
        again = ", goes on where it was written down last" if record.epochs else ""
        self._arms[trial.arm].running[trial.trial_id] = f"{_label(record)} starts{again}"
        if self._verbose:
            say(self._console, f"{trial.trial_id}: starts{again}")

    def epoch_ended(self, record: TrialRecord, result: EpochResult) -> None:
        """Show the epoch's score and refresh the estimate."""
        metric = self._spec.metric.name
        view = self._arms[record.arm]
        for mean in (view.epoch_seconds, self._epoch_seconds):
            mean.add(result.cost.seconds / result.epoch)
        line = f"epoch {result.epoch}/{self._spec.train.max_epochs}  {metric} {result.val.metric(metric):.3f}"
        view.running[record.trial_id] = f"{_label(record)} {line}"
        if self._verbose:
            say(self._console, f"{record.trial_id}: {line}  train loss {result.train_loss:.3f}")

    def attempt_failed(self, record: TrialRecord, message: str, details: str, *, again: bool) -> None:
        """Say that the trial broke and is tried again; if it is not, its end says so."""
        self._arms[record.arm].running.pop(record.trial_id, None)
        if again:
            say(self._console, f"{self._clock()}  {record.trial_id}: {message}; trying again, see {self._log(record)}")

    def remarked(self, line: str) -> None:
        """Say it."""
        say(self._console, f"{self._clock()}  {line}")

    def trial_ended(self, record: TrialRecord) -> None:
        """Count the trial, and say how it ended."""
        self._arms[record.arm].running.pop(record.trial_id, None)
        self._count(record)
        outcome = record.outcome or Outcome.FAILED
        value = f"  {self._spec.metric.name} {record.last.best_value:.3f}" if record.last else ""
        reason = f"  {record.message}" if record.message else ""
        if outcome is Outcome.FAILED:
            reason += f"; see {self._log(record)}"
        say(
            self._console,
            f"{self._clock()}  {outcome:<8}  {record.trial_id}  epochs {len(record.epochs)}{value}{reason}"
            f"  ({self._left_words()})",
        )

    def trial_set_aside(self, record: TrialRecord) -> None:
        """Say that the trial was stopped by the study's budget."""
        self._arms[record.arm].running.pop(record.trial_id, None)
        say(self._console, f"{self._clock()}  set aside by the budget  {record.trial_id}  epochs {len(record.epochs)}")

    def arm_decided(self, arm: Arm, best: TrialRecord | None) -> None:
        """Say which configuration an arm is confirmed with."""
        if best is None:
            if self._spec.search.space:
                say(self._console, f"{arm.name}: no search trial survived; the arm has no result")
            return
        tuned = ", ".join(f"{name} {_number(best.parameters[name])}" for name in self._spec.search.space)
        say(self._console, f"{arm.name}: search decided for trial {best.number} ({tuned})")

    def seconds_left(self) -> float | None:
        """The estimate; None before the first epoch has ended."""
        if not self._epoch_seconds.count:
            return None
        typical = self._epoch_seconds.or_else(0.0)
        most = float(self._spec.train.max_epochs)
        epochs = {"search": self._search_epochs.or_else(most), "confirm": most}
        total = 0.0
        for view in self._arms.values():
            left = sum(epochs[phase] * (view.planned[phase] - view.ended[phase]) for phase in epochs)
            total += view.epoch_seconds.or_else(typical) * left
        return total / self._slots

    def _count(self, record: TrialRecord) -> None:
        view = self._arms[record.arm]
        view.ended[record.phase] = min(view.ended[record.phase] + 1, view.planned[record.phase])
        if record.phase == "search" and record.outcome is not Outcome.FAILED:
            self._search_epochs.add(len(record.epochs))
        if record.last:
            sign = self._spec.metric.sign
            view.best = sign * max(sign * v for v in (view.best, record.last.best_value) if v is not None)

    def _render(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        for heading in ("arm", "search", "confirm", f"best {self._spec.metric.name}", "running"):
            table.add_column(heading, no_wrap=True)
        for name, view in self._arms.items():
            best = "" if view.best is None else f"{view.best:.3f}"
            counts = [f"{view.ended[phase]}/{view.planned[phase]}" for phase in ("search", "confirm")]
            table.add_row(name, *counts, best, "   ".join(view.running.values()))
        return Group(table, Text(f"{self._clock()}, {self._left_words()}", style="dim"))

    def _log(self, record: TrialRecord) -> str:
        return str(self._spec.folder / "trials" / record.trial_id / "trial.log")

    def _clock(self) -> str:
        return duration(time.monotonic() - self._begun)

    def _left_words(self) -> str:
        left = self.seconds_left()
        return "time left not known yet" if left is None else f"about {duration(left)} left"


def say(console: Console, line: str) -> None:
    """Print a line as it is: no markup, no colours, not wrapped."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _label(record: TrialRecord) -> str:
    return f"{'seed' if record.phase == 'confirm' else 'trial'} {record.number}"


def _number(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
