"""The section `search:` of a study file: what is tuned, how its values are proposed, which trials are stopped early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from studytool import registry
from studytool.errors import unknown_name
from studytool.settings import FACTORS, Settings, named


class Distribution(Settings):
    """The values a tuned factor may take: one of the five forms."""

    log_uniform: tuple[float, float] | None = None
    uniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = None
    log_integer: tuple[int, int] | None = None
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Distribution:
        if len(self.model_fields_set) != 1:
            raise ValueError(f"give exactly one of {', '.join(Distribution.model_fields)}")
        if self.choice is None:
            low, high = self.ends
            if not low < high:
                raise ValueError(f"the range has to rise, found [{low}, {high}]")
            if low <= 0 and self.kind.startswith("log"):
                raise ValueError(f"a logarithmic range has to start above 0, found [{low}, {high}]")
        return self

    @property
    def kind(self) -> str:
        """The name of the form that was given."""
        return next(iter(self.model_fields_set))

    @property
    def ends(self) -> tuple[Any, ...]:
        """The lowest and highest value, or every choice: if these are allowed, all values are."""
        values: tuple[Any, ...] = getattr(self, self.kind)
        return values

    @property
    def values(self) -> Sequence[Any]:
        """Every value of a choice or an integer range."""
        if self.kind == "choice":
            return self.ends
        low, high = self.ends
        return range(low, high + 1)


class AshaSettings(Settings):
    """Asynchronous successive halving: after `grace_epochs` x factor^k epochs, the best 1/factor of an arm go on."""

    grace_epochs: Annotated[int, Field(ge=1)] = 3
    reduction_factor: Annotated[int, Field(ge=2)] = 3


class HyperbandSettings(Settings):
    """Hyperband: successive halvings side by side, the first from `grace_epochs` on, each next from a later epoch."""

    grace_epochs: Annotated[int, Field(ge=1)] = 3
    reduction_factor: Annotated[int, Field(ge=2)] = 3


class MedianSettings(Settings):
    """A trial is stopped after an epoch from `grace_epochs` on if its best is below the arm's median at that epoch.

    The median is that of the arm's finished trials, once there are `startup_trials` of them.
    """

    grace_epochs: Annotated[int, Field(ge=1)] = 3
    startup_trials: Annotated[int, Field(ge=1)] = 4


class SchedulerSettings(Settings):
    """Which trials of an arm are stopped early: by one of the three, or, with `none`, not at all."""

    asha: AshaSettings | None = AshaSettings()
    hyperband: HyperbandSettings | None = None
    median: MedianSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            names = ("none", *cls.model_fields)
            if value not in names:
                raise ValueError(unknown_name("scheduler", value, names))
            return {"asha": None} if value == "none" else {"asha": None, value: {}}
        if isinstance(value, dict):
            given = [name for name in cls.model_fields if value.get(name) is not None]
            if len(given) > 1:
                raise ValueError(f"choose one scheduler, found {' and '.join(given)}")
            return {"asha": None, **value} if given else value
        return value

    @property
    def kind(self) -> str:
        """The scheduler's name."""
        return next((name for name in type(self).model_fields if getattr(self, name) is not None), "none")

    @model_serializer(mode="wrap")
    def _as_ever(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As the ledgers of the versions that knew only asha and none have it."""
        return {name: value for name, value in serialize(self).items() if name == "asha" or value is not None}


MOST_GRID_POINTS = 100_000


class SearchSettings(Settings):
    """The search phase; keys that are factors become `space`, e.g. `learning_rate: {log_uniform: [1.0e-5, 1.0e-2]}`."""

    trials_per_arm: Annotated[int, Field(ge=1, le=100_000)] = 12
    sampler: Annotated[str, named("sampler", registry.SAMPLERS)] = "tpe"
    scheduler: SchedulerSettings = SchedulerSettings()
    space: dict[str, Distribution] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_space(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = {*cls.model_fields} - {"space"}
        unknown = [key for key in value if key not in known and key not in FACTORS and key != "space"]
        if unknown:
            raise ValueError(unknown_name("key", unknown[0], [*known, *FACTORS]))
        settings = {key: item for key, item in value.items() if key not in FACTORS}
        factors = {key: item for key, item in value.items() if key in FACTORS}
        return {**settings, "space": {**value.get("space", {}), **factors}}

    @model_validator(mode="after")
    def _possible(self) -> SearchSettings:
        if self.sampler == "grid":
            for name, distribution in self.space.items():
                if distribution.kind not in ("choice", "integer"):
                    raise ValueError(
                        f"sampler grid needs the values of {name}, found the range {list(distribution.ends)}; name "
                        f"them, as {name}: {{choice: [{distribution.ends[0]}, {distribution.ends[1]}]}}, or choose "
                        "another sampler"
                    )
            if self.points is not None and self.points > MOST_GRID_POINTS:
                raise ValueError(f"the grid has {self.points} points; at most {MOST_GRID_POINTS} are allowed")
        if self.sampler == "cmaes" and self.space:
            numeric = [name for name, distribution in self.space.items() if distribution.kind != "choice"]
            if len(numeric) < 2:
                raise ValueError(
                    f"sampler cmaes needs at least two tuned ranges, found {len(numeric)}; tune another factor, or use "
                    "sampler: tpe"
                )
        if self.sampler == "nsga2" and self.scheduler.kind != "none":
            raise ValueError(
                f"sampler nsga2 weighs the metric against the cost of whole trials, so none can be stopped early by "
                f"{self.scheduler.kind}; add scheduler: none"
            )
        return self

    @property
    def points(self) -> int | None:
        """How many combinations the search space has; None if there is a range that is not of whole numbers."""
        if any(distribution.kind not in ("choice", "integer") for distribution in self.space.values()):
            return None
        return math.prod(len(distribution.values) for distribution in self.space.values())

    @property
    def trials_planned(self) -> int:
        """How many trials the search of an arm has: none without a search space, at most every point of a grid once."""
        if not self.space:
            return 0
        if self.sampler == "grid" and self.points is not None:
            return min(self.trials_per_arm, self.points)
        return self.trials_per_arm
