"""How a study stands: what runs, what is left, the best so far, what it has cost and will cost.

Only the ledger is read, and no lock taken, so that a running study is not disturbed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from studytool.errors import StudytoolError
from studytool.report.compare import ArmSummary, summarize_arms
from studytool.report.words import duration
from studytool.results import Outcome, TrialRecord, records_by_arm
from studytool.spec import StudySpec
from studytool.study.budget import device_seconds_spent
from studytool.study.heartbeat import SignOfLife, last_sign
from studytool.study.plan import ArmPlan, Plan, plan_study
from studytool.study.records import read_records
from studytool.study.storage import this_driver

_LOCKS = Path("/proc/locks")


@dataclass(frozen=True)
class RunningTrial:
    """A trial that has begun and not ended: the epochs it has done of those it may do, and its best value so far."""

    trial_id: str
    epochs: int
    most_epochs: int
    best: float | None


@dataclass(frozen=True)
class ArmStatus:
    """One arm: trials ended and planned of each phase, the best validation values, device-seconds spent.

    `confirmed` is the mean over its confirm trials, where there are any.
    """

    arm: str
    search_ended: int
    search_planned: int
    confirm_ended: int
    confirm_planned: int
    failed: int
    best: float | None
    confirmed: float | None
    device_seconds: float
    running: tuple[RunningTrial, ...] = ()


@dataclass(frozen=True)
class StudyStatus:
    """A study at a glance. `state` is "running", "interrupted" or "finished".

    `driver` is the last one ("HOST, process N") that runs it or has not said that it is done, `silent_seconds` how long
    ago it gave a sign of life, `epoch_seconds_ago` when the ledger got its last epoch. Money is in `currency`, None
    where the study file names no price; what is left is an estimate, None where nothing is known to estimate it from.
    """

    study: str
    folder: str
    state: str
    metric: str
    arms: tuple[ArmStatus, ...]
    best_arm: str | None
    trials_left: int
    device_seconds_spent: float
    device_seconds_left: float | None
    wall_seconds_left: float | None
    money_spent: float | None
    money_left: float | None
    currency: str
    driver: str | None = None
    silent_seconds: float | None = None
    epoch_seconds_ago: float | None = None
    problems: tuple[str, ...] = field(default=())


def study_status(spec: StudySpec) -> StudyStatus:
    """The status of a study from its ledger.

    Raises:
        StudytoolError: nothing was run of it yet, or its ledger is damaged.
    """
    if not (spec.folder / "trials").is_dir() and not (spec.folder / "study.json").is_file():
        raise StudytoolError(f"{spec.folder}: nothing of the study {spec.name} has been run yet; see `studytool plan`")
    plan = plan_study(spec, seconds_in_all=0)
    records = read_records(spec.folder)
    own = records_by_arm(records)
    summaries = {summary.arm: summary for summary in summarize_arms(spec, records)}
    sign = last_sign(spec.folder, spec.storage_address)
    runs = _is_locked(spec.folder) or (sign is not None and sign.is_fresh and not _was_killed_here(spec, sign))
    left = sum(arm.search + arm.confirm for arm in plan.arms)
    spent = device_seconds_spent(records)
    hours_left = plan.device_hours() if left else 0.0
    price = spec.resources.price_per_device_hour
    winner = next((name for name, summary in summaries.items() if summary.is_winner), None)
    return StudyStatus(
        study=spec.name,
        folder=spec.storage_address or str(spec.folder),
        state="running" if runs else "interrupted" if left else "finished",
        metric=spec.metric.name,
        arms=tuple(_arm(arm, summaries[arm.name], own.get(arm.name, ())) for arm in plan.arms),
        best_arm=winner,
        trials_left=left,
        device_seconds_spent=spent,
        device_seconds_left=None if hours_left is None else hours_left * 3600,
        wall_seconds_left=plan.wall_seconds if left else 0.0,
        money_spent=None if price is None else spent / 3600 * price,
        money_left=None if price is None or hours_left is None else hours_left * price,
        currency=spec.resources.currency,
        driver=sign.driver if sign else None,
        silent_seconds=sign.seconds_ago if sign else None,
        epoch_seconds_ago=_epoch_seconds_ago(spec.folder, records),
        problems=_problems(plan, runs),
    )


def status_dict(status: StudyStatus) -> dict[str, Any]:
    """The status as plain dicts, lists and numbers, ready for JSON."""
    return asdict(status)


def status_lines(status: StudyStatus) -> list[str]:
    """The status as lines for a person."""
    left = _count(status.trials_left, "trial")
    lines = [f"{status.study}: {_state(status)}, {left} left; results in {status.folder}"]
    width = max([len(arm.arm) for arm in status.arms] + [3])
    lines.append(f"{'arm':<{width}}    search   confirm  best {status.metric}")
    for arm in status.arms:
        mark = "*" if arm.arm == status.best_arm else " "
        search, confirm = (
            f"{ended}/{planned}"
            for ended, planned in (
                (arm.search_ended, arm.search_planned),
                (arm.confirm_ended, arm.confirm_planned),
            )
        )
        best = "-" if arm.best is None else f"{arm.best:.3f}"
        mean = "" if arm.confirmed is None else f", mean of confirm runs {arm.confirmed:.3f}"
        failed = f", {arm.failed} failed" if arm.failed else ""
        lines.append(f"{arm.arm:<{width}} {mark}  {search:>6}   {confirm:>7}  {best}{mean}{failed}")
    verb = "runs" if status.state == "running" else "was cut short"
    for arm in status.arms:
        for trial in arm.running:
            best = "" if trial.best is None else f", best {status.metric} {trial.best:.3f}"
            lines.append(f"{verb}: {trial.trial_id}, epoch {trial.epochs} of {trial.most_epochs} done{best}")
    lines.append(f"spent: {duration(status.device_seconds_spent)} of device time{_money(status, status.money_spent)}")
    lines.append(_left_line(status))
    return [*lines, *(f"problem: {problem}" for problem in status.problems)]


def _arm(plan: ArmPlan, summary: ArmSummary, own: Sequence[TrialRecord]) -> ArmStatus:
    open_ones = [record for record in own if record.outcome is None]
    values = [record.last.best_value for record in own if record.last and record.outcome is not Outcome.FAILED]
    best = summary.best_search_value
    if best is None and values:
        best = values[-1]
    return ArmStatus(
        arm=plan.name,
        search_ended=plan.search_planned - plan.search,
        search_planned=plan.search_planned,
        confirm_ended=plan.confirm_planned - plan.confirm,
        confirm_planned=plan.confirm_planned,
        failed=summary.counts[Outcome.FAILED],
        best=best,
        confirmed=summary.validation.mean if summary.validation else None,
        device_seconds=summary.cost.device_seconds,
        running=tuple(
            RunningTrial(r.trial_id, len(r.epochs), plan.most_epochs, r.last.best_value if r.last else None)
            for r in open_ones
        ),
    )


def _problems(plan: Plan, runs: bool) -> tuple[str, ...]:
    """What would stop the study if it were taken up again; a running one has overcome that."""
    return () if runs else plan.problems


def _state(status: StudyStatus) -> str:
    if status.state == "running":
        where = f" on {status.driver}" if status.driver else ""
        epoch = status.epoch_seconds_ago
        return f"running{where}, " + ("no epoch yet" if epoch is None else f"last epoch {duration(epoch)} ago")
    if status.state == "interrupted" and status.driver and status.silent_seconds is not None:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() - status.silent_seconds))
        return f"interrupted (no sign of life from {status.driver} since {since})"
    return status.state


def _epoch_seconds_ago(folder: Path, records: Sequence[TrialRecord]) -> float | None:
    """How long ago the ledger was written that holds the last epoch."""
    paths = [folder / "trials" / record.trial_id / "record.json" for record in records if record.epochs]
    written = [path.stat().st_mtime for path in paths if path.is_file()]
    return max(0.0, time.time() - max(written)) if written else None


def _was_killed_here(spec: StudySpec, sign: SignOfLife) -> bool:
    """Whether the driver was one of this machine, which would hold the lock."""
    host = this_driver().partition(",")[0]
    return spec.storage_address is None and _LOCKS.is_file() and sign.driver.partition(",")[0] == host


def _is_locked(folder: Path) -> bool:
    """Whether a process of this machine holds the lock of the study, by the kernel's own list."""
    try:
        state = (folder / ".lock").stat()
        held = _LOCKS.read_text(encoding="ascii")
    except OSError:
        return False
    return any(line.split()[-3].endswith(f":{state.st_ino}") for line in held.splitlines() if "FLOCK" in line)


def _left_line(status: StudyStatus) -> str:
    if status.trials_left == 0:
        return "left: nothing"
    if status.wall_seconds_left is None or status.device_seconds_left is None:
        return "left: not known yet; `studytool plan` measures it"
    money = _money(status, status.money_left)
    return f"left: about {duration(status.wall_seconds_left)} on this machine{money}"


def _money(status: StudyStatus, amount: float | None) -> str:
    return "" if amount is None else f", {amount:.2f} {status.currency}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
