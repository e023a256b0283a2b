"""The numbers of a study as three CSV files, for whoever wants to draw or test something else."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from studytool.files import write_text
from studytool.report import words
from studytool.report.claims import Comparison
from studytool.report.compare import ArmSummary
from studytool.results import METRICS, Cost, Outcome, Scores, TrialRecord
from studytool.spec import StudySpec
from studytool.training.cost import cost_to_target, samples_per_second, share_of_peak


def write_tables(
    spec: StudySpec,
    records: Sequence[TrialRecord],
    summaries: Sequence[ArmSummary],
    comparisons: Sequence[Comparison],
    folder: Path,
) -> tuple[Path, ...]:
    """Write `trials.csv` (a row per trial), `arms.csv` (per arm) and `curves.csv` (per epoch) into `folder`.

    Scores are shares (0 to 1), seconds are device-seconds where the column says so, an empty cell is not known.
    """
    compared = {c.arm: c for c in comparisons}
    tables = {
        "trials.csv": [trial_row(spec, r) for r in records],
        "arms.csv": [arm_row(s, compared.get(s.arm)) for s in summaries],
        "curves.csv": [row for r in records for row in curve_rows(r)],
    }
    for name, rows in tables.items():
        write_text(folder / name, as_csv(rows))
    return tuple(folder / name for name in tables)


def trial_row(spec: StudySpec, record: TrialRecord) -> dict[str, Any]:
    """One trial: what it was, how it ended, what it reached, what it cost."""
    row: dict[str, Any] = {
        name: getattr(record, name) for name in ("trial_id", "arm", "phase", "number", "source", "seed", "attempts")
    }
    row |= {"outcome": str(record.outcome) if record.outcome else "UNFINISHED", "message": record.message}
    row |= {f"parameter/{name}": words.plain(value) for name, value in record.parameters.items()}
    row |= {"epochs": len(record.epochs), "on_pareto_front": record.on_pareto_front}
    if record.last is not None:
        row |= {"best_epoch": record.last.best_epoch, "best_value": record.last.best_value}
    row |= _scores("test", record.test)
    row |= _cost("", record.cost)
    row["lost_device_seconds"] = record.lost_device_seconds
    row["samples_per_second"] = samples_per_second(record.epochs)
    if spec.metric.target is not None:
        cost, reached = cost_to_target(record.epochs, spec.metric.target, spec.metric.sign)
        row |= {"reached_target": reached, "device_seconds_to_target": cost.device_seconds if reached else None}
    if record.device is not None:
        row |= {"device": record.device.name, "trials_side_by_side": record.device.trials_side_by_side}
        row["mfu"] = share_of_peak(record.cost, record.device)
    return row


def arm_row(summary: ArmSummary, comparison: Comparison | None) -> dict[str, Any]:
    """One arm: means with the ends of their intervals, its comparison with random, what it cost."""
    row: dict[str, Any] = {"arm": summary.arm, "is_best": summary.is_winner, "seeds": summary.confirmed}
    row |= {f"factor/{name}": words.plain(value) for name, value in summary.values.items()}
    row |= {f"tuned/{name}": words.plain(value) for name, value in summary.best_parameters.items()}
    row |= {f"trials_{outcome.lower()}": summary.counts[outcome] for outcome in Outcome}
    row |= {"best_search_value": summary.best_search_value}
    for name in METRICS:
        interval = summary.test.get(name)
        for part in ("mean", "low", "high", "sd"):
            row[f"test_{name}_{part}"] = getattr(interval, part) if interval else None
    if comparison is not None and comparison.difference is not None:
        d = comparison.difference
        row |= {"reference": comparison.reference, "difference_mean": d.interval.mean}
        row |= {"difference_low": d.interval.low, "difference_high": d.interval.high}
        row |= {"p_wilcoxon": d.p_wilcoxon, "p_wilcoxon_holm": comparison.p_wilcoxon_holm, "p_t": d.p_t}
        row |= {"verdict": comparison.verdict, "more_seeds": comparison.more_seeds}
    if comparison is not None and comparison.cost_ratio is not None:
        r = comparison.cost_ratio
        row |= {"cost_ratio_bound": r.bound, "cost_ratio": r.ratio, "cost_ratio_low": r.low, "cost_ratio_high": r.high}
        row |= {"cost_verdict": comparison.cost_verdict}
    if summary.target is not None:
        row |= {"reached_target": summary.target.reached, "never_reached_target": summary.target.never}
        row |= {"device_seconds_to_target": summary.target.mean.device_seconds if summary.target.mean else None}
    row |= _cost("whole_arm_", summary.cost)
    return row | (_cost("one_training_", summary.mean_confirm_cost) if summary.mean_confirm_cost else {})


def curve_rows(record: TrialRecord) -> Iterable[dict[str, Any]]:
    """Every epoch of a trial: validation scores and what had been spent by its end."""
    for epoch in record.epochs:
        row = {"trial_id": record.trial_id, "arm": record.arm, "phase": record.phase, "seed": record.seed}
        row |= {"epoch": epoch.epoch, "train_loss": epoch.train_loss, "learning_rate": epoch.learning_rate}
        yield row | _scores("val", epoch.val) | _cost("", epoch.cost)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with a header of all the keys that occur, in the order in which they first do; None is an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _scores(split: str, scores: Scores | None) -> dict[str, Any]:
    return {f"{split}_{name}": getattr(scores, name) if scores else None for name in METRICS}


def _cost(prefix: str, cost: Cost) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in asdict(cost).items()}
