"""YAML -> a frozen, checked StudySpec; StudySpec + parameters -> TrialSpec."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from studytool.data.cachefolder import cache_folder
from studytool.errors import SpecError, unknown_name
from studytool.models.backbones import check_model_choice
from studytool.remote import is_remote
from studytool.search_settings import Distribution, SearchSettings
from studytool.settings import (
    FACTORS,
    HANDLING,
    SECTIONS,
    BudgetSettings,
    ConfirmSettings,
    DataSettings,
    InputSettings,
    MetricSettings,
    ModelSettings,
    ResourceSettings,
    Settings,
    TrackingSettings,
    TrainSettings,
)
from studytool.spec_messages import Locator, first_problem, locator, shown
from studytool.yamlfile import parse_value, read_yaml

MOST_COMBINATIONS = 10_000
"""Of the values under `arms:`; and three times as many of arms with the values that tell whether a range is allowed."""
LONGEST_ARM_NAME = 200
"""Characters; a folder's name may have 255, and a trial's says more than its arm."""

Kind = TypeVar("Kind", bound=BaseModel)
KindOfSettings = TypeVar("KindOfSettings", bound=Settings)


class TrialSpec(Settings):
    """One training run, complete: what `studytool.training.loop.train_trial` needs to know.

    `number` counts the trials of an arm's phase; a confirm trial's `source` is the search trial whose configuration
    it trains again, so that a study that is extended and finds a better one confirms that one under ids of its own.
    """

    study: str
    arm: str
    phase: Literal["search", "confirm", "single"]
    number: int
    source: int | None = None
    seed: int
    data_path: str
    data_split: str = "stored"
    on_damage: Literal["stop", "skip"] = "stop"
    cache: Literal["auto", "off"] = "off"
    model: ModelSettings
    input: InputSettings
    train: TrainSettings
    metric: MetricSettings

    @property
    def trial_id(self) -> str:
        """A name fit for a folder, such as `r2plus1d_18.random.none.search-003` or `….confirm-003-seed-1`."""
        if self.phase != "confirm":
            return f"{self.arm}.{self.phase}-{self.number:03d}"
        source = "" if self.source is None else f"-{self.source:03d}"
        return f"{self.arm}.confirm{source}-seed-{self.number}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Every factor's value by its flat name."""
        return {name: getattr(getattr(self, section), name) for name, section in FACTORS.items()}

    def config_hash(self, data_fingerprint: str) -> str:
        """Equal for two trials exactly when they compute the same thing on the same data, equally split.

        `data_fingerprint` is that of the opened dataset, which tells splits apart by what they are, not by their name.
        """
        circumstances = ("study", "arm", "phase", "number", "data_path", "data_split", "on_damage", "cache")
        content = self.model_dump(mode="json", exclude={**dict.fromkeys(circumstances, True), "train": {*HANDLING}})
        text = json.dumps([content, data_fingerprint], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Arm(Settings):
    """One combination of the compared factors, with its values by flat name."""

    name: str
    values: dict[str, Any]


class StudySpec(Settings):
    """A whole study, as its YAML file says it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: DataSettings
    model: ModelSettings = ModelSettings()
    input: InputSettings = InputSettings()
    train: TrainSettings = TrainSettings()
    arms: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    exclude: Annotated[tuple[dict[str, Any], ...], Field(max_length=100)] = ()
    search: SearchSettings = SearchSettings()
    confirm: ConfirmSettings = ConfirmSettings()
    metric: MetricSettings = MetricSettings()
    resources: ResourceSettings = ResourceSettings()
    budget: BudgetSettings = BudgetSettings()
    tracking: TrackingSettings = TrackingSettings()
    cache: Literal["auto", "off"] = "auto"
    output: Annotated[str, Field(min_length=1)] = "studies"

    @model_validator(mode="after")
    def _priced(self) -> StudySpec:
        if self.budget.max_cost is not None and self.resources.price_per_device_hour is None:
            raise ValueError("budget.max_cost needs a price: add resources: {price_per_device_hour: …}")
        return self

    @property
    def folder(self) -> Path:
        """Where the study keeps its ledger, checkpoints, logs and tables; of an address, its working copy."""
        if self.storage_address is not None:
            digest = hashlib.sha256(self.storage_address.encode()).hexdigest()[:16]
            return cache_folder("studies") / digest / self.name
        return Path(self.output) / self.name

    @property
    def storage_address(self) -> str | None:
        """The address of the study's folder, if `output` is an address."""
        return f"{self.output.rstrip('/')}/{self.name}" if is_remote(self.output) else None

    def list_arms(self) -> tuple[Arm, ...]:
        """The cross product of `arms:` less what `exclude:` names, in the file's order."""
        names = list(self.arms)
        combinations = (dict(zip(names, values, strict=True)) for values in itertools.product(*self.arms.values()))
        kept = [c for c in combinations if not any(_matches(c, pattern) for pattern in self.exclude)]
        return tuple(Arm(name=_arm_name(values), values=values) for values in kept)

    def most_epochs(self, arm: Arm) -> int:
        """How many epochs a trial of an arm has at most."""
        tuned = self.search.space.get("max_epochs")
        return int(max(tuned.ends) if tuned else arm.values.get("max_epochs", self.train.max_epochs))

    def trial(
        self,
        arm: Arm,
        parameters: Mapping[str, Any],
        *,
        phase: Literal["search", "confirm", "single"],
        number: int,
        seed: int,
        source: int | None = None,
    ) -> TrialSpec:
        """The trial that an arm, sampled parameters and a seed make (ValidationError for values not allowed)."""
        overrides: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for name, value in {**arm.values, **parameters}.items():
            overrides[FACTORS[name]][name] = value
        sections = {
            section: _revalidated(getattr(self, section), values) if values else getattr(self, section)
            for section, values in overrides.items()
        }
        return TrialSpec(
            study=self.name,
            arm=arm.name,
            phase=phase,
            number=number,
            source=source,
            seed=seed,
            data_path=self.data.path,
            data_split=self.data.split,
            on_damage=self.data.on_damage,
            cache=self.cache,
            metric=self.metric,
            **sections,
        )


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read and check a study file; `overrides` are `dotted.key=value` texts that replace values of the file.

    Raises:
        SpecError: one line with file, line, key, what was found, what is allowed.
    """
    path = Path(path)
    file = read_yaml(path)
    if not isinstance(file.values, dict):
        raise SpecError(
            f"{path}: a study file is a mapping of keys such as name:, data: and arms:, found {shown(file.values)}"
        )
    changed = {_override(file.values, text) for text in overrides}
    where = locator(path, file, changed)
    try:
        spec = _validated(StudySpec, file.values)
    except ValidationError as error:
        raise SpecError(first_problem(error, StudySpec, where)) from error
    _check_factors(spec, where)
    _check_every_arm(spec, where)
    return spec


def factor_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`factor=value` texts (a dotted section in front is allowed) as values by flat name, for a single trial."""
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        name = key.strip().rpartition(".")[2]
        if not equals or name not in FACTORS:
            raise SpecError(f"--set {text!r}: " + unknown_name("factor", key.strip(), FACTORS))
        values[name] = parse_value(value, f"--set {text!r}")
    return values


def single_trial(spec: StudySpec, values: Mapping[str, Any], *, seed: int) -> TrialSpec:
    """One trial of a study with factors chosen by hand; compared factors with several values have to be chosen."""
    open_factors = [name for name, choices in spec.arms.items() if len(choices) > 1 and name not in values]
    if open_factors:
        name = open_factors[0]
        choices = spec.arms[name]
        raise SpecError(f"arms.{name} has {len(choices)} values; choose one, for example --set {name}={choices[0]}")
    chosen = {name: values.get(name, choices[0]) for name, choices in spec.arms.items()}
    arm = Arm(name=_arm_name(chosen), values=chosen)
    try:
        trial = spec.trial(arm, values, phase="single", number=0, seed=seed)
        check_model_choice(**_model_choice(trial))
    except ValidationError as error:
        name = ".".join(map(str, error.errors()[0]["loc"][:1])) or "…"
        raise SpecError(first_problem(error, TrialSpec, _always(f"--set {name}"))) from error
    return trial


def _override(values: dict[str, Any], text: str) -> tuple[str, ...]:
    key, equals, value = text.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise SpecError(f"--set {text!r} is not of the form key=value, such as 'confirm.seeds=3'")
    target = values
    for part in keys[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise SpecError(f"--set {text!r}: {part} is not a section of the study file")
    target[keys[-1]] = parse_value(value, f"--set {text!r}")
    return keys


def _validated(kind: type[Kind], values: Any) -> Kind:
    """Validate strictly ("5" is no number, 1 is no truth value), after turning YAML's lists into tuples."""
    return kind.model_validate(_tuples(values))


def _tuples(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _tuples(value) for key, value in values.items()}
    return tuple(map(_tuples, values)) if isinstance(values, list | tuple) else values


def _revalidated(settings: KindOfSettings, changes: Mapping[str, Any]) -> KindOfSettings:
    return _validated(type(settings), {**settings.model_dump(), **changes})


def _check_factors(spec: StudySpec, where: Locator) -> None:
    _check_size(math.prod(map(len, spec.arms.values())), MOST_COMBINATIONS, where)
    for name, values in spec.arms.items():
        if name not in FACTORS:
            raise SpecError(f"{where(('arms', name))}: {unknown_name('factor', name, FACTORS)}")
        for i, value in enumerate(values):
            if value in values[:i]:
                raise SpecError(f"{where(('arms', name, i))}: {shown(value)} stands twice")
        if name in spec.search.space:
            raise SpecError(f"{where(('search', name))}: {name} is compared under arms:; it cannot be tuned as well")
    for i, pattern in enumerate(spec.exclude):
        for name in pattern:
            if name not in spec.arms:
                raise SpecError(f"{where(('exclude', i, name))}: {unknown_name('compared factor', name, spec.arms)}")
    if not spec.list_arms():
        raise SpecError(f"{where(('exclude',))}: nothing is left to compare: every combination of arms: is excluded")


def _check_size(combinations: int, most: int, where: Locator) -> None:
    if combinations > most:
        raise SpecError(
            f"{where(('arms',))}: {combinations} combinations are more than a study can look at; at most {most} are "
            "allowed; compare fewer values, or divide the study"
        )


def _check_every_arm(spec: StudySpec, where: Locator) -> None:
    """Build every arm with the ends of every range, so that no value the study may meet is refused later."""
    arms = spec.list_arms()
    for name, count in Counter(arm.name for arm in arms).items():
        if count > 1:
            raise SpecError(
                f"{where(('arms',))}: two combinations have the same short name {name!r}; spell them differently"
            )
    extremes = list(extreme_parameters(spec.search.space))
    _check_size(len(arms) * len(extremes), 3 * MOST_COMBINATIONS, where)
    for arm in arms:
        for parameters in extremes:
            try:
                trial = spec.trial(arm, parameters, phase="search", number=0, seed=spec.seed)
            except ValidationError as error:
                # A problem of two factors together (warm-up longer than the training, say) has no single place.
                location = tuple(map(str, error.errors()[0]["loc"][:1]))
                section = "search" if {*location} & {*parameters} or not spec.arms else "arms"
                place = where((section, *location))
                raise SpecError(first_problem(error, TrialSpec, _always(place))) from error
            try:
                check_model_choice(**_model_choice(trial))
            except SpecError as error:
                raise SpecError(f"{where(('arms',) if spec.arms else ('model',))}: {error}") from error


def _always(place: str) -> Locator:
    return lambda _location: place


def _model_choice(trial: TrialSpec) -> dict[str, str]:
    return trial.model.model_dump(include={"backbone", "init", "freeze", "stem_stride"})


def extreme_parameters(space: Mapping[str, Distribution]) -> Iterator[dict[str, Any]]:
    """Parameters that between them hold the lowest and highest value of every range, and every choice."""
    longest = max((len(d.ends) for d in space.values()), default=1)
    for i in range(longest):
        yield {name: d.ends[min(i, len(d.ends) - 1)] for name, d in space.items()}


def _matches(values: Mapping[str, Any], pattern: Mapping[str, Any]) -> bool:
    """Whether a combination is excluded: each named factor has the named value, or one of the named values."""
    return all(
        values[name] in wanted if isinstance(wanted, tuple) else values[name] == wanted
        for name, wanted in pattern.items()
    )


def _arm_name(values: Mapping[str, Any]) -> str:
    """`r2plus1d_18.kinetics400.stage2`: the compared values joined by dots, fit for a file name.

    A name too long for that ends in a digest of the values instead.
    """
    parts = [json.dumps(v) if not isinstance(v, str) else v for v in values.values()]
    name = ".".join(re.sub(r"[^A-Za-z0-9_+-]+", "-", part).strip("-") or "none" for part in parts) or "all"
    if len(name) <= LONGEST_ARM_NAME:
        return name
    return f"{name[: LONGEST_ARM_NAME - 9]}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"
