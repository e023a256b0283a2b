"""The search inside one arm: Optuna proposes the tuned factors and prunes, and what it has seen can be told again.

Nothing here is stored: the state is rebuilt from the ledger's records by telling Optuna the same curves in the same
order, so that proposals and prunings after a resume are those of a study that was never interrupted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    NSGAIISampler,
    PartialFixedSampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from studytool import registry
from studytool.distributions import optuna_distribution
from studytool.results import EpochResult, Outcome
from studytool.search_settings import SchedulerSettings, SearchSettings
from studytool.seeds import derive_seed
from studytool.settings import MOST_TOGETHER, MetricSettings


@dataclass(frozen=True)
class Draw:
    """Trial `number` of an arm, which a sampler is to propose."""

    study_seed: int
    arm: str
    number: int
    search: SearchSettings

    @property
    def seed(self) -> int:
        """This draw's own."""
        return derive_seed(self.study_seed, self.arm, self.number)


def tpe(draw: Draw) -> BaseSampler:
    """Tree-structured Parzen estimator; the first third of the trials (3 to 10 of them) is drawn at random."""
    return TPESampler(seed=draw.seed, n_startup_trials=_tpe_startup(draw.search), constant_liar=True)


def random(draw: Draw) -> BaseSampler:
    """Independent draws from the search space."""
    return RandomSampler(seed=draw.seed)


def grid(draw: Draw) -> BaseSampler:
    """Every combination once, in an order of the arm's own, so that a search cut short has seen all parts of it."""
    points = range(draw.search.points or 0)
    order = Random(derive_seed(draw.study_seed, draw.arm, "grid")).sample(points, len(points))
    rest, point = order[draw.number], {}
    for name, distribution in draw.search.space.items():
        rest, i = divmod(rest, len(distribution.values))
        point[name] = distribution.values[i]
    return PartialFixedSampler(point, RandomSampler(seed=draw.seed))


def cmaes(draw: Draw) -> BaseSampler:
    """Covariance matrix adaptation over the ranges; pruned trials count by their last epoch, choices are random."""
    return CmaEsSampler(seed=draw.seed, consider_pruned_trials=True, warn_independent_sampling=False)


