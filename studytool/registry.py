"""The names a study file may use, each once: name -> "module:attribute", loaded when it is first needed.

Backbones have more to say for themselves and stand in `studytool.models.backbones`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from studytool.errors import SpecError, unknown_name

INITIALIZATIONS: Mapping[str, str] = {
    "random": "studytool.models.initialize:random_weights",
    "kinetics400": "studytool.models.initialize:kinetics400",
    "motion": "studytool.models.initialize:motion",
    "imagenet_inflated": "studytool.models.initialize:imagenet_inflated",
    "shuffled": "studytool.models.initialize:shuffled",
}
OPTIMIZERS: Mapping[str, str] = {
    "adamw": "torch.optim:AdamW",
    "adam": "torch.optim:Adam",
    "sgd": "torch.optim:SGD",
}
SCHEDULES: Mapping[str, str] = {
    "cosine": "studytool.training.optim:cosine",
    "multistep": "studytool.training.optim:multistep",
    "constant": "studytool.training.optim:constant",
}
FILTERS: Mapping[str, str] = {
    "none": "studytool.data.preprocess:unfiltered",
    "low_pass": "studytool.data.preprocess:low_pass",
    "dog": "studytool.data.preprocess:difference_of_gaussians",
}
NORMALIZATIONS: Mapping[str, str] = {
    "standard": "studytool.data.preprocess:standard",
    "percentile": "studytool.data.preprocess:percentile",
    "minmax": "studytool.data.preprocess:minmax",
    "none": "studytool.data.preprocess:unchanged",
}
AUGMENTATIONS: Mapping[str, str] = {
    "turns": "studytool.data.augment:half_turns",
    "shift": "studytool.data.augment:shift",
    "noise": "studytool.data.augment:noise",
    "contrast": "studytool.data.augment:contrast",
    "flips": "studytool.data.augment:flips",
    "rotations24": "studytool.data.augment:cube_rotations",
    "in_plane": "studytool.data.augment:in_plane",
    "resized_crop": "studytool.data.augment:resized_crop",
}
SAMPLERS: Mapping[str, str] = {
    "tpe": "studytool.study.search:tpe",
    "random": "studytool.study.search:random",
    "grid": "studytool.study.search:grid",
    "cmaes": "studytool.study.search:cmaes",
    "nsga2": "studytool.study.search:nsga2",
}


def load(entry: str) -> Any:
    """Import what a "module:attribute" entry names.

    Raises:
        SpecError: the entry has another form, or the module or attribute does not exist.
    """
    module_name, colon, attribute = entry.partition(":")
    if not colon or not module_name or not attribute:
        raise SpecError(f"{entry!r} is not of the form 'package.module:function'")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise SpecError(f"{entry!r}: no module named {error.name!r}; is it installed in this environment?") from error
    except AttributeError as error:
        raise SpecError(f"{entry!r}: module {module_name!r} has no {attribute!r}") from error


def lookup(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """Load the entry that `name` has in `table`; an unknown name is a SpecError with a suggestion."""
    if name not in table:
        raise SpecError(unknown_name(kind, name, table))
    return load(table[name])
