"""Several studies side by side: other datasets, signal-to-noise ratios, simulated and real."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table as TerminalTable
from rich.text import Text

from studytool.report import words
from studytool.report.claims import Comparison
from studytool.report.compare import headline_metric
from studytool.report.sections import StudyResults
from studytool.report.tables import Table
from studytool.report.words import count


def answers_table(studies: Sequence[StudyResults]) -> Table:
    """One row per study: its best arm, what it reaches, its gain over random and the ratio of costs to target."""
    columns = (
        "study",
        "best arm",
        "metric",
        "test, %",
        "seeds",
        "points above random",
        "cost ratio to target",
        "state",
    )
    rows = []
    for results in studies:
        winner = results.winner
        metric = headline_metric(results.spec)
        score = winner.test.get(metric) if winner else None
        comparison = next((c for c in results.comparisons if winner and c.arm == winner.arm), None)
        difference = comparison.difference if comparison else None
        open_arms = sum(not s.is_finished for s in results.summaries)
        rows.append(
            (
                results.spec.name,
                winner.arm if winner else "–",
                words.METRIC_WORDS[metric],
                words.percent(score) if score else "not defined" if winner and winner.confirmed else "not confirmed",
                str(winner.confirmed) if winner else "0",
                words.percent(difference.interval, signed=True) if difference else "–",
                _cost_ratio(comparison) or "–",
                f"{count(open_arms, 'arm')} not finished" if open_arms else "finished",
            )
        )
    notes = (
        "Brackets: 95% intervals over seeds. Cost ratio: device-seconds to the target over those of random weights.",
    )
    return Table("What each study found", columns, tuple(rows), notes=notes)


def _cost_ratio(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    return words.ratio(comparison.cost_ratio) if comparison.cost_verdict != "shared device" else "shared device"


def across_table(studies: Sequence[StudyResults]) -> Table:
    """One row per arm, one column per study: test score in % with its interval; the best arm of a study has a star."""
    arms = list(dict.fromkeys(s.arm for results in studies for s in results.summaries))
    named = _names(studies)
    rows = []
    for arm in arms:
        cells = [arm]
        for results in studies:
            summary = next((s for s in results.summaries if s.arm == arm), None)
            score = summary.test.get(headline_metric(results.spec)) if summary else None
            star = "* " if summary is not None and summary.is_winner else ""
            cells.append(f"{star}{words.percent(score)}" if score else "–")
        rows.append(tuple(cells))
    shared = frozenset(i for i, row in enumerate(rows) if all(cell.startswith("* ") for cell in row[1:]))
    notes = (
        "Test scores in %, mean over seeds with its 95% interval; * is the best arm of a study, by validation. "
        "Studies on different data are not paired: compare gains, not scores.",
    )
    return Table("The arms in each study", ("arm", *named), tuple(rows), shared, notes)


def terminal_table(table: Table) -> TerminalTable:
    """A table for a terminal."""
    shown = TerminalTable(title=table.title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    shown.show_edge = shown.pad_edge = False
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if number else "left", overflow="fold")
    for number, row in enumerate(table.rows):
        shown.add_row(*map(Text, row), style="bold" if number in table.best else None)
    return shown


def _names(studies: Sequence[StudyResults]) -> list[str]:
    """Their names; two of the same name are told apart by their folders."""
    names = [results.spec.name for results in studies]
    return [
        name if names.count(name) == 1 else str(results.folder) for name, results in zip(names, studies, strict=True)
    ]
