"""Ranges of a study file as Optuna's distributions, for the search and for the report on it."""

from __future__ import annotations

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from studytool.search_settings import Distribution


def optuna_distribution(d: Distribution) -> BaseDistribution:
    """The same range in Optuna's terms."""
    if d.kind == "choice":
        return CategoricalDistribution(d.ends)
    low, high = d.ends
    log = d.kind.startswith("log")
    kind = IntDistribution if d.kind.endswith("integer") else FloatDistribution
    return kind(low, high, log=log)
