"""The tables of a report, as plain texts in rows and columns: for the page, as CSV, and as LaTeX."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from studytool.report import words
from studytool.report.claims import Comparison
from studytool.report.compare import ArmSummary, headline_metric
from studytool.report.statistics import PairedDifference
from studytool.report.table import best_first, to_target
from studytool.results import TrialRecord
from studytool.spec import StudySpec
from studytool.training.cost import samples_per_second, share_of_peak

PHASES = ("data", "train", "evaluate", "checkpoint", "idle")


@dataclass(frozen=True)
class Table:
    """Rows of texts below `columns`; the first column names the row. `best` are the numbers of rows in bold."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def csv(self) -> str:
        """The table as comma-separated values, with a header."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return out.getvalue()

    def latex(self) -> str:
        """The table for a paper, in the style of the package booktabs."""
        lines = [
            r"\begin{table}",
            rf"\caption{{{_latex(' '.join([_ended(self.title), *self.notes]))}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
            r"\toprule",
            _latex_row(self.columns),
            r"\midrule",
            *(_latex_row(row, bold=number in self.best) for number, row in enumerate(self.rows)),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"


def arms_table(spec: StudySpec, summaries: Sequence[ArmSummary], gaps: Mapping[str, PairedDifference]) -> Table:
    """Every arm, best first by validation: test scores in % with 95% intervals, costs, gap to the best."""
    headline = headline_metric(spec)
    shown = sorted(("accuracy", "balanced_accuracy", "macro_f1", "macro_auc"), key=lambda name: name != headline)
    priced, aimed = spec.resources.price_per_device_hour is not None, spec.metric.target is not None
    columns = [
        "arm",
        "seeds",
        *(_heading(name) for name in shown),
        "behind the best, points",
        "one training",
        "whole arm",
    ]
    columns += ["to target"] * aimed + ["price of whole arm"] * priced
    rows = []
    ordered = best_first(summaries, spec)
    for summary in ordered:
        gap = gaps.get(summary.arm)
        row = [
            summary.arm,
            str(summary.confirmed),
            *(words.percent(summary.test[name]) if name in summary.test else "–" for name in shown),
            "best" if summary.is_winner else words.percent(gap.interval) if gap else "–",
            words.device_time(summary.mean_confirm_cost) or "–",
            words.device_time(summary.cost) or "–",
        ]
        row += [to_target(summary.target) or "–"] * aimed + [words.money(spec, summary.cost)] * priced
        rows.append(tuple(row))
    notes = [
        "Test split, in %, mean over seeds with its 95% interval (Student's t).",
        "The best arm is chosen by validation; the gap is paired by seed.",
        "Times are device time: of one training, and of all trials of the arm, its search included.",
    ]
    if aimed:
        notes.append(
            f"To target: device time until {spec.metric.name} first reached {spec.metric.target:g}; (k/n) means that "
            "only k of n runs ever did, and the mean is over those."
        )
    failed = [f"{s.arm}: {s.confirm_failed}" for s in ordered if s.confirm_failed]
    if failed:
        notes.append(f"Confirm runs that failed, which are in no mean: {', '.join(failed)}.")
    notes += words.shared_device(s.side_by_side for s in summaries)
    best = frozenset(i for i, summary in enumerate(ordered) if summary.is_winner)
    return Table("Arms", tuple(columns), tuple(rows), best, tuple(notes))


def claims_tables(spec: StudySpec, comparisons: Sequence[Comparison]) -> tuple[Table, ...]:
    """The two claims: is an initialization more accurate than random, and does it reach the target at less cost?"""
    difference = _difference_table(spec, comparisons)
    return (difference,) if spec.metric.target is None else (difference, _ratio_table(spec, comparisons))


def front_table(spec: StudySpec, records: Sequence[TrialRecord]) -> Table | None:
    """The search trials that no other of their arm beats in both score and cost; None where cost was not weighed."""
    front = [r for r in records if r.on_pareto_front and r.last]
    if not front:
        return None
    order = {arm.name: place for place, arm in enumerate(spec.list_arms())}
    front = [r for r in front if r.arm in order]
    front.sort(key=lambda r: (order[r.arm], r.cost.device_seconds))
    named = [name.replace("_", " ") for name in spec.search.space]
    rows = [
        (
            r.trial_id,
            *(words.plain(r.parameters[name]) for name in spec.search.space),
            f"{r.epochs[-1].best_value:.3f}",
            words.device_time(r.cost) or "–",
        )
        for r in front
    ]
    note = (
        "Search trials that no other one of the same arm beats in both; each arm's from the cheapest to the dearest. "
        "Which one is confirmed is decided by the score."
    )
    return Table(
        "Score against cost in the search", ("trial", *named, spec.metric.name, "cost"), tuple(rows), notes=(note,)
    )


def time_table(spec: StudySpec, records: Sequence[TrialRecord], summaries: Sequence[ArmSummary]) -> Table:
    """Seconds by phase of all trials of each arm, and what else they used."""
    named = ("arm", "data", "train", "evaluate", "checkpoint", "idle", "volumes/s", "operations", "memory", "energy")
    priced = spec.resources.price_per_device_hour is not None
    cached = any(summary.cost.cache_saved_seconds for summary in summaries)
    shares = {
        s.arm: [share_of_peak(r.cost, r.device) for r in records if r.arm == s.arm and r.device] for s in summaries
    }
    shared = any(share is not None for of_arm in shares.values() for share in of_arm)
    rows = []
    for summary in summaries:
        cost = summary.cost
        rates = [rate for r in records if r.arm == summary.arm and (rate := samples_per_second(r.epochs))]
        row = [summary.arm]
        row += [words.duration(getattr(cost, f"{phase}_seconds")) for phase in PHASES]
        row += [f"{statistics.median(rates):.3g}" if rates else "–", words.operations(cost.flops)]
        row += [f"{cost.peak_memory_gib:.2g} GiB", words.energy(cost)]
        known = [share for share in shares[summary.arm] if share is not None]
        row += [f"{statistics.median(known):.1%}" if known else "–"] * shared
        row += [words.duration(cost.device_seconds_without_cache)] * cached + [words.money(spec, cost)] * priced
        rows.append(tuple(row))
    notes = [
        "All trials of the arm, search included. Volumes/s: in training, without the first, slower epoch of each "
        "trial, which counts as cost all the same. Operations: multiplications and additions, without the backward "
        "pass of what is frozen. Memory: the highest of all trials.",
    ]
    if cached:
        notes.append(
            "Without cache: the device time if every epoch of every trial had computed its frozen part anew. Cost "
            "ratios compare arms by this time, as with the cache the first trial pays for the others."
        )
    if not priced:
        notes.append("No price: resources.price_per_device_hour in the study file turns device time into money.")
    if shared:
        notes.append(
            "Of peak: the operations of a trial over what the device could have computed in all of its seconds at its "
            "precision (MFU); the median of the trials."
        )
    notes += words.shared_device(s.side_by_side for s in summaries)
    columns = (*named, *(["of peak"] * shared), *(["without cache"] * cached), *(["price"] * priced))
    return Table("Time by phase", columns, tuple(rows), notes=tuple(notes))


def _difference_table(spec: StudySpec, comparisons: Sequence[Comparison]) -> Table:
    columns = (
        "arm",
        "pairs",
        "points above random",
        "bootstrap",
        "paired t test, p",
        "Wilcoxon, p",
        "verdict",
        "more seeds",
    )
    rows = []
    for c in comparisons:
        d = c.difference
        row = [
            c.arm,
            str(d.interval.count) if d else "0",
            words.percent(d.interval, signed=True) if d else "not confirmed yet",
            _bootstrap(c.bootstrap),
            _p_values(d.p_t if d else None, c.p_t_holm),
            _p_values(d.p_wilcoxon if d else None, c.p_wilcoxon_holm),
            c.verdict,
            _more_seeds(c),
        ]
        rows.append(tuple(row))
    name = words.METRIC_WORDS[headline_metric(spec)]
    notes = (
        f"Difference in test {name} to {_references(comparisons)}, in points, paired by seed, with its 95% interval "
        "(Student's t).",
        "The bootstrap interval (BCa) is too narrow for so few seeds and decides nothing.",
        "p values: in brackets after Holm's correction for all comparisons. The verdict follows the interval and the t "
        "test; “probably” where the corrected p is not below 0.05.",
        "More seeds: how many would likely settle an open difference, if it is as large as it looks.",
    )
    best = frozenset(i for i, c in enumerate(comparisons) if c.verdict in ("better", "probably better"))
    return Table("Is it more accurate?", columns, tuple(rows), best, notes)


def _ratio_table(spec: StudySpec, comparisons: Sequence[Comparison]) -> Table:
    columns = ("arm", "pairs", "cost to target / that of random", "itself never reached it", "random never", "verdict")
    rows = []
    for c in comparisons:
        r = c.cost_ratio
        never = (f"{r.first_never} of {r.count}", f"{r.second_never} of {r.count}") if r else ("–", "–")
        rows.append((c.arm, str(r.count) if r else "0", words.ratio(r) or "–", *never, c.cost_verdict))
    notes = (
        f"Device-seconds until {spec.metric.name} first reached {spec.metric.target:g}, over those of "
        f"{_references(comparisons)}: geometric mean over pairs, with its 95% interval. Below 1 is cheaper.",
        "A run that never reached the target would have needed more than it spent, so it bounds the ratio: “at most”, "
        "“at least”, or, if both sides have such runs, not known.",
        "The verdict follows the interval; “probably” where the p of the t test of the logarithms, after Holm's "
        "correction for all comparisons, is not below 0.05.",
        *words.shared_device(c.side_by_side for c in comparisons),
    )
    best = frozenset(i for i, c in enumerate(comparisons) if c.cost_verdict in ("cheaper", "probably cheaper"))
    return Table("Does it cost less to reach the target?", columns, tuple(rows), best, notes)


def _references(comparisons: Sequence[Comparison]) -> str:
    names = list(dict.fromkeys(c.reference for c in comparisons))
    if len(names) == 1:
        return names[0]
    left_out = any(c.is_unfrozen for c in comparisons)
    else_unfrozen = " (where the study leaves that out, with nothing frozen as well)" if left_out else ""
    return f"the arm with random weights and otherwise the same settings{else_unfrozen}"


def _heading(metric: str) -> str:
    name = words.METRIC_WORDS[metric]
    return f"{name}, %"


def _bootstrap(ends: tuple[float, float] | None) -> str:
    return "–" if ends is None else f"[{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]".replace("-", "−")


def _p_values(p: float | None, corrected: float | None) -> str:
    return "–" if p is None else f"{words.p_value(p)} ({words.p_value(corrected)})"


def _more_seeds(comparison: Comparison) -> str:
    if comparison.difference is None or comparison.more_seeds is None:
        return "–"
    return "settled" if comparison.more_seeds == 0 else f"about {comparison.more_seeds}"


_LATEX = str.maketrans(
    {
        "_": r"\_",
        "%": r"\%",
        "&": r"\&",
        "#": r"\#",
        "$": r"\$",
        "−": "$-$",
        "–": "--",
        "<": "$<$",
        "“": "``",
        "”": "''",
    }
    | {"{": r"\{", "}": r"\}", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def _latex(text: str) -> str:
    return text.translate(_LATEX)


def _ended(title: str) -> str:
    return title if title.endswith("?") else f"{title}."


def _latex_row(cells: Sequence[str], *, bold: bool = False) -> str:
    return " & ".join(rf"\textbf{{{_latex(c)}}}" if bold else _latex(c) for c in cells) + r" \\"
