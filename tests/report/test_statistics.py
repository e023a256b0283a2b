from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from studytool.report.statistics import (
    Interval,
    Spent,
    bootstrap_interval,
    cost_ratio,
    fewest_seeds_for_wilcoxon,
    further_seeds,
    holm,
    mean_interval,
    paired_difference,
    power_of_paired_t,
)


def test_the_interval_of_a_case_worked_by_hand():
    # Mean 3, deviations -2 … 2, variance 10 / 4, standard error sqrt(2.5 / 5), t(0.975, 4) = 2.776445.
    interval = mean_interval([1, 2, 3, 4, 5])
    assert interval.mean == 3
    assert interval.sd == pytest.approx(math.sqrt(2.5))
    assert interval.low == pytest.approx(3 - 2.776445 * math.sqrt(0.5), abs=1e-5)
    assert interval.high == pytest.approx(3 + 2.776445 * math.sqrt(0.5), abs=1e-5)
    assert interval.count == 5


@pytest.mark.parametrize("count", [2, 3, 7, 40])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_is_that_of_scipy(count, level):
    values = np.random.default_rng(count).normal(0.8, 0.1, count)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    interval = mean_interval(values.tolist(), level=level)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_the_interval_is_cut_at_what_values_can_be():
    interval = mean_interval([0.98, 1.0, 0.95], lowest=0.0, highest=1.0)
    assert interval.high == 1.0
    assert 0.8 < interval.low < 0.95


def test_one_value_has_no_spread_and_none_is_an_error():
    assert mean_interval([0.7]) == Interval(0.7, None, None, None, 1)
    with pytest.raises(ValueError, match="finite"):
        mean_interval([])
    with pytest.raises(ValueError, match="finite"):
        mean_interval([0.5, float("nan")])


COVERAGE_CASES = {
    "normal": (lambda generator, shape: generator.normal(0.8, 0.05, shape), 0.8, (0.94, 0.96)),
    "skewed accuracies": (lambda generator, shape: generator.beta(38, 2, shape), 0.95, (0.90, 0.96)),
    "log-normal costs": (lambda generator, shape: generator.lognormal(0, 0.5, shape), math.exp(0.125), (0.90, 0.96)),
}


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 5, 10])
@pytest.mark.parametrize("case", COVERAGE_CASES)
def test_intervals_cover_the_true_mean_as_often_as_they_say(case, count):
    draw, mean, (lowest, highest) = COVERAGE_CASES[case]
    samples = draw(np.random.default_rng(count), (4000, count)).tolist()
    intervals = [mean_interval(sample) for sample in samples]
    coverage = np.mean([i.low <= mean <= i.high for i in intervals])
    assert lowest < coverage < highest


def test_the_bootstrap_would_not():
    samples = np.random.default_rng(0).normal(0, 1, (300, 5))
    result = stats.bootstrap((samples,), np.mean, axis=1, method="BCa", n_resamples=499, rng=np.random.default_rng(1))
    coverage = np.mean((result.confidence_interval.low <= 0) & (result.confidence_interval.high >= 0))
    assert coverage < 0.91


def test_the_paired_difference_of_a_case_worked_by_hand():
    first = {11: 0.80, 12: 0.85, 13: 0.90, 99: 0.1}
    second = {11: 0.70, 12: 0.70, 13: 0.70, 55: 0.9}
    difference = paired_difference(first, second)
    # Differences 0.10, 0.15, 0.20: mean 0.15, deviation 0.05, t = 0.15 / (0.05 / sqrt 3) = 5.196 with 2 degrees.
    assert difference.interval.mean == pytest.approx(0.15)
    assert difference.interval.sd == pytest.approx(0.05)
    assert difference.interval.count == 3
    assert difference.p_t == pytest.approx(0.0351, abs=1e-4)
    assert difference.p_wilcoxon == pytest.approx(2 / 2**3)


def test_paired_tests_are_those_of_scipy():
    generator = np.random.default_rng(5)
    first = dict(enumerate(generator.normal(0.82, 0.03, 9)))
    second = dict(enumerate(generator.normal(0.80, 0.03, 9)))
    difference = paired_difference(first, second)
    assert difference.p_t == pytest.approx(stats.ttest_rel(list(first.values()), list(second.values())).pvalue)
    assert difference.p_wilcoxon == pytest.approx(stats.wilcoxon(list(first.values()), list(second.values())).pvalue)


def test_pairing_takes_out_what_the_seeds_have_in_common():
    seed_effect = np.random.default_rng(0).normal(0, 0.2, 6)
    noise = np.random.default_rng(1).normal(0, 0.002, 6)
    first = {i: 0.5 + e + 0.01 + n for i, (e, n) in enumerate(zip(seed_effect, noise, strict=True))}
    second = {i: 0.5 + e for i, e in enumerate(seed_effect)}
    interval = paired_difference(first, second).interval
    assert 0 < interval.low < 0.01 < interval.high < 0.02