def nsga2(draw: Draw) -> BaseSampler:
    """NSGA-II for two objectives, the metric and the cost in device-seconds; at least three generations."""
    return NSGAIISampler(seed=draw.seed, population_size=min(50, max(4, draw.search.trials_per_arm // 4)))


class ArmSearch:
    """The search of one arm: `propose` a trial, `report` its epochs, `tell` how it ended.

    Proposal k depends only on the study's seed, the arm, k and what was told before, so that a study run one trial at
    a time is reproducible.
    """

    def __init__(self, arm: str, search: SearchSettings, metric: MetricSettings, seed: int, *, max_epochs: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._arm = arm
        self._search = search
        self._metric = metric
        self._seed = seed
        self._distributions = {name: optuna_distribution(d) for name, d in search.space.items()}
        direction = "maximize" if metric.mode == "max" else "minimize"
        self._weighs_cost = search.sampler == "nsga2"
        self._study = optuna.create_study(
            # Hyperband deals its trials out by a hash of the name.
            study_name=f"{seed}.{arm}",
            directions=[direction, "minimize"] if self._weighs_cost else [direction],
            pruner=_pruner(search.scheduler, max_epochs),
        )
        self._open: dict[int, Trial] = {}
        self._proposed = 0

    @property
    def proposed(self) -> int:
        """How many trials have been proposed, told ones among them."""
        return self._proposed

    @property
    def pareto_front(self) -> tuple[int, ...]:
        """The finished trials that no other one beats in metric and cost; none where cost is no objective."""
        return tuple(trial.number for trial in self._study.best_trials) if self._weighs_cost else ()

    def proposed_together(self, first: int, other: int, together: int | Literal["auto"]) -> bool:
        """Whether two trials are proposed at once, before either has a result; a function of their numbers alone.

        With "auto" only where no proposal and no pruning comes out otherwise than one by one: the median of finished
        trials would. With a number as many as that, unless the sampler's notes on its trials (CMA-ES, NSGA-II) say
        which results it knew.
        """
        most = MOST_TOGETHER if together == "auto" else together
        if first // most != other // most or self._search.sampler not in ("random", "grid", "tpe"):
            return False
        if together != "auto":
            return True
        blind = self._search.sampler != "tpe" or max(first, other) < _tpe_startup(self._search)
        return blind and self._search.scheduler.median is None

    def propose(self) -> tuple[int, dict[str, Any]]:
        """The number and the tuned factors of a new trial."""
        number = self.proposed
        self._ask(number, self._sampler(number))
        return number, dict(self._open[number].params)

    def reopen(self, parameters: Mapping[str, Any]) -> int:
        """Take up a trial of the ledger again, with the parameters it had; its number."""
        number = self.proposed
        # JSON has made a tuple a list, which is none of the choices.
        as_chosen = {name: tuple(v) if isinstance(v, list) else v for name, v in parameters.items()}
        self._ask(number, _Reopened(self._sampler(number), as_chosen))
        return number

    def report(self, number: int, result: EpochResult) -> bool:
        """Whether the trial should be pruned after this epoch."""
        if self._weighs_cost:
            return False
        trial = self._open[number]
        trial.report(result.val.metric(self._metric.name), step=result.epoch)
        return bool(trial.should_prune())

    def tell(self, number: int, outcome: Outcome, value: float | None, device_seconds: float = 0.0) -> None:
        """End a trial; `value` is what it reached, or None if it failed before its first epoch."""
        trial = self._open.pop(number)
        if outcome is Outcome.COMPLETE and value is not None and math.isfinite(value):
            self._study.tell(trial, [value, device_seconds] if self._weighs_cost else value)
        elif outcome is Outcome.PRUNED:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, state=TrialState.FAIL)

    def _sampler(self, number: int) -> BaseSampler:
        make_sampler = registry.lookup("sampler", self._search.sampler, registry.SAMPLERS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler: BaseSampler = make_sampler(Draw(self._seed, self._arm, number, self._search))
        return sampler

    def _ask(self, number: int, sampler: BaseSampler) -> None:
        self._study.sampler = sampler
        self._open[number] = self._study.ask(self._distributions)
        self._proposed += 1


class _Reopened(BaseSampler):
    """Proposes what was proposed before, and lets the sampler take the notes that it keeps with its trials.

    CMA-ES notes the state of its optimizer, NSGA-II the generation; trials that Optuna is given by `enqueue_trial`
    lack these.
    """

    def __init__(self, sampler: BaseSampler, parameters: Mapping[str, Any]) -> None:
        self._sampler = sampler if isinstance(sampler, CmaEsSampler | NSGAIISampler) else None
        self._parameters = parameters

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial) if self._sampler else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        proposed = self._sampler.sample_relative(study, trial, search_space) if self._sampler else {}
        return {name: self._parameters[name] for name in proposed}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._parameters[param_name]

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        if self._sampler:
            self._sampler.before_trial(study, trial)


def _tpe_startup(search: SearchSettings) -> int:
    return min(10, max(3, search.trials_per_arm // 3))


def _pruner(scheduler: SchedulerSettings, max_epochs: int) -> BasePruner:
    if scheduler.asha:
        return SuccessiveHalvingPruner(
            min_resource=scheduler.asha.grace_epochs, reduction_factor=scheduler.asha.reduction_factor
        )
    if scheduler.hyperband:
        grace = scheduler.hyperband.grace_epochs
        return HyperbandPruner(
            min_resource=grace,
            max_resource=max(grace, max_epochs),
            reduction_factor=scheduler.hyperband.reduction_factor,
        )
    if scheduler.median:
        return MedianPruner(
            n_startup_trials=scheduler.median.startup_trials, n_warmup_steps=scheduler.median.grace_epochs
        )
    return NopPruner()
