from __future__ import annotations

import pytest
from synthetic_study import scores

from studytool.results import Cost, EpochResult, Outcome
from studytool.settings import MetricSettings, SearchSettings
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
    return ArmSearch(arm, settings, MetricSettings(), seed)


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
