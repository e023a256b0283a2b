from __future__ import annotations

import pytest
from synthetic_study import scores

from studytool.results import Cost, EpochResult, Outcome
from studytool.search_settings import SearchSettings
from studytool.settings import MetricSettings
from studytool.study.search import ArmSearch

SETTINGS = SearchSettings.model_validate(
    {
        "learning_rate": {"log_uniform": (1e-4, 1e-1)},
        "batch_size": {"integer": (4, 8)},
        "optimizer": {"choice": ("adamw", "sgd")},
        "trials_per_arm": 12,
        "scheduler": {"asha": {"grace_epochs": 2, "reduction_factor": 2}},
    }
)


def epoch(number: int, value: float) -> EpochResult:
    return EpochResult(number, number, 1.0, 0.1, scores(value), Cost(), number, value)


def search(arm: str = "a", seed: int = 0, settings: SearchSettings = SETTINGS) -> ArmSearch:
    return ArmSearch(arm, settings, MetricSettings(), seed, max_epochs=20)


def run_some(arm_search: ArmSearch, count: int) -> list[dict[str, object]]:
    proposed = []
    for _ in range(count):
        number, parameters = arm_search.propose()
        arm_search.report(number, epoch(1, parameters["learning_rate"]))
        arm_search.tell(number, Outcome.COMPLETE, parameters["learning_rate"])
        proposed.append(parameters)
    return proposed


def test_proposals_lie_in_the_space():
    for parameters in run_some(search(), 12):
        assert 1e-4 <= parameters["learning_rate"] <= 1e-1
        assert parameters["batch_size"] in range(4, 9)
        assert parameters["optimizer"] in ("adamw", "sgd")


def test_proposals_depend_on_the_seed_and_the_arm_and_nothing_else():
    assert run_some(search(), 8) == run_some(search(), 8)
    assert run_some(search(seed=1), 1) != run_some(search(), 1)
    assert run_some(search(arm="b"), 1) != run_some(search(), 1)


def test_tpe_learns_where_it_is_good():
    """The score is the learning rate itself: later proposals have to be larger than the random ones."""
    rates = [
        p["learning_rate"] for p in run_some(search(settings=SETTINGS.model_copy(update={"trials_per_arm": 30})), 30)
    ]
    assert sum(rates[20:]) / 10 > 2 * sum(rates[:10]) / 10


def test_successive_halving_prunes_the_worse_half_after_the_grace_epochs():
    arm_search = search()
    numbers = [arm_search.propose()[0] for _ in range(4)]
    for number in numbers:
        assert not arm_search.report(number, epoch(1, 0.1))
    assert not arm_search.report(numbers[0], epoch(2, 0.5))  # the first to arrive is the best so far
    assert arm_search.report(numbers[1], epoch(2, 0.4))
    assert not arm_search.report(numbers[2], epoch(2, 0.6))
    assert arm_search.report(numbers[3], epoch(2, 0.1))


def test_without_a_scheduler_nothing_is_pruned():
    settings = SearchSettings.model_validate({"learning_rate": {"uniform": (0.1, 1.0)}, "scheduler": "none"})
    arm_search = search(settings=settings)
    numbers = [arm_search.propose()[0] for _ in range(3)]
    assert not any(arm_search.report(n, epoch(e, 0.5 - n / 10)) for e in (1, 2, 3) for n in numbers)


@pytest.mark.parametrize("outcome", [Outcome.PRUNED, Outcome.FAILED])
def test_a_reopened_search_proposes_what_it_would_have(outcome):
    first, again = search(), search()
    curves = []
    for number in range(6):
        assert first.propose()[0] == number
    first = search()
    for number in range(6):
        _, parameters = first.propose()
        ended = outcome if number == 2 else Outcome.COMPLETE
        first.report(number, epoch(1, parameters["learning_rate"]))
        first.tell(number, ended, parameters["learning_rate"])
        curves.append((parameters, ended))
    for parameters, ended in curves:
        number = again.reopen(parameters)
        again.report(number, epoch(1, parameters["learning_rate"]))
        again.tell(number, ended, parameters["learning_rate"])
    assert first.propose() == again.propose()


