"""What mattered in the search: how much of the scatter of the results each factor explains, by Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState, create_trial

from studytool.distributions import optuna_distribution
from studytool.results import Outcome, TrialRecord
from studytool.spec import StudySpec

LEAST_TRIALS = 6
"""With fewer finished search trials a share of the scatter is not worth showing."""


@dataclass(frozen=True)
class SearchPoint:
    """One search trial: its arm, its value of every varied factor as the study file has it, and its best value."""

    arm: str
    parameters: dict[str, Any]
    value: float
    outcome: Outcome | None


def search_points(spec: StudySpec, records: Sequence[TrialRecord]) -> list[SearchPoint]:
    """The search trials with at least one epoch, of arms and with choices that are in the study file."""
    listed = {**spec.arms, **{name: d.ends for name, d in spec.search.space.items() if d.kind == "choice"}}
    arms = {arm.name for arm in spec.list_arms()}
    points = []
    for r in records:
        if r.phase != "search" or not r.epochs or r.arm not in arms:
            continue
        values = {name: r.parameters[name] for name in spec.search.space}
        with suppress(ValueError):
            values |= {name: _in_file(r.parameters[name], choices) for name, choices in listed.items()}
            points.append(SearchPoint(r.arm, values, r.epochs[-1].best_value, r.outcome))
    return points


def _in_file(value: Any, choices: Sequence[Any]) -> Any:
    """The choice that is meant: the ledger has 0.0 for 0, and lists for tuples (ValueError: it is none of them)."""
    return choices[_with_lists(choices).index(_with_lists(value))]


def _with_lists(value: Any) -> Any:
    return list(map(_with_lists, value)) if isinstance(value, list | tuple) else value


def importance(spec: StudySpec, points: Sequence[SearchPoint]) -> dict[str, float]:
    """The share of the variance of the validation metric that each compared or tuned factor explains, largest first.

    Functional ANOVA (Hutter, Hoos, Leyton-Brown, ICML 2014) over the finished search trials of all arms together, of
    which pruned ones are no part. Empty where there are fewer than `LEAST_TRIALS`, or all reached the same.
    """
    finished = [p for p in points if p.outcome is Outcome.COMPLETE]
    if len(finished) < LEAST_TRIALS or len({p.value for p in finished}) < 2:
        return {}
    choices: dict[str, Any] = {
        name: CategoricalDistribution([str(value) for value in values])
        for name, values in spec.arms.items()
        if len({str(p.parameters[name]) for p in finished}) > 1
    }
    tuned = {name: optuna_distribution(d) for name, d in spec.search.space.items()}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if spec.metric.mode == "max" else "minimize")
    for point in finished:
        values = {name: str(point.parameters[name]) for name in choices}
        values |= {name: point.parameters[name] for name in tuned}
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE, value=point.value, params=values, distributions={**choices, **tuned}
            )
        )
    if not (choices or tuned):
        return {}
    return dict(get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)))
