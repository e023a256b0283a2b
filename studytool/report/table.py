"""The comparison of the arms as a table: for a terminal and, the same, as plain text for log files."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from studytool.report.compare import ArmSummary, TargetCost, headline_metric
from studytool.report.statistics import Interval
from studytool.report.words import count, duration
from studytool.results import Outcome
from studytool.spec import StudySpec


def table_text(summaries: Sequence[ArmSummary], spec: StudySpec) -> Table:
    """The arms, best first by the validation metric: test score, gain over random, cost, cost to target.

    Times are device time. See `table_notes` for what has to stand below it.
    """
    title = f"{spec.name}: test {headline_metric(spec).replace('_', ' ')} in %"
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.show_edge = table.pad_edge = False
    # Narrow terminals break arms anywhere, scores before their interval, and no number.
    table.add_column("arm", overflow="fold", min_width=10)
    table.add_column("mean and interval", justify="right", min_width=11)
    table.add_column("sd", justify="right", no_wrap=True)
    table.add_column("gain", justify="right", min_width=13)
    table.add_column("cost", justify="right", no_wrap=True)
    table.add_column("per run", justify="right", no_wrap=True)
    if spec.metric.target is not None:
        table.add_column("to target", justify="right", no_wrap=True)
    for summary in best_first(summaries, spec):
        cells = [f"{summary.arm} *" if summary.is_winner else summary.arm, *_cells(summary, spec)]
        table.add_row(*map(Text, cells), style="bold" if summary.is_winner else None)
    return table


def table_notes(summaries: Sequence[ArmSummary], spec: StudySpec) -> tuple[str, ...]:
    """The lines that belong below the table: how the winner was chosen, what gains are over, what to beware of."""
    notes = []
    winner = next((s for s in summaries if s.is_winner), None)
    if winner is not None:
        how = f"mean of {spec.metric.name} over {count(winner.confirmed, 'seed')}"
        waiting = "not all arms are" if any(s.validation for s in summaries) else "nothing is"
        chosen = (
            how
            if winner.chosen_by == "confirmation"
            else f"best {spec.metric.name} of the search; {waiting} confirmed yet"
        )
        notes.append(f"* best arm: chosen by validation ({chosen}); the test split chooses nothing.")
    failed = [f"{s.arm} {s.confirm_failed}" for s in summaries if s.confirm_failed]
    if failed:
        notes.append(f"failed confirm runs, which are in no mean: {', '.join(failed)}.")
    if any(s.test for s in summaries):
        notes.append("[a,b] is the 95% interval of the mean over seeds (Student's t); sd the deviation between seeds.")
    references = sorted({s.reference for s in summaries if s.gain and s.reference})
    if references:
        notes.append(f"gain: difference in points to {', '.join(references)}, paired by seed.")
    if any(s.mean_confirm_cost for s in summaries):
        notes.append("cost: device time of all trials of the arm; per run: mean of its confirm runs.")
    if spec.metric.target is not None and any(s.target for s in summaries):
        notes.append(
            f"to target: device time until {spec.metric.name} first reached {spec.metric.target:g}, mean of the runs "
            "that did; (k/n): the others never did, and would have needed more."
        )
    ended = {outcome: sum(s.counts[outcome] for s in summaries) for outcome in Outcome}
    counted = " (what they used is counted as cost)" if ended[Outcome.PRUNED] or ended[Outcome.FAILED] else ""
    notes.append("trials: " + ", ".join(f"{n} {outcome.lower()}" for outcome, n in ended.items()) + f"{counted}.")
    side_by_side = max((s.side_by_side for s in summaries), default=1)
    if side_by_side > 1:
        notes.append(
            f"Up to {side_by_side} trials ran side by side on one device: seconds are indicative only "
            "(resources.trials_at_once: 1 measures them clean)."
        )
    return tuple(notes)


def plain_text(summaries: Sequence[ArmSummary], spec: StudySpec) -> str:
    """The table and its notes without colours or control characters, as wide as they have to be."""
    console = Console(file=io.StringIO(), width=10_000, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(table_text(summaries, spec))
    file = console.file
    assert isinstance(file, io.StringIO)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    return "\n".join([*lines, "", *table_notes(summaries, spec)]) + "\n"


def to_target(target: TargetCost | None) -> str:
    """Device time to the target: `4.2 s`, `4.2 s (2/3)` where one of three runs never reached it, `never (0/3)`."""
    if target is None:
        return ""
    if target.mean is None:
        return f"never (0/{target.never})"
    of = f" ({target.reached}/{target.reached + target.never})" if target.never else ""
    return duration(target.mean.device_seconds) + of


def best_first(summaries: Sequence[ArmSummary], spec: StudySpec) -> list[ArmSummary]:
    """The winner, then the other arms by validation: confirmed ones before those that only have a search."""

    def rank(summary: ArmSummary) -> tuple[bool, bool, float]:
        confirmed = summary.validation.mean if summary.validation else None
        value = summary.best_search_value if confirmed is None else confirmed
        return (not summary.is_winner, confirmed is None, float("inf") if value is None else -spec.metric.sign * value)

    return sorted(summaries, key=rank)


def _cells(summary: ArmSummary, spec: StudySpec) -> list[str]:
    test = summary.test.get(headline_metric(spec))
    mean = summary.mean_confirm_cost
    cells = [
        _percent(test) if test else "not defined" if summary.confirmed else "not confirmed yet",
        f"{100 * test.sd:.1f}" if test and test.sd is not None else "",
        _percent(summary.gain.interval, signed=True) if summary.gain else "",
        duration(summary.cost.device_seconds) if summary.cost.device_seconds else "",
        duration(mean.device_seconds) if mean else "",
    ]
    return cells if spec.metric.target is None else [*cells, to_target(summary.target)]


def _percent(interval: Interval, *, signed: bool = False) -> str:
    def show(value: float) -> str:
        return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"

    if interval.low is None or interval.high is None:
        return f"{show(interval.mean)} ({'1 seed' if interval.count == 1 else f'{interval.count} alike'})"
    return f"{show(interval.mean)} [{show(interval.low)},{show(interval.high)}]"
