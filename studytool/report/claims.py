"""The paper's two claims, tested on a study: is an initialization better than random, and does it cost less to train?

Each arm is compared with the arm that differs from it in nothing but its random initialization, seed by seed; where the
study leaves that one out, with the one that has nothing frozen as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from studytool.report.compare import ArmSummary, confirm_runs, headline_metric, reference_arm
from studytool.report.statistics import (
    LEVEL,
    CostRatio,
    PairedDifference,
    bootstrap_interval,
    fewest_seeds_for_wilcoxon,
    further_seeds,
    holm,
    paired_difference,
)
from studytool.results import TrialRecord
from studytool.spec import StudySpec

Verdict = Literal["better", "probably better", "worse", "probably worse", "open"]
CostVerdict = Literal["cheaper", "probably cheaper", "dearer", "probably dearer", "open", "unknown", "shared device"]


@dataclass(frozen=True)
class Comparison:
    """One arm against the arm `reference`, whose network starts from random weights.

    `difference` is of the test metric, paired by seed, `bootstrap` its BCa interval. `p_wilcoxon` and `p_t` are as in
    `difference`, the `_holm` ones corrected for the number of comparisons of the study. `more_seeds` is how many seeds
    more would likely settle the difference: 0 where it is settled, None where that cannot be said. `p_cost_holm` is the
    corrected p of `cost_ratio`; where up to `side_by_side` trials shared a device, costs are not held against one
    another. `is_unfrozen` says that the reference also has other layers frozen: none.
    """

    arm: str
    reference: str
    difference: PairedDifference | None
    bootstrap: tuple[float, float] | None
    p_t_holm: float | None
    p_wilcoxon_holm: float | None
    more_seeds: int | None
    cost_ratio: CostRatio | None
    p_cost_holm: float | None = None
    side_by_side: int = 1
    is_unfrozen: bool = False

    @property
    def verdict(self) -> Verdict:
        """What the difference says: without "probably" where it also holds after the correction of Holm."""
        if self.difference is None:
            return "open"
        interval = self.difference.interval
        if interval.low is None or interval.high is None or interval.low <= 0 <= interval.high:
            return "open"
        settled = self.p_t_holm is not None and self.p_t_holm < 1 - LEVEL
        if interval.mean > 0:
            return "better" if settled else "probably better"
        return "worse" if settled else "probably worse"

    @property
    def cost_verdict(self) -> CostVerdict:
        """Whether the target costs less or more than from random weights, by the ratio's interval, as `verdict`."""
        ratio = self.cost_ratio
        if ratio is None or ratio.bound == "unknown":
            return "unknown"
        if self.side_by_side > 1:
            return "shared device"
        settled = self.p_cost_holm is not None and self.p_cost_holm < 1 - LEVEL
        if ratio.high is not None and ratio.high < 1:
            return "cheaper" if settled else "probably cheaper"
        if ratio.low is not None and ratio.low > 1:
            return "dearer" if settled else "probably dearer"
        return "open"


def compare_with_random(
    spec: StudySpec, records: Sequence[TrialRecord], summaries: Sequence[ArmSummary]
) -> tuple[Comparison, ...]:
    """Every arm that has a random counterpart, in the order of the study file."""
    metric = headline_metric(spec)
    values = {s.arm: scores_by_seed(spec, records, s.arm, metric) for s in summaries}
    pairs = [(s, reference) for s in summaries if (reference := reference_arm(spec, s.arm)) is not None]
    differences = [paired_difference(values[s.arm], values[reference]) for s, reference in pairs]
    p_t = _holm_of_known([d.p_t if d else None for d in differences])
    p_wilcoxon = _holm_of_known([d.p_wilcoxon if d else None for d in differences])
    p_cost = _holm_of_known([s.cost_ratio.p if s.cost_ratio else None for s, _ in pairs])
    of_arm = {s.arm: s for s in summaries}
    known = sum(p is not None for p in p_t)
    compared = (
        Comparison(
            arm=summary.arm,
            reference=reference,
            difference=difference,
            bootstrap=bootstrap_interval(difference.values) if difference else None,
            p_t_holm=p_t[i],
            p_wilcoxon_holm=p_wilcoxon[i],
            more_seeds=further_seeds(difference.interval, comparisons=max(1, known)) if difference else None,
            cost_ratio=summary.cost_ratio,
            p_cost_holm=p_cost[i],
            side_by_side=max(summary.side_by_side, of_arm[reference].side_by_side),
            is_unfrozen=summary.values.get("freeze") != of_arm[reference].values.get("freeze"),
        )
        for i, ((summary, reference), difference) in enumerate(zip(pairs, differences, strict=True))
    )
    # The correction asks less of all but the smallest p than the reckoning of seeds does.
    return tuple(replace(c, more_seeds=0) if c.verdict in ("better", "worse") else c for c in compared)


def gaps_to_winner(
    spec: StudySpec, records: Sequence[TrialRecord], summaries: Sequence[ArmSummary]
) -> dict[str, PairedDifference]:
    """Of every other arm with test scores: the winner's minus its own, seed by seed."""
    metric = headline_metric(spec)
    winner = next((s.arm for s in summaries if s.is_winner), None)
    if winner is None:
        return {}
    best = scores_by_seed(spec, records, winner, metric)
    gaps = {
        s.arm: paired_difference(best, scores_by_seed(spec, records, s.arm, metric))
        for s in summaries
        if s.arm != winner
    }
    return {arm: gap for arm, gap in gaps.items() if gap is not None}


def scores_by_seed(spec: StudySpec, records: Sequence[TrialRecord], arm: str, metric: str) -> dict[int, float]:
    """{seed: value of a test metric} of the confirm runs that an arm stands for."""
    tests = {r.seed: r.test for r in confirm_runs(spec, records, arm) if r.test is not None}
    return {seed: test.metric(metric) for seed, test in tests.items() if getattr(test, metric) is not None}


def least_seeds(comparisons: Sequence[Comparison]) -> int:
    """With fewer seeds than this, Wilcoxon's test can settle none of the comparisons."""
    return fewest_seeds_for_wilcoxon(max(1, sum(c.difference is not None for c in comparisons)))


def _holm_of_known(p_values: Sequence[float | None]) -> list[float | None]:
    corrected = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(corrected) for p in p_values]
