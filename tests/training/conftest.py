"""The small dataset of this room's tests, and trials on it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training_data import particles, write

from studytool.settings import InputSettings, MetricSettings, ModelSettings, TrainSettings
from studytool.spec import TrialSpec

MakeTrial = Callable[..., TrialSpec]


@pytest.fixture(scope="session", autouse=True)
def _collect_quickly() -> Iterator[None]:
    """Every trial ends with a collection, which would walk through all imported modules: half of these tests' time."""
    import studytool.training.loop  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes x (7 train, 4 val, 4 test) volumes of 12^3, float16."""
    return write(tmp_path_factory.mktemp("data") / "shapes", particles())


@pytest.fixture
def make_trial(dataset_folder: Path) -> MakeTrial:
    """A function that makes a TrialSpec on the small dataset; keywords are factors, metric settings or its own.

    Its checkpoints do not depend on how long anything takes.
    """

    def make(**changes: Any) -> TrialSpec:
        values: dict[str, Any] = {"max_epochs": 3, "batch_size": 8, "learning_rate": 0.01, "checkpoints": "each_epoch"}
        values |= changes
        names = ("phase", "seed", "data_path", "data_split", "study", "number")
        own = {name: values.pop(name) for name in names if name in values}
        metric = {name: values.pop(name) for name in ("name", "mode", "select", "target") if name in values}
        sections = {"model": ModelSettings, "input": InputSettings, "train": TrainSettings}
        values.setdefault("backbone", "training_nets:convolutional")
        chosen = {
            section: kind(**{name: values.pop(name) for name in list(values) if name in kind.model_fields})
            for section, kind in sections.items()
        }
        assert not values, f"unknown: {values}"
        defaults = {
            "study": "s",
            "arm": "a",
            "phase": "search",
            "number": 0,
            "seed": 1,
            "data_path": str(dataset_folder),
        }
        return TrialSpec(**{**defaults, **own}, **chosen, metric=MetricSettings(**metric))

    return make
