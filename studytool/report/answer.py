"""The answer of a study in a few sentences, made from its numbers and as sure as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from studytool.report import words
from studytool.report.claims import Comparison
from studytool.report.compare import ArmSummary, headline_metric
from studytool.report.statistics import CostRatio, Interval, PairedDifference
from studytool.spec import StudySpec


@dataclass(frozen=True)
class Answer:
    """`headline` says which arm is best, by how much and at what cost; `how_sure` what has to be known with it.

    `state` is a word or two for a badge: "confirmed", "confirmed in part" (some of the winner's runs failed), "not
    finished", "not confirmed", "no result yet".
    """

    headline: str
    how_sure: tuple[str, ...]
    state: str


def answer(
    spec: StudySpec,
    summaries: Sequence[ArmSummary],
    comparisons: Sequence[Comparison],
    gaps: Mapping[str, PairedDifference],
) -> Answer:
    """Put the study into words.

    Args:
        spec: the study.
        summaries: its arms, as `compare.summarize_arms` gives them.
        comparisons: each initialization against random, as `claims.compare_with_random` gives them.
        gaps: how far the other arms are behind, as `claims.gaps_to_winner` gives them.
    """
    winner = next((s for s in summaries if s.is_winner), None)
    left = _what_is_left(summaries)
    if winner is None:
        return Answer("No trial has ended with a result yet, so nothing can be said.", left, "no result yet")
    if not winner.confirmed:
        return Answer(_best_of_search(spec, winner), (_SEARCH_IS_OPTIMISTIC, *left), "not confirmed")
    score = winner.test.get(headline_metric(spec))
    comparison = next((c for c in comparisons if c.arm == winner.arm), None)
    metric = words.METRIC_WORDS[headline_metric(spec)]
    best = f"{_of_those_confirmed(summaries)}{words.arm_in_words(winner.values)}"
    number = "not defined on this test split:" if score is None else _score(score.mean, score.low, score.high)
    clauses = [f"{best}: {number} {metric}"]
    clauses += _over_random(comparison)
    clauses += _at_what_cost(spec, winner, comparison)
    about = [_name_and_settings(winner), _seeds(winner, score), *_no_cost_ratio(spec, comparison)]
    shared = words.shared_device(s.side_by_side for s in summaries)
    sure = [*about, *_runner_up(gaps), *_still_open(comparison), *shared, *left]
    state = "not finished" if left else "confirmed in part" if winner.confirm_failed else "confirmed"
    return Answer(", ".join(clauses) + ".", tuple(sure), state)


_SEARCH_IS_OPTIMISTIC = (
    "It is not confirmed yet: this is the best of several validation results of single runs, which is higher than what "
    "the same arm reaches on average; its test split has not been read."
)


def _of_those_confirmed(summaries: Sequence[ArmSummary]) -> str:
    """How the headline begins while other arms wait for their confirmation; the search made this the best."""
    confirmed = sum(s.confirmed > 0 for s in summaries)
    if confirmed == len(summaries) or all(s.is_finished for s in summaries):
        return ""
    return f"The best so far, with {confirmed} of {words.count(len(summaries), 'arm')} confirmed: "


def _best_of_search(spec: StudySpec, winner: ArmSummary) -> str:
    value = winner.best_search_value
    name = spec.metric.name.removeprefix("val/").replace("_", " ")
    number = "" if value is None else f": {value:.3f}" if name == "loss" else f": {100 * value:.1f}%"
    return f"So far {words.arm_in_words(winner.values)} has the best validation {name} of the search{number}."


def _score(mean: float, low: float | None, high: float | None) -> str:
    ends = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * mean:.1f}%{ends}"


def _over_random(comparison: Comparison | None) -> list[str]:
    if comparison is None or comparison.difference is None:
        return []
    interval = comparison.difference.interval
    points = f"{abs(100 * interval.mean):.1f} points"
    side = "above" if interval.mean >= 0 else "below"
    if interval.low is None or interval.high is None:
        how_often = "the one pair of runs there is" if interval.count == 1 else "each pair of runs, too few to trust"
        return [f"{points} {side} random initialization in {how_often}"]
    if comparison.verdict == "open":
        ends = f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]".replace("-", "−")
        return [f"{points} {side} random initialization {ends}, which may be chance"]
    low, high = sorted((abs(interval.low), abs(interval.high)))
    careful = "probably " if comparison.verdict.startswith("probably") else ""
    return [f"{careful}{points} [{100 * low:.1f}, {100 * high:.1f}] {side} random initialization"]


def _at_what_cost(spec: StudySpec, winner: ArmSummary, comparison: Comparison | None) -> list[str]:
    target = spec.metric.target
    ratio = comparison.cost_ratio if comparison else None
    verdict = comparison.cost_verdict if comparison else "unknown"
    if target is not None and ratio is not None and verdict not in ("unknown", "shared device"):
        chance = ", which may be chance" if verdict == "open" else ""
        times = f"{words.ratio(ratio)} times as much as random initialization"
        return [f"costing {times} to reach {_target(spec)}{_never(ratio)}{chance}"]
    if winner.mean_confirm_cost is None:
        return []
    each = words.duration(winner.mean_confirm_cost.device_seconds)
    return [f"at {each} of device time for one training"]


def _never(ratio: CostRatio) -> str:
    never = ratio.second_never or ratio.first_never
    whose = "random initialization" if ratio.second_never else "this arm"
    return f" ({whose} never did in {never} of {words.count(ratio.count, 'run')})" if never else ""


def _no_cost_ratio(spec: StudySpec, comparison: Comparison | None) -> list[str]:
    ratio = comparison.cost_ratio if comparison else None
    if ratio is None or ratio.bound != "unknown" or not ratio.count:
        return []
    return [
        f"What it costs to reach {_target(spec)} cannot be compared: {ratio.first_never} of {ratio.count} runs of this "
        f"arm and {ratio.second_never} of {ratio.count} from random weights never did."
    ]


def _target(spec: StudySpec) -> str:
    value = spec.metric.target
    name = spec.metric.name.removeprefix("val/").replace("_", " ")
    assert value is not None
    return f"a validation loss of {value:g}" if name == "loss" else f"{100 * value:g}% validation {name}"


def _name_and_settings(winner: ArmSummary) -> str:
    tuned = ", ".join(f"{name.replace('_', ' ')} {words.plain(v)}" for name, v in winner.best_parameters.items())
    return f"Below it is called {winner.arm}{f'; found by the search: {tuned}' if tuned else ''}."


def _seeds(winner: ArmSummary, score: Interval | None) -> str:
    failed = winner.confirm_failed
    of = f" {failed} of its {winner.confirmed + failed} confirm runs failed and are in no mean." if failed else ""
    if winner.confirmed == 1:
        return f"It was measured with a single seed, so how far it scatters is not known; no interval can be given.{of}"
    brackets = "; the brackets are the 95% interval of that mean" if score and score.low is not None else ""
    return (
        f"Mean over {words.count(winner.confirmed, 'seed')} on the test split{brackets}. The arm was chosen on the "
        f"validation split.{of}"
    )


def _runner_up(gaps: Mapping[str, PairedDifference]) -> list[str]:
    """Which other arms are or may be as good on the test split, or by how much the next one is behind."""
    ends = {arm: (gap.interval.low, gap.interval.high) for arm, gap in gaps.items()}
    ahead = [arm for arm, (_, high) in ends.items() if high is not None and high < 0]
    near = [arm for arm, (low, high) in ends.items() if low is not None and high is not None and low <= 0 <= high]
    alike = [arm for arm, gap in gaps.items() if ends[arm][0] is None and gap.interval.count > 1]
    said = []
    if ahead:
        said.append(
            f"It was chosen by validation; on the test split it is behind {_listed(gaps, ahead, 'points')}, by more "
            "than the seeds scatter."
        )
    if near:
        said.append(
            f"It cannot be told apart from {_listed(gaps, near, 'points behind')}: the interval of the difference "
            "includes zero, so either may be the better one, and the cheaper may serve as well."
        )
    if any(gap.interval.count == 1 for gap in gaps.values()):
        said.append("The order of the arms cannot be called sure from a single pair of runs.")
    if alike:
        said.append(
            f"In all pairs of runs the difference is the same, so it has no interval: {_listed(gaps, alike, 'points')}."
        )
    if gaps and not said:
        closest = min(gaps, key=lambda arm: gaps[arm].interval.mean)
        said.append(f"Every other confirmed arm is behind; the closest, {closest}, by {_points(gaps[closest])}.")
    return said


def _listed(gaps: Mapping[str, PairedDifference], arms: Sequence[str], what: str) -> str:
    named = ", ".join(f"{arm} ({words.percent(gaps[arm].interval)} {what})" for arm in arms[:3])
    return f"{named} and {len(arms) - 3} more" if len(arms) > 3 else named


def _points(gap: PairedDifference) -> str:
    return f"{words.percent(gap.interval)} points"


def _still_open(comparison: Comparison | None) -> list[str]:
    if comparison is None or comparison.verdict != "open" or comparison.more_seeds in (None, 0):
        return []
    more = words.count(comparison.more_seeds or 0, "more seed")
    return [f"About {more} would likely settle whether it is better than random initialization."]


def _what_is_left(summaries: Sequence[ArmSummary]) -> tuple[str, ...]:
    open_arms = [s.arm for s in summaries if not s.is_finished]
    if not open_arms:
        return ()
    return (f"The study is not finished: {len(open_arms)} of {words.count(len(summaries), 'arm')} have trials left.",)
