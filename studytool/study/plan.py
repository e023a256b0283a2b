"""What is left of a study, and about what it will take: nothing is started, fetched or written but measurements.

Seconds per epoch are those of the arm's trials so far, else they are put together from what a few steps were measured
to take (see `studytool.study.measure`). How many epochs early stopping leaves of a search is what it left so far in
the arm, else the rule of `expected_epochs`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from studytool.data.labels import training_rows
from studytool.data.remote_copy import local_copy
from studytool.data.shards import open_dataset
from studytool.errors import DataError
from studytool.models.weights import missing_weights
from studytool.remote import is_remote
from studytool.results import Outcome, TrialRecord, records_by_arm
from studytool.search_settings import SchedulerSettings
from studytool.settings import SimulateSettings
from studytool.spec import Arm, StudySpec, TrialSpec, extreme_parameters
from studytool.study.armstate import ArmState
from studytool.study.budget import device_seconds_spent
from studytool.study.choices import Choices
from studytool.study.measure import Measurement, Workload, kept_measurement, measure, workload
from studytool.study.records import read_choices, read_records
from studytool.study.slots import Slots, gpu_names, memory_of_trial_gib, share_out
from studytool.training.cost import CHECKPOINT_SHARE
from studytool.training.packs import trains_a_head

SECONDS_EACH = 60.0
"""How long one workload is measured at most."""
SECONDS_IN_ALL = 300.0
"""How long all workloads of a plan are measured at most."""


@dataclass(frozen=True)
class ArmPlan:
    """What is left of an arm. `epoch_seconds` and what follows from it are None where nothing is known of it.

    `source` says where the seconds are from: "trials" or "measured". `search_epochs` is how many epochs a search trial
    is expected to run, `most_epochs` how many without early stopping, `epochs_done` what interrupted trials have done.
    """

    name: str
    search: int
    search_planned: int
    confirm: int
    confirm_planned: int
    search_epochs: float
    most_epochs: int
    epochs_done: int
    epoch_seconds: float | None
    source: str
    peak_memory_gib: float | None
    weights_bytes: int
    state_bytes: int

    def seconds(self, *, stopped_early: bool = True) -> float | None:
        """Seconds of training that are left, one trial after another."""
        if self.epoch_seconds is None:
            return None
        search = self.search * (self.search_epochs if stopped_early else self.most_epochs)
        return max(0.0, search + self.confirm * self.most_epochs - self.epochs_done) * self.epoch_seconds


@dataclass(frozen=True)
class Plan:
    """What is left of a study. `problems` would stop it before its first trial; `notes` are good to know."""

    spec: StudySpec
    arms: tuple[ArmPlan, ...]
    slots: Slots
    spent_device_seconds: float
    data_bytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def seconds(self, *, stopped_early: bool = True) -> float | None:
        """Seconds of training that are left, one trial after another; None if they are not known of every arm."""
        parts = [arm.seconds(stopped_early=stopped_early) for arm in self.arms]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def device_hours(self, *, stopped_early: bool = True) -> float | None:
        """Device-hours that are left."""
        seconds = self.seconds(stopped_early=stopped_early)
        return None if seconds is None else seconds / self.slots.side_by_side / 3600

    @property
    def wall_seconds(self) -> float | None:
        """Wall time that is left: no less than one whole trial after another in each slot."""
        seconds = self.seconds()
        return None if seconds is None else seconds / self.slots.count

    @property
    def kept_bytes(self) -> int:
        """Checkpoints that stay: of each arm's best search trial and of its confirm trials."""
        return sum(arm.weights_bytes * (bool(arm.search_planned) + arm.confirm_planned) for arm in self.arms)

    @property
    def passing_bytes(self) -> int:
        """Checkpoints that are there at most besides: of search trials until their arm is decided, of running ones."""
        undecided = sum(arm.weights_bytes * arm.search for arm in self.arms)
        running = max((arm.state_bytes for arm in self.arms), default=0)
        return undecided + 2 * running * self.slots.count


def plan_study(
    spec: StudySpec,
    *,
    choices: Choices | None = None,
    seconds_in_all: float = SECONDS_IN_ALL,
    on_measuring: Callable[[str], None] = lambda _line: None,
) -> Plan:
    """Plan what is left of a study.

    Args:
        spec: the study.
        choices: what `auto` means in it (default: what was chosen when it was run, else nothing).
        seconds_in_all: how long may be measured; with 0 only what was measured before is used.
        on_measuring: is told of every workload that is measured, in a line.

    Raises:
        StudytoolError: the study cannot run here at all, or its ledger is damaged.
    """
    records = read_records(spec.folder)
    choices = choices or read_choices(spec.folder) or Choices()
    data, problem = _data(spec)
    meter = meter_of(spec, seconds_in_all, on_measuring)
    slots = meter.slots
    own = records_by_arm(records)
    arms = tuple(_plan_arm(spec, arm, own.get(arm.name, ()), meter, choices) for arm in spec.list_arms())
    problems = [problem] if problem else []
    missing = {missing_weights(t.model.backbone, t.model.init): t.model.init for t in _one_of_each(spec)}
    problems += [line for line, init in missing.items() if line and not is_remote(init.removeprefix("checkpoint:"))]
    return Plan(
        spec=spec,
        arms=arms,
        slots=slots,
        spent_device_seconds=device_seconds_spent(records),
        data_bytes=data.new_bytes if data else 0,
        problems=tuple(problems),
        notes=tuple(meter.notes),
    )


