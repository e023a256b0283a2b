"""Which trials may be trained together; read by the study's driver, so without torch."""

from __future__ import annotations

from typing import Any

from studytool.settings import HANDLING
from studytool.spec import TrialSpec

OPTIMIZERS = frozenset({"adamw", "adam", "sgd"})
"""Those that `studytool.training.stacked` knows how to step for several heads at once."""
_OF_A_TRIAL = {"number", "source", "seed"}
_FREE = {
    "learning_rate",
    "weight_decay",
    "momentum",
    "schedule",
    "warmup_epochs",
    "label_smoothing",
    "class_weights",
    "gradient_clip",
    *HANDLING,
}
"""Settings of training that may differ from head to head."""
_SEEDED = frozenset({"random", "shuffled"})
"""Initializations whose frozen part is another one for every seed."""


def may_train_together(one: TrialSpec, other: TrialSpec) -> bool:
    """Whether `studytool.training.together.train_together` trains these two, of one arm, as heads on the same features.

    They differ in number and seed, and in settings of training that leave the length and the shape of an epoch alone.
    """
    if not trains_a_head(one) or _in_common(one) != _in_common(other):
        return False
    return one.seed == other.seed or one.model.init not in _SEEDED


def trains_a_head(trial: TrialSpec) -> bool:
    """Whether a trial trains nothing but a linear head, on features that stay the same and may be kept."""
    model, train = trial.model, trial.train
    fixed = model.freeze == "backbone" and model.frozen_batchnorm == "eval" and trial.cache == "auto"
    drawn = model.dropout > 0 or (trial.input.augment and trial.input.views is None)
    plain = train.optimizer in OPTIMIZERS and train.ema is None and train.compile == "off"
    return bool(fixed and not drawn and plain and train.precision != "float16")


def _in_common(trial: TrialSpec) -> dict[str, Any]:
    return trial.model_dump(exclude={**dict.fromkeys(_OF_A_TRIAL, True), "train": _FREE})
