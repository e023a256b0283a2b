"""The search inside one arm: Optuna proposes the tuned factors and prunes, and what it has seen can be told again.

Nothing here is stored: the state is rebuilt from the ledger's records by telling Optuna the same curves in the same
order, so that proposals and prunings after a resume are those of a study that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import Trial, TrialState

from studytool import registry
from studytool.results import EpochResult, Outcome
from studytool.seeds import derive_seed
from studytool.settings import Distribution, MetricSettings, SchedulerSettings, SearchSettings


def tpe(seed: int, trials: int) -> BaseSampler:
    """Tree-structured Parzen estimator; the first third of the trials (3 to 10 of them) is drawn at random."""
    return TPESampler(seed=seed, n_startup_trials=min(10, max(3, trials // 3)), constant_liar=True)


def random(seed: int, trials: int) -> BaseSampler:  # noqa: ARG001 - samplers share one signature
    """Independent draws from the search space."""
    return RandomSampler(seed=seed)


class ArmSearch:
    """The search of one arm: `propose` a trial, `report` its epochs, `tell` how it ended.

    Proposal k depends only on the study's seed, the arm, k and what was told before, so that a study run one trial at
    a time is reproducible.
    """

    def __init__(self, arm: str, search: SearchSettings, metric: MetricSettings, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._arm = arm
        self._search = search
        self._metric = metric
        self._seed = seed
        self._distributions = {name: _distribution(d) for name, d in search.space.items()}
        self._study = optuna.create_study(
            direction="maximize" if metric.mode == "max" else "minimize", pruner=_pruner(search.scheduler)
        )
        self._open: dict[int, Trial] = {}

    @property
    def proposed(self) -> int:
        """How many trials have been proposed, told ones among them."""
        return len(self._study.trials)

    def propose(self) -> tuple[int, dict[str, Any]]:
        """The number and the tuned factors of a new trial."""
        make_sampler = registry.lookup("sampler", self._search.sampler, registry.SAMPLERS)
        number = self.proposed
        self._study.sampler = make_sampler(derive_seed(self._seed, self._arm, number), self._search.trials_per_arm)
        trial = self._study.ask(self._distributions)
        self._open[number] = trial
        return number, dict(trial.params)

    def reopen(self, parameters: Mapping[str, Any]) -> int:
        """Take up a trial of the ledger again, with the parameters it had; its number."""
        number = self.proposed
        self._study.enqueue_trial(dict(parameters))
        self._open[number] = self._study.ask(self._distributions)
        return number

    def report(self, number: int, result: EpochResult) -> bool:
        """Whether the trial should be pruned after this epoch."""
        trial = self._open[number]
        trial.report(result.val.metric(self._metric.name), step=result.epoch)
        return bool(trial.should_prune())

    def tell(self, number: int, outcome: Outcome, value: float | None) -> None:
        """End a trial; `value` is what it reached, or None if it failed before its first epoch."""
        trial = self._open.pop(number)
        if outcome is Outcome.COMPLETE and value is not None and math.isfinite(value):
            self._study.tell(trial, value)
        elif outcome is Outcome.PRUNED:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, state=TrialState.FAIL)


def _distribution(d: Distribution) -> BaseDistribution:
    if d.kind == "choice":
        return CategoricalDistribution(d.ends)
    low, high = d.ends
    log = d.kind.startswith("log")
    kind = IntDistribution if d.kind.endswith("integer") else FloatDistribution
    return kind(low, high, log=log)


def _pruner(scheduler: SchedulerSettings) -> BasePruner:
    if scheduler.asha is None:
        return NopPruner()
    return SuccessiveHalvingPruner(
        min_resource=scheduler.asha.grace_epochs, reduction_factor=scheduler.asha.reduction_factor
    )