def expected_epochs(scheduler: SchedulerSettings, max_epochs: int) -> float:
    """How many epochs a search trial runs on average.

    Successive halving: of the trials that reach a rung, 1 in `reduction_factor` goes on to the next. Hyperband: the
    mean over its brackets, each a successive halving that begins a rung later. Median: half of the trials end at the
    grace epoch. Asynchronous halving lets the first to arrive pass, so that small searches run longer than this.
    """
    if scheduler.asha:
        return _halved(scheduler.asha.grace_epochs, scheduler.asha.reduction_factor, max_epochs)
    if scheduler.hyperband:
        grace, factor = scheduler.hyperband.grace_epochs, scheduler.hyperband.reduction_factor
        brackets = int(math.log(max(1, max_epochs // grace), factor) + 1e-9) + 1
        return sum(_halved(grace * factor**k, factor, max_epochs) for k in range(brackets)) / brackets
    if scheduler.median:
        return (min(scheduler.median.grace_epochs, max_epochs) + max_epochs) / 2
    return float(max_epochs)


def _halved(grace: int, factor: int, most: int) -> float:
    rung, share, epochs = min(grace, most), 1.0, float(min(grace, most))
    while rung < most:
        share /= factor
        following = min(rung * factor, most)
        epochs += share * (following - rung)
        rung = following
    return epochs


@dataclass(frozen=True)
class _Data:
    """What is known of the volumes before any is read; `new_bytes` is what a simulation would write."""

    shape_dhw: tuple[int, int, int]
    voxel_size_angstrom: float
    dtype: str
    num_classes: int
    train_volumes: Callable[[TrialSpec], int]
    val_volumes: int
    test_volumes: int
    new_bytes: int = 0


def _data(spec: StudySpec) -> tuple[_Data | None, str | None]:
    """The dataset, if it is here or will be simulated, and what is wrong with it."""
    settings = spec.data
    if is_remote(settings.path):
        return None, None
    try:
        if settings.simulate is not None and not Path(settings.path).exists():
            return _to_be_simulated(settings.simulate), None
        dataset = open_dataset(local_copy(settings.path, leave_out=settings.leave_out), settings.split)
        manifest = dataset.manifest
        return _Data(
            manifest.shape_dhw,
            manifest.voxel_size_angstrom,
            manifest.dtype,
            len(manifest.classes),
            lambda trial: len(training_rows(dataset, trial.input, trial.seed)),
            len(dataset.rows("val")),
            len(dataset.rows("test")) if "test" in manifest.split_counts() else 0,
        ), None
    except DataError as error:
        return None, str(error)


def _to_be_simulated(settings: SimulateSettings) -> _Data:
    from studytool.data.simulate import select_densities

    count, per_class, tomograms = len(select_densities(settings)), settings.volumes_per_class, settings.tomograms
    of_class = [sum(i % sum(tomograms) < upto for i in range(per_class)) for upto in (tomograms[0], sum(tomograms[:2]))]
    train = of_class[0]

    def train_volumes(trial: TrialSpec) -> int:
        return count * (trial.input.labels_per_class or max(1, round(trial.input.label_fraction * train)))

    voxel_bytes = {"float16": 2, "float32": 4, "uint8": 1}[settings.dtype]
    return _Data(
        (settings.side,) * 3,
        settings.voxel_size_angstrom,
        settings.dtype,
        count,
        train_volumes,
        count * (of_class[1] - of_class[0]),
        count * (per_class - of_class[1]),
        new_bytes=count * per_class * settings.side**3 * voxel_bytes,
    )


def meter_of(
    spec: StudySpec,
    seconds_in_all: float,
    on_measuring: Callable[[str], None],
    *,
    seconds_each: float = SECONDS_EACH,
) -> Meter:
    """A meter for the trials of a study on this machine; it measures for so long at most, each kind of trial so long.

    Raises:
        StudytoolError: a trial asks for more than this machine has.
    """
    slots = share_out(spec.resources, len(os.sched_getaffinity(0)), float(len(gpu_names())))
    return Meter(slots, _data(spec)[0], seconds_in_all, on_measuring, seconds_each)


class Meter:
    """Seconds per epoch and memory of trials, from measurements, while the time for them lasts."""

    def __init__(
        self,
        slots: Slots,
        data: _Data | None,
        seconds_left: float,
        on_measuring: Callable[[str], None],
        seconds_each: float,
    ) -> None:
        self.notes: list[str] = []
        self.slots = slots
        self._data = data
        self._seconds_left = seconds_left
        self._seconds_each = seconds_each
        self._on_measuring = on_measuring
        self._known: dict[str, Measurement | None] = {}

    @property
    def memory_gib(self) -> float:
        """A trial's share of the device's memory."""
        return memory_of_trial_gib(self.slots)

    def volumes(self, trial: TrialSpec) -> int | None:
        """How many volumes the trial is trained on; None if the data is not here."""
        return None if self._data is None else self._data.train_volumes(trial)

    def epoch_of(self, trial: TrialSpec) -> tuple[float, Measurement] | None:
        """Seconds of an epoch of the trial, and what they are made of; None if it is not known."""
        found, volumes = self.measurement(trial), self.volumes(trial)
        if found is None or volumes is None or self._data is None:
            return None
        steps = math.ceil(volumes / _batch_size(trial, volumes))
        computing = steps * found.seconds_per_step + found.seconds_per_evaluated_volume * self._data.val_volumes
        writing = found.checkpoint_seconds
        if trial.train.checkpoints == "auto" and not trains_a_head(trial):
            writing = min(writing, CHECKPOINT_SHARE * computing)
        return computing + writing, found

    def measurement(self, trial: TrialSpec) -> Measurement | None:
        """What a step of the trial takes; None if it is not known."""
        data, volumes = self._data, self.volumes(trial)
        if data is None or volumes is None:
            return None
        wanted = workload(
            trial,
            data.shape_dhw,
            data.voxel_size_angstrom,
            data.dtype,
            data.num_classes,
            batch_size=_batch_size(trial, volumes),
            cpu=self.slots.cpu,
        )
        text = wanted.as_json()
        if text not in self._known:
            self._known[text] = kept_measurement(wanted) or self._measured(wanted)
        return self._known[text]

    def _measured(self, wanted: Workload) -> Measurement | None:
        if self._seconds_left <= 0:
            return None
        model, train = wanted.trial.model, wanted.trial.train
        side = model.input_size if model.input_size != "keep" else wanted.volume_shape_dhw[0]
        what = f"{model.backbone}, freeze {model.freeze}, input {side}, batch {train.batch_size}, {train.precision}"
        what += ", compiled" if train.is_compiled else ""
        self._on_measuring(f"measuring {what}")
        begun = time.monotonic()
        found = measure(wanted, seconds=min(self._seconds_each, self._seconds_left))
        self._seconds_left -= time.monotonic() - begun
        if isinstance(found, str):
            self.notes.append(f"{what}: could not be measured: {found}")
            return None
        if not found.settled:
            self.notes.append(f"{what}: slow, so only the first steps were measured, which take longer than later ones")
        return found


def _batch_size(trial: TrialSpec, volumes: int) -> int:
    return max(1, min(trial.train.batch_size, volumes))


def _plan_arm(spec: StudySpec, arm: Arm, own: Sequence[TrialRecord], meter: Meter, choices: Choices) -> ArmPlan:
    state = ArmState(arm, spec, own, go_on=False)
    most = spec.most_epochs(arm)
    search = state.search_planned - state.search_ended
    if spec.search.points is not None:
        trained = sum(r.phase == "search" and r.same_as is None and r.outcome is not None for r in own)
        search = max(0, min(search, spec.search.points - trained))
    ended = [len(r.epochs) for r in own if r.phase == "search" and r.epochs and r.outcome not in (None, Outcome.FAILED)]
    epochs = sum(ended) / len(ended) if ended else expected_epochs(spec.search.scheduler, most)
    measured = (
        []
        if search + state.confirms_left == 0
        else [meter.epoch_of(choices.applied(t)) for t in extreme_trials(spec, arm)]
    )
    known = [m for m in measured if m is not None]
    trained_epochs = sum(len(r.epochs) for r in own)
    seconds, source = None, ""
    if trained_epochs:
        seconds, source = sum(r.cost.seconds for r in own) / trained_epochs, "trials"
    elif known and len(known) == len(measured):
        seconds, source = sum(s for s, _ in known) / len(known), "measured"
    memory = [m.peak_memory_gib for _, m in known] + [r.cost.peak_memory_gib for r in own if r.epochs]
    return ArmPlan(
        name=arm.name,
        search=search,
        search_planned=state.search_planned,
        confirm=state.confirms_left,
        confirm_planned=spec.confirm.seeds,
        search_epochs=epochs,
        most_epochs=most,
        epochs_done=sum(len(r.epochs) for r in own if r.outcome is None),
        epoch_seconds=seconds,
        source=source,
        peak_memory_gib=max(memory, default=None),
        weights_bytes=max((m.weights_bytes for _, m in known), default=0),
        state_bytes=max((m.state_bytes for _, m in known), default=0),
    )


def extreme_trials(spec: StudySpec, arm: Arm) -> list[TrialSpec]:
    """Trials of an arm that between them have the lowest and highest value of every range."""
    parameters = extreme_parameters(spec.search.space)
    return [spec.trial(arm, values, phase="search", number=0, seed=spec.seed) for values in parameters]


def _one_of_each(spec: StudySpec) -> list[TrialSpec]:
    """One trial of every backbone and initialization that occurs."""
    trials = [trial for arm in spec.list_arms() for trial in extreme_trials(spec, arm)]
    return list({(t.model.backbone, t.model.init): t for t in trials}.values())
