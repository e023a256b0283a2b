"""The nine points of a report. Each gives a `Section`; one without data says so in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from studytool.data.shards import Dataset
from studytool.report import figures, plots
from studytool.report.claims import Comparison, compare_with_random, gaps_to_winner, least_seeds
from studytool.report.compare import ArmSummary, confirm_runs, headline_metric, summarize_arms
from studytool.report.importance import LEAST_TRIALS, importance, search_points
from studytool.report.statistics import PairedDifference
from studytool.report.table import best_first
from studytool.report.tables import Table, arms_table, claims_tables, front_table, time_table
from studytool.results import TrialRecord
from studytool.spec import StudySpec


@dataclass(frozen=True)
class StudyResults:
    """All that a report is made from; `dataset` is None where it is not on this machine (any more).

    `environment` is what the study was run with, by name; `folder` holds the trials.
    """

    spec: StudySpec
    records: Sequence[TrialRecord]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    dataset: Dataset | None = None

    @cached_property
    def summaries(self) -> tuple[ArmSummary, ...]:
        """The arms."""
        return summarize_arms(self.spec, self.records)

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Each initialization against random."""
        return compare_with_random(self.spec, self.records, self.summaries)

    @cached_property
    def gaps(self) -> dict[str, PairedDifference]:
        """How far the other arms are behind the winner."""
        return gaps_to_winner(self.spec, self.records, self.summaries)

    @cached_property
    def winner(self) -> ArmSummary | None:
        """The best arm."""
        return next((s for s in self.summaries if s.is_winner), None)

    def trial_folder(self, trial_id: str) -> Path:
        """Where a trial keeps its files."""
        return self.folder / "trials" / trial_id


@dataclass(frozen=True)
class Picture:
    """A figure: its files (PNG and SVG) and what stands below it."""

    paths: tuple[Path, ...]
    caption: str


@dataclass(frozen=True)
class Section:
    """One point: a sentence on how to read it, then what there is; `missing` says what there is not, and why."""

    key: str
    title: str
    lead: str
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    missing: str = ""
    folded: tuple[tuple[str, str], ...] = ()


NOT_CONFIRMED = "No confirm run has finished yet, so there is nothing to show here."


def arms(results: StudyResults) -> Section:
    """1: every arm with its scores, intervals and costs."""
    lead = (
        "Each row is one combination of the compared settings (an arm), best first. Brackets hold the 95% interval: "
        "the range in which the mean over very many repetitions would lie, in 95 of 100 such studies."
    )
    missing = "" if any(s.confirmed for s in results.summaries) else NOT_CONFIRMED
    table = arms_table(results.spec, results.summaries, results.gaps)
    return Section("arms", "Which arm is best", lead, (table,), missing=missing)


def claims(results: StudyResults, folder: Path) -> Section:
    """2: is an initialization better than random weights, and cheaper?"""
    lead = (
        "Each way to start the network against the same network started from random weights, with the same seeds. "
        "A difference whose interval includes zero may be chance. "
    )
    title = "Does it help not to start from random weights"
    comparisons = results.comparisons
    if not comparisons:
        why = "The study compares no initialization with a random one of the same backbone, so this is not tested."
        return Section("claims", title, lead, missing=why)
    fewest = least_seeds(comparisons)
    if any(c.difference and c.difference.interval.count < fewest for c in comparisons):
        lead += (
            f"With fewer than {fewest} seeds Wilcoxon's test cannot call any of these differences significant after "
            "Holm's correction, however large they are; the t test can."
        )
    compared = any(c.difference for c in comparisons)
    picture = Picture(
        figures.difference_lines(comparisons, folder / "differences") if compared else (),
        "Difference to random initialization in the test score, mean and 95% interval over paired seeds.",
    )
    return Section(
        "claims",
        title,
        lead,
        claims_tables(results.spec, comparisons),
        (picture,) if compared else (),
        missing="" if compared else NOT_CONFIRMED,
    )