def test_paired_differences_without_much_to_go_by():
    assert paired_difference({1: 0.5}, {2: 0.5}) is None
    single = paired_difference({1: 0.5}, {1: 0.4})
    assert single.interval.mean == pytest.approx(0.1)
    assert (single.p_t, single.p_wilcoxon) == (None, None)
    same = paired_difference({1: 0.5, 2: 0.6}, {1: 0.5, 2: 0.6})
    assert (same.p_t, same.p_wilcoxon) == (1.0, 1.0)


def test_arms_that_are_equal_but_for_rounding_do_not_differ():
    difference = paired_difference(dict.fromkeys(range(3), 0.1 + 0.2), dict.fromkeys(range(3), 0.3))
    assert difference is not None
    assert (difference.interval.mean, difference.p_t, difference.p_wilcoxon) == (0.0, 1.0, 1.0)


def test_equal_differences_but_for_rounding_count_as_ties():
    first = {i: 0.1 * i + 0.1 for i in range(1, 7)}
    second = {i: 0.1 * i for i in range(1, 7)}
    assert paired_difference(first, second).p_wilcoxon == pytest.approx(stats.wilcoxon([1.0] * 6).pvalue)


def test_holm_of_cases_worked_by_hand():
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, none below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.6, 0.7]) == (1.0, 1.0)
    assert holm([0.03]) == (0.03,)
    assert holm([]) == ()


def test_holm_keeps_the_chance_of_any_false_alarm():
    generator = np.random.default_rng(3)
    corrected = [holm(p) for p in generator.random((4000, 5)).tolist()]
    assert 0.03 < np.mean([min(p) < 0.05 for p in corrected]) < 0.06


