"""Under which names a study's records stand in MLflow: plain dicts, without MLflow itself.

Names are the same for trials and arms, so that MLflow's columns line up: `val/…`, `test/…`, `train/…`, `best/…`,
`cost/…` (cumulative) and `target/…` (cost to target).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from studytool.results import METRICS, Cost, EpochResult, Outcome, Scores, TrialRecord
from studytool.settings import MetricSettings

if TYPE_CHECKING:
    from studytool.report.compare import ArmSummary
    from studytool.report.statistics import Interval

EPOCH_KEY = "cost/device_seconds"
"""A metric that every epoch has: its history tells which epochs the store holds."""
LONGEST_PARAMETER, LONGEST_TAG = 500, 5000
"""What every MLflow server takes; today's allows 6000 and 8000 characters."""


def epoch_metrics(result: EpochResult) -> dict[str, float]:
    """Everything an epoch measured; values that are not finite are left out."""
    return _finite(
        {
            **_scores("val", result.val),
            "train/loss": result.train_loss,
            "train/learning_rate": result.learning_rate,
            "best/value": result.best_value,
            "best/epoch": result.best_epoch,
            **_cost("cost", result.cost),
        }
    )


def final_metrics(record: TrialRecord, metric: MetricSettings) -> dict[str, float]:
    """What is known at a trial's end: test scores, `mfu` and, where the study has a target, the cost to reach it.

    `mfu` is the share of what the device could have computed; see `studytool.training.peak`. A run that never
    reached the target has `target/censored` 1 and no cost to target.
    """
    from studytool.training.cost import cost_to_target, share_of_peak

    values: dict[str, float | None] = {}
    if record.device is not None:
        values["mfu"] = share_of_peak(record.cost, record.device)
    if record.test is not None:
        values |= _scores("test", record.test)
    if metric.target is not None and record.epochs and record.outcome is Outcome.COMPLETE:
        cost, reached = cost_to_target(record.epochs, metric.target, metric.sign)
        values["target/censored"] = 0.0 if reached else 1.0
        if reached:
            values |= _cost("target", cost)
    return _finite(values)


def arm_metrics(summary: ArmSummary) -> dict[str, float]:
    """An arm's means over its confirm runs with `.low`, `.high` and `.sd`, its gain, and the cost of all its trials."""
    values: dict[str, float | None] = {
        "search/best_value": summary.best_search_value,
        "confirm/seeds": summary.confirmed,
        **{f"trials/{outcome.lower()}": count for outcome, count in summary.counts.items()},
        **_cost("cost", summary.mean_confirm_cost),
        **_cost("cost_of_all_trials", summary.cost),
        **_interval("val/selected", summary.validation),
    }
    for name, interval in summary.test.items():
        values |= _interval(f"test/{name}", interval)
    if summary.gain is not None:
        values |= _interval("gain/test", summary.gain.interval)
        values["gain/p_wilcoxon"] = summary.gain.p_wilcoxon
    if summary.target is not None:
        values |= {**_cost("target", summary.target.mean), "target/censored": summary.target.never}
    return _finite(values)


def parameter_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as MLflow keeps them: texts; too long ones are cut and end in a hash, so that a change still shows."""
    return {name: _cut(parameter_text(value)) for name, value in values.items()}


def parameter_text(value: Any) -> str:
    """`0.001`, `turns, shift`, `none`, `true`: as short as a study file writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(parameter_text, value)) or "none"
    return str(value) or "none"


def _cut(text: str) -> str:
    if len(text) <= LONGEST_PARAMETER:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text[: LONGEST_PARAMETER - 30]}… sha256:{digest}"


def _scores(split: str, scores: Scores) -> dict[str, float | None]:
    return {f"{split}/{name}": getattr(scores, name) for name in METRICS}


def _cost(prefix: str, cost: Cost | None) -> dict[str, float | None]:
    if cost is None:
        return {}
    # Most have none of these two.
    rare = ("lost_device_seconds", "ending_device_seconds")
    return {f"{prefix}/{name}": value for name, value in asdict(cost).items() if value or name not in rare}


def _interval(name: str, interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return {}
    return {name: interval.mean, f"{name}.low": interval.low, f"{name}.high": interval.high, f"{name}.sd": interval.sd}


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