def accuracy_and_cost(results: StudyResults, folder: Path) -> Section:
    """3: score against cost, with the Pareto front."""
    title = "Accuracy against cost"
    lead = (
        "Upwards is better, to the left is cheaper. Arms on the dashed line are those that no other arm beats in both; "
        "any arm below it has a better and cheaper neighbour."
    )
    if not any(s.mean_confirm_cost and headline_metric(results.spec) in s.test for s in results.summaries):
        return Section("cost", title, lead, missing=NOT_CONFIRMED)
    kinds: list[tuple[plots.CostKind, str, str]] = [
        ("device_seconds", "accuracy_against_cost", "Score against device time."),
        (
            "flops",
            "accuracy_against_operations",
            "Score against multiplications and additions.",
        ),
    ]
    has_energy = any(plots.cost_of(s, "energy_joules") for s in results.summaries)
    if has_energy:
        kinds.append(("energy_joules", "accuracy_against_energy", "Score against the energy the device reported."))
    pictures = tuple(
        Picture(plots.accuracy_against_cost(results.spec, results.summaries, folder / name, against=kind), caption)
        for kind, name, caption in kinds
    )
    missing = "" if has_energy else "Energy was not measured: the device reports none."
    return Section("cost", title, lead, (), pictures, missing)


def curves(results: StudyResults, folder: Path) -> Section:
    """4: learning curves, on epochs and on device-seconds."""
    title = "Learning curves"
    lead = (
        "The validation score during training: the line is the mean of the seeds, the band reaches from the lowest to "
    )
    lead += "the highest seed."
    if not any(s.confirmed for s in results.summaries):
        return Section("curves", title, lead, missing=NOT_CONFIRMED)
    spec, records = results.spec, results.records
    pictures = (
        Picture(plots.learning_curves(spec, records, folder / "curves"), "On epochs (passes over the training data)."),
        Picture(
            plots.learning_curves(spec, records, folder / "curves_on_time", against="device_seconds"),
            "The same on device time.",
        ),
    )
    return Section("curves", title, lead, (), pictures)


def what_mattered(results: StudyResults, folder: Path) -> Section:
    """5: importance of the factors and slices through the search."""
    title = "What mattered in the search"
    lead = (
        "How much of the difference between search trials each setting explains (functional ANOVA), and where good "
        "values of the tuned settings lie. Hollow marks are trials that were stopped early."
    )
    spec = results.spec
    points = search_points(spec, results.records)
    if not spec.search.space:
        return Section("search", title, lead, missing="The study tunes nothing, so there was no search.")
    if not points:
        return Section("search", title, lead, missing="No search trial has finished an epoch yet.")
    pictures = [
        Picture(figures.search_slices(spec, points, folder / "search"), "Best validation score of every search trial.")
    ]
    shares = importance(spec, points)
    if shares:
        caption = "Share of the scatter explained by each setting alone or together with others; trials of all arms."
        pictures.insert(0, Picture(figures.importance_bars(shares, folder / "importance"), caption))
    missing = "" if shares else f"Fewer than {LEAST_TRIALS} search trials finished, too few to weigh the settings."
    front = front_table(spec, results.records)
    return Section("search", title, lead, (front,) if front else (), tuple(pictures), missing)


def where_time_went(results: StudyResults, folder: Path) -> Section:
    """8: seconds by phase, and what else it used."""
    title = "Where the time went"
    lead = (
        "Waiting for data, training, evaluating and writing checkpoints are the cost; idle is the time in which a "
        "trial held its place while the program wrote things down."
    )
    ordered = [s for s in best_first(results.summaries, results.spec) if s.cost.seconds]
    if not ordered:
        return Section("time", title, lead, missing="No trial has finished an epoch yet.")
    picture = Picture(
        figures.time_bars({s.arm: s.cost for s in ordered}, folder / "time"), "Wall time of all trials of an arm."
    )
    return Section("time", title, lead, (time_table(results.spec, results.records, ordered),), (picture,))


def confirm_folders(results: StudyResults, arm: str) -> list[Path]:
    """The folders of the confirm runs that an arm stands for."""
    return [results.trial_folder(r.trial_id) for r in confirm_runs(results.spec, results.records, arm)]