def settings_of(**changes: object) -> SearchSettings:
    space = {"learning_rate": {"log_uniform": (1e-4, 1e-1)}, "weight_decay": {"uniform": (0.0, 0.1)}}
    return SearchSettings.model_validate({**space, "scheduler": "none", "trials_per_arm": 40, **changes})


def test_a_grid_is_walked_once_in_an_order_of_the_arms_own():
    space = {"batch_size": {"integer": (2, 5)}, "optimizer": {"choice": ("adamw", "sgd", "adam")}}
    settings = SearchSettings.model_validate({**space, "sampler": "grid", "trials_per_arm": 50})
    assert settings.trials_planned == 12
    arm_search = search("a", settings=settings)
    walked = [arm_search.propose()[1] for _ in range(12)]
    assert {(p["batch_size"], p["optimizer"]) for p in walked} == {
        (size, name) for size in (2, 3, 4, 5) for name in ("adamw", "sgd", "adam")
    }
    other = search("b", settings=settings)
    assert [other.propose()[1] for _ in range(12)] != walked


def test_cmaes_closes_in_on_the_optimum():
    """The score is highest at 0.05: the last proposals are nearer to it than the first."""
    arm_search = search(settings=settings_of(sampler="cmaes"))
    distances = []
    for _ in range(40):
        number, parameters = arm_search.propose()
        distance = abs(parameters["weight_decay"] - 0.05)
        arm_search.tell(number, Outcome.COMPLETE, 1 - 10 * distance)
        distances.append(distance)
    assert sum(distances[-10:]) < sum(distances[:10]) / 2


def test_nsga2_keeps_what_nothing_beats_in_both_score_and_cost():
    arm_search = search(settings=settings_of(sampler="nsga2"))
    for value, seconds in ((0.9, 100.0), (0.5, 10.0), (0.4, 20.0), (0.9, 90.0), (0.95, 300.0)):
        number, _ = arm_search.propose()
        assert not arm_search.report(number, epoch(1, value))
        arm_search.tell(number, Outcome.COMPLETE, value, seconds)
    assert arm_search.pareto_front == (1, 3, 4)


def test_nsga2_comes_to_prefer_cheap_and_good():
    """Score and cost both speak for a small weight decay, so that late proposals have smaller ones than early ones."""
    arm_search = search(settings=settings_of(sampler="nsga2"))
    decays = []
    for _ in range(40):
        number, parameters = arm_search.propose()
        decays.append(parameters["weight_decay"])
        arm_search.tell(number, Outcome.COMPLETE, 1 - decays[-1], 100 * decays[-1])
    assert sum(decays[-10:]) < sum(decays[:10]) / 2


def test_the_median_rule_stops_what_is_below_the_median_of_the_finished():
    arm_search = search(settings=settings_of(scheduler={"median": {"grace_epochs": 2, "startup_trials": 3}}))
    for value in (0.4, 0.5, 0.6):
        number, _ = arm_search.propose()
        for e in (1, 2, 3):
            assert not arm_search.report(number, epoch(e, value))
        arm_search.tell(number, Outcome.COMPLETE, value)
    worse, better = arm_search.propose()[0], arm_search.propose()[0]
    assert not arm_search.report(worse, epoch(1, 0.45))
    assert arm_search.report(worse, epoch(2, 0.45))
    assert not arm_search.report(better, epoch(2, 0.55))


def test_hyperband_prunes_in_some_brackets_later_than_in_others():
    """Trials that come ever worse: in each bracket all but the first are stopped at the bracket's first rung."""
    arm_search = search(settings=settings_of(scheduler={"hyperband": {"grace_epochs": 1, "reduction_factor": 3}}))
    stopped_at = set()
    for i in range(30):
        number, _ = arm_search.propose()
        for e in range(1, 10):
            if arm_search.report(number, epoch(e, 1 - i / 100)):
                stopped_at.add(e)
                arm_search.tell(number, Outcome.PRUNED, None)
                break
        else:
            arm_search.tell(number, Outcome.COMPLETE, 1 - i / 100)
    assert {1, 3} <= stopped_at