@pytest.mark.parametrize(("effect", "needed"), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_power_gives_the_well_known_sample_sizes(effect, needed):
    # Two-sided paired t test, alpha 0.05, power 0.8: as in Cohen's tables and G*Power.
    assert power_of_paired_t(needed, effect, 0.05) >= 0.8 > power_of_paired_t(needed - 1, effect, 0.05)
    difference = Interval(mean=effect, low=None, high=None, sd=1.0, count=3)
    assert further_seeds(difference) == needed - 3
    assert further_seeds(Interval(-effect, None, None, 1.0, 3)) == needed - 3


def test_power_rises_with_the_number_of_seeds_up_to_one():
    powers = [power_of_paired_t(count, 1.0, 0.05) for count in (2, 3, 5, 8, 13, 30, 100, 1000)]
    assert powers == sorted(powers)
    assert powers[-1] == pytest.approx(1.0)


def test_power_is_how_often_the_test_sees_it():
    samples = np.random.default_rng(7).normal(0.7, 1.0, (4000, 12))
    seen = np.mean(stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05)
    assert power_of_paired_t(12, 0.7, 0.05) == pytest.approx(seen, abs=0.025)


def test_no_further_seeds_where_the_difference_is_clear_and_no_number_where_none_helps():
    assert further_seeds(mean_interval([0.10, 0.11, 0.12])) == 0
    assert further_seeds(mean_interval([0.10, 0.10, 0.10])) == 0
    assert further_seeds(mean_interval([0.1])) is None
    assert further_seeds(mean_interval([-0.1, 0.1])) is None
    assert further_seeds(Interval(0.001, None, None, 1.0, 5)) is None
    once = further_seeds(Interval(0.5, None, None, 1.0, 5))
    assert further_seeds(Interval(0.5, None, None, 1.0, 5), comparisons=6) > once


@pytest.mark.parametrize(("comparisons", "seeds"), [(1, 6), (2, 7), (6, 8)])
def test_fewest_seeds_for_wilcoxon(comparisons, seeds):
    assert fewest_seeds_for_wilcoxon(comparisons) == seeds
    best_possible = [stats.wilcoxon(np.arange(1, n + 1)).pvalue * comparisons for n in (seeds - 1, seeds)]
    assert best_possible[0] >= 0.05 > best_possible[1]


def reached(*amounts: float) -> dict[int, Spent]:
    return {seed: Spent(amount, True) for seed, amount in enumerate(amounts)}


def test_the_cost_ratio_of_a_case_worked_by_hand():
    ratio = cost_ratio(reached(10, 20, 40), reached(20, 80, 40))
    # Ratios 1/2, 1/4, 1: their logarithms in halvings are -1, -2, 0, mean -1, deviation 1, t(0.975, 2) = 4.302653.
    half = 4.302653 / math.sqrt(3)
    assert (ratio.bound, ratio.count) == ("exact", 3)
    assert ratio.ratio == pytest.approx(0.5)
    assert (ratio.low, ratio.high) == pytest.approx((2 ** (-1 - half), 2 ** (-1 + half)), rel=1e-5)


def test_turning_a_ratio_round_gives_its_inverse():
    a, b = reached(3, 5, 4), reached(9, 8, 13)
    there, back = cost_ratio(a, b), cost_ratio(b, a)
    assert there.ratio == pytest.approx(1 / back.ratio)
    assert there.low == pytest.approx(1 / back.high)


def test_a_second_arm_that_never_reached_bounds_the_ratio_from_above():
    second = {**reached(20, 80, 40), 1: Spent(80, False)}
    ratio = cost_ratio(reached(10, 20, 40), second)
    assert (ratio.bound, ratio.first_never, ratio.second_never) == ("at most", 0, 1)
    assert ratio.ratio == pytest.approx(0.5)
    assert ratio.low is None
    assert ratio.high == cost_ratio(reached(10, 20, 40), reached(20, 80, 40)).high


def test_a_first_arm_that_never_reached_bounds_the_ratio_from_below():
    ratio = cost_ratio({**reached(10, 20), 0: Spent(10, False)}, reached(5, 10))
    assert (ratio.bound, ratio.ratio, ratio.high) == ("at least", pytest.approx(2.0), None)


def test_both_sides_censored_says_nothing():
    ratio = cost_ratio({0: Spent(1, False), 1: Spent(1, True)}, {0: Spent(1, True), 1: Spent(1, False)})
    assert (ratio.bound, ratio.ratio, ratio.low, ratio.high) == ("unknown", None, None, None)
    assert cost_ratio(reached(1), {}).bound == "unknown"


def test_bounds_of_censored_ratios_hold_as_often_as_they_say():
    generator = np.random.default_rng(11)
    held = []
    for _ in range(1500):
        first, second = np.exp(generator.normal([1.0, 2.0], 0.4, (5, 2))).T
        budget = math.exp(2.1)  # runs are ended here: some of the second arm's never reach the target
        spent = {i: Spent(min(c, budget), bool(c <= budget)) for i, c in enumerate(second)}
        ratio = cost_ratio(reached(*first), spent)
        if ratio.bound == "at most":
            held.append(math.exp(-1.0) <= ratio.high)
    assert len(held) > 1000
    assert np.mean(held) > 0.97


def test_a_cost_of_zero_has_no_ratio():
    with pytest.raises(ValueError, match="above zero"):
        cost_ratio(reached(0), reached(1))


def test_the_bootstrap_interval_is_that_of_scipy():
    values = [0.02, 0.05, 0.01, 0.04, 0.03]
    low, high = bootstrap_interval(values, resamples=2000, seed=3)
    expected = stats.bootstrap(
        (np.array(values),), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(3)
    ).confidence_interval
    assert (low, high) == (expected.low, expected.high)
    assert bootstrap_interval(values) == bootstrap_interval(values), "seeded"
    assert min(values) <= low < np.mean(values) < high <= max(values)


def test_the_bootstrap_of_equal_one_or_two_values():
    assert bootstrap_interval([0.1, 0.1, 0.1]) == (0.1, 0.1)
    assert bootstrap_interval([0.1]) is None
    low, high = bootstrap_interval([0.1, 0.3])
    assert (low, high) == pytest.approx((0.1, 0.3))  # by hand: the mean of two draws is 0.1, 0.2 or 0.3


def test_paired_intervals_cover_the_true_difference_and_the_bootstrap_does_not():
    """Seeds shift both arms alike; of 600 simulated studies of five seeds 95% of the intervals have to hold 0.05."""
    rng = np.random.default_rng(7)
    held = {"t": 0, "bootstrap": 0}
    for _ in range(600):
        shared = 0.1 * rng.standard_normal(5)
        first = dict(enumerate(0.75 + shared + 0.02 * rng.standard_normal(5)))
        second = dict(enumerate(0.70 + shared + 0.02 * rng.standard_normal(5)))
        found = paired_difference(first, second)
        held["t"] += found.interval.low <= 0.05 <= found.interval.high
        low, high = bootstrap_interval(found.values, resamples=300)
        held["bootstrap"] += low <= 0.05 <= high
    assert 0.93 < held["t"] / 600 < 0.97
    assert held["bootstrap"] / 600 < 0.92


def test_a_few_equal_values_are_no_certainty():
    assert mean_interval([0.24, 0.24]) == Interval(0.24, None, None, 0.0, 2)
    found = paired_difference({1: 0.4, 2: 0.5}, {1: 0.3, 2: 0.4})
    assert found is not None
    assert found.interval.low is None
    assert found.p_t is None
    assert further_seeds(found.interval) is None
