"""What `auto` means in a study: settled once, before its first trial, for all of its trials and for good.

Trials that are compared, and a trial that is resumed, have to compute alike; so a choice that rests on a measurement
(`studytool.study.choosing`) is kept in the ledger. The ledger and MLflow know a trial by the study file's settings, the
worker gets those that follow from the choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from studytool.settings import TrainSettings
from studytool.spec import StudySpec, TrialSpec


@dataclass(frozen=True)
class Choices:
    """What is taken for `train.compile: auto` and `train.batch_factor: auto`."""

    compile: Literal["on", "off"] = "off"
    batch_factor: int = 1

    def applied(self, trial: TrialSpec) -> TrialSpec:
        """The trial as a worker trains it: compiled or not, with its larger batches and what follows from them."""
        train = trial.train
        compiled = self.compile if train.compile == "auto" else train.compile
        factor = self.batch_factor if train.batch_factor == "auto" else train.batch_factor
        changes: dict[str, Any] = {"compile": compiled, "batch_factor": 1, **larger_batches(train, factor)}
        return trial.model_copy(update={"train": train.model_copy(update=changes)})


_LEARNING_RATE_FACTOR: Mapping[str, Callable[[int], float]] = {"sgd": float, "adam": math.sqrt, "adamw": math.sqrt}


def larger_batches(train: TrainSettings, factor: int) -> dict[str, Any]:
    """What `factor` times larger batches change, so that the settings of the study file keep their meaning.

    The learning rate of SGD grows with the batch (Goyal et al., arXiv 1706.02677), that of Adam and AdamW with its
    square root (Malladi et al., arXiv 2205.10287; their further rule for the decay rates is not followed); the average
    of the weights forgets as much in an epoch as before (Busbridge et al., arXiv 2307.13813).
    """
    if factor == 1:
        return {}
    return {
        "batch_size": train.batch_size * factor,
        "learning_rate": train.learning_rate * _LEARNING_RATE_FACTOR[train.optimizer](factor),
        "ema": None if train.ema is None else train.ema**factor,
    }


def open_choices(spec: StudySpec) -> frozenset[str]:
    """The factors that are `auto` in some trial of the study and have to be chosen: "compile", "batch_factor"."""
    return frozenset(
        name
        for name in ("compile", "batch_factor")
        if getattr(spec.train, name) == "auto"
        or "auto" in spec.arms.get(name, ())
        or (name in spec.search.space and "auto" in spec.search.space[name].ends)
    )
