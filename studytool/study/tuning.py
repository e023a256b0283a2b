"""Running a study's trials through Ray Tune, with study.worker in the processes that train.

Ray Tune starts, feeds and restarts the workers; it decides nothing. Its searcher asks the director for the next trial,
its stopper hands every epoch to the director, its callback tells of failures. Ray's own state on disk is disposable:
trials resume from their own checkpoints, studies from the ledger.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from studytool.study import rayenvironment  # noqa: F401 - first of all, since Ray reads it as it is imported

# isort: split
import ray
from ray import cloudpickle, tune
from ray.tune.search import Searcher

from studytool.errors import StudytoolError
from studytool.files import disk_full_explained
from studytool.results import DeviceInfo, EpochResult, epoch_from_dict
from studytool.settings import ResourceSettings
from studytool.study.director import Director
from studytool.study.events import Cause
from studytool.study.nodes import nodes_there
from studytool.study.nodewatch import NodeWatch
from studytool.study.signals import Signals
from studytool.study.slots import Slots, share_out, share_out_over
from studytool.study.worker import DISK_FULL, Worker
from studytool.training.memory import processes_killed_for_memory

Answer = TypeVar("Answer")


def plan_slots(resources: ResourceSettings, *, on_cluster: bool = False) -> Slots:
    """What the study's resources mean on the running Ray: "auto" is one GPU a trial where there are any, else one core.

    Raises:
        StudytoolError: a trial asks for more than there is.
    """
    if on_cluster:
        return share_out_over(resources, nodes_there(), place="the largest node of the cluster")
    available = ray.cluster_resources()
    return share_out(resources, int(available["CPU"]), available.get("GPU", 0.0))


def run_trials(
    director: Director,
    folder_of: Callable[[str], Path],
    slots: Slots,
    *,
    scratch: Path,
    signals: Signals,
    check_inputs: Callable[[], None],
    nodes: NodeWatch | None = None,
    storage_address: str | None = None,
    keep_workers: bool = True,
) -> str | None:
    """Run the director's trials until none is left; the name of the signal that ended it early, or None.

    Args:
        director: decides; see `studytool.study.director`.
        folder_of: a function from trial id to the folder the trial works in.
        slots: how many trials at once, and what each holds.
        scratch: a folder for what Ray Tune writes, which nobody reads.
        signals: those that end the run.
        check_inputs: raises a StudytoolError if what every trial needs is no longer there: no trial's fault.
        nodes: on a cluster, whose nodes come and go, knows which of them trials may run on.
        storage_address: where the workers put their checkpoints instead of `folder_of`.
        keep_workers: let a process that has ended a trial take the next one.

    Raises:
        StudytoolError: the study cannot go on, for example since the disk is full; no trial is lost by it.
    """
    if director.finished:
        return None
    # The observers say what happens, once; Ray's own messages would say it again, with tracebacks.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Else Ray begins one trial after the other, and a free slot waits for the first epoch of the one before.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(_MOST_PENDING)
    # Else it writes all its trials down every ten seconds, longer and longer, up to a twentieth of the time.
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(_NEVER_SECONDS)
    sys.setswitchinterval(_SWITCH_SECONDS)
    bridge = _Bridge(director, folder_of, slots, signals, check_inputs, nodes, storage_address, keep_workers)
    try:
        tune.Tuner(
            tune.with_resources(Worker, _share),
            tune_config=tune.TuneConfig(search_alg=_AskDirector(bridge), num_samples=-1, reuse_actors=keep_workers),
            run_config=tune.RunConfig(
                name="study",
                storage_path=str(scratch),
                stop=_TellDirector(bridge),
                callbacks=[_Failures(bridge)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
    except _Stop as stop:
        raise stop.error from None
    except BaseException:
        if signals.caught is None:
            raise
        # The signal's own exception, or what Ray's compiled parts make of it.
        return signals.caught
    return None


_MOST_PENDING = 10_000  # `_Bridge.ask` says how many trials there are at once, not Ray Tune
_NEVER_SECONDS = 1_000_000_000
_OTHERS_START_WITHIN_SECONDS = 60.0
_SWITCH_SECONDS = 0.0005
"""Ray's loop gives Python's lock away dozens of times between two trials, and the thread that tells MLflow takes it.

With Python's own 5 ms it would be kept waiting for most of the time from one trial to the next.
"""


class _Stop(BaseException):
    """Ends the run at once, past Ray Tune, which would take `error` for one of its own."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _share(config: dict[str, Any]) -> dict[str, float] | tune.PlacementGroupFactory:
    if not config["not_on"]:
        return {"cpu": config["holds_cpu"], "gpu": config["holds_gpu"]}
    held = {"CPU": config["holds_cpu"], **({"GPU": config["holds_gpu"]} if config["holds_gpu"] else {})}
    elsewhere = {"ray.io/node-id": f"!in({','.join(config['not_on'])})"}
    return tune.PlacementGroupFactory([held], bundle_label_selector=[elsewhere])


class _Bridge:
    """What the three hooks of Ray Tune share: the director, and which Ray trial stands for which of ours."""

    def __init__(
        self,
        director: Director,
        folder_of: Callable[[str], Path],
        slots: Slots,
        signals: Signals,
        check_inputs: Callable[[], None],
        nodes: NodeWatch | None,
        storage_address: str | None,
        keep_workers: bool = True,
    ) -> None:
        self.director = director
        self.folder_of = folder_of
        self.slots = slots
        self.signals = signals
        self.packs: dict[str, tuple[str, ...]] = {}
        self._check_inputs = check_inputs
        self._nodes = nodes
        self._heard_from: dict[str, str] = {}
        self._busy_since: dict[str, tuple[float, int]] = {}
        self._backbones = director.backbones
        # A worker that takes seconds to import what trials need does so before one begins and its clock runs.
        self._workers_to_start = min(slots.count, sum(director.trials_left.values())) if keep_workers else 0
        self._starting: set[str] = set()
        self._ready: set[str] = set()
        self._first_ready = math.inf
        self._storage_address = storage_address
        self._killed_for_memory = processes_killed_for_memory()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Bridge:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray pickles its searcher and stopper with its own state, which nothing reads again.
        return (object, ())

    def ask(self, ray_id: str) -> dict[str, Any] | str | None:
        """What Ray should start next; it has room for a trial more."""
        self.signals.watch()
        if self._nodes is not None:
            could, self.slots = self.slots.count, self._nodes.slots()
            if could and not self.slots.count:
                self.director.remark("no node of the cluster can take a trial now; waiting for one, see `ray status`")
        director, slots = self.director, self.slots
        if director.finished:
            return str(Searcher.FINISHED)
        if self._workers_to_start:
            self._workers_to_start -= 1
            self._starting.add(ray_id)
            return {"trials": None, **self._held()}
        # A trial that ran out of memory is waited for, so that it gets the machine to itself.
        taken = len(self.packs) + len(self._starting) + len(self._ready)
        if taken >= slots.count or any(map(director.needs_room, director.running)):
            return None
        trials = self._guarded(director.next_trials)
        if not trials:
            return None
        self.packs[ray_id] = tuple(trial.trial_id for trial in trials)
        alone = director.needs_room(trials[0].trial_id)
        # A whole GPU of its own is shared with nobody; cores of one machine share its memory and clock.
        side_by_side = 1 if alone else slots.side_by_side
        self._busy_since[ray_id] = time.monotonic(), side_by_side
        return {
            "trials": [trial.model_dump_json() for trial in trials],
            "folders": [str(self.folder_of(trial.trial_id)) for trial in trials],
            "storage": self._storage_address,
            **self._held(alone=alone),
            "side_by_side": side_by_side,
        }

    def _may_begin(self, ray_id: str) -> bool:
        """Whether a worker that is ready may have a trial.

        It waits for those that are still starting: Ray Tune would let it stand in for one of them, and end that one.
        """
        self._starting.discard(ray_id)
        self._ready.add(ray_id)
        self._first_ready = min(self._first_ready, time.monotonic())
        if self._starting and time.monotonic() < self._first_ready + _OTHERS_START_WITHIN_SECONDS:
            return False
        self._ready.remove(ray_id)
        return True

    def _not_started(self, ray_id: str) -> None:
        self._starting.discard(ray_id)
        self._ready.discard(ray_id)

    def _held(self, *, alone: bool = False) -> dict[str, Any]:
        slots = self.slots
        return {
            "backbones": self._backbones,
            "needs": self._nodes.needs if self._nodes else None,
            "not_on": self._nodes.refused if self._nodes else (),
            "cpu": slots.cpu,
            "holds_cpu": slots.cpu * slots.on_one_node if alone else slots.cpu,
            "holds_gpu": max(1.0, slots.gpu) if alone and slots.gpu else slots.gpu,
        }

    def tell(self, ray_id: str, result: dict[str, Any]) -> bool:
        """An epoch or the end of what runs together, or a worker that is ready; whether Ray has to stop it.

        Once one of several has ended, the others go on as a new trial of Ray's, from their checkpoints.
        """
        if ray_id in self._starting | self._ready:
            if "failure" not in result:
                return self._may_begin(ray_id)
            assert self._nodes is not None  # a node that lacks something is all that can be wrong so early
            self.director.remark(self._nodes.refuse(result["node"], result["failure"]))
            self._not_started(ray_id)
            return True
        if "failure" in result:
            failure = result
            if result["cause"] == Cause.NODE.value:
                assert self._nodes is not None
                failure = {**result, "failure": self._nodes.refuse(result["node"], result["failure"])}
            trial_ids = self.packs.pop(ray_id)
            for trial_id in trial_ids:
                share = failure["device_seconds"] / len(trial_ids)
                self._failed(trial_id, {**failure, "device_seconds": share})
            return True
        if self._nodes is not None:
            self._heard_from[ray_id] = result["node"]
            self._nodes.memory_ran_out(result["node"], result["killed_for_memory"])
        self._busy_since[ray_id] = time.monotonic(), self._busy_since[ray_id][1]
        failures = json.loads(result["failures"])
        # What failed is out of it, and may begin again elsewhere while the others go on.
        self.packs[ray_id] = tuple(trial_id for trial_id in self.packs[ray_id] if trial_id not in failures)
        for trial_id, failure in failures.items():
            self._failed(trial_id, failure)
        device = DeviceInfo(**result["device"])
        stopped = [
            self._epoch(trial_id, epoch_from_dict(values), device)
            for trial_id, values in json.loads(result["results"]).items()
        ]
        if stopped and not any(stopped):
            return False
        self._guarded(lambda: self.director.regroup(self.packs.pop(ray_id)))
        return True

    def _epoch(self, trial_id: str, result: EpochResult, device: DeviceInfo) -> bool:
        return self._guarded(lambda: self.director.epoch(trial_id, result, device))

    def broke(self, ray_id: str, error: Exception | None) -> None:
        """A worker process died, or did not come up."""
        if ray_id in self._starting | self._ready:
            self._not_started(ray_id)  # if it happens again, a trial has it in its log
            return
        details = str(error or "the worker ended without a word").strip()
        lines = details.splitlines()
        died = isinstance(error, ray.exceptions.RayActorError) and "creation task" not in lines[0]
        line = "its process died" if died else lines[-1].strip()
        cause = Cause.WORKER
        if self._nodes is not None:
            cause, line = self._nodes.explain(error, self._heard_from.get(ray_id), came_up=died) or (cause, line)
        elif (killed := processes_killed_for_memory()) > self._killed_for_memory:
            self._killed_for_memory = killed
            cause, line = Cause.MEMORY, "its process was killed by the system"
        trial_ids = self.packs.pop(ray_id, ())
        for trial_id in trial_ids:
            since, side_by_side = self._busy_since[ray_id]
            lost = (time.monotonic() - since) / side_by_side / len(trial_ids)
            failure = {"failure": line, "cause": cause.value, "details": details, "device_seconds": lost}
            self._failed(trial_id, failure)

    def _failed(self, trial_id: str, failure: dict[str, Any]) -> None:
        if failure["cause"] == DISK_FULL:
            raise _Stop(StudytoolError(failure["failure"]))
        message, cause, details = failure["failure"], Cause(failure["cause"]), failure["details"]
        if cause in (Cause.TRIAL, Cause.WORKER):
            # Else every trial of the study would fail one after the other while a disk is not mounted.
            self._guarded(self._check_inputs)
        lost = failure["device_seconds"]
        self._guarded(lambda: self.director.failed(trial_id, message, cause=cause, details=details, lost=lost))

    def _guarded(self, call: Callable[[], Answer]) -> Answer:
        try:
            with disk_full_explained(self.folder_of("")):
                return call()
        except Exception as error:
            raise _Stop(error) from error


class _AskDirector(Searcher):
    def __init__(self, bridge: _Bridge) -> None:
        super().__init__()
        self._bridge = bridge

    def suggest(self, trial_id: str) -> Any:
        return self._bridge.ask(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass  # the stopper and the callback have told the director already

    def save(self, checkpoint_path: str) -> None:
        pass  # the ledger is the state

    def restore(self, checkpoint_path: str) -> None:
        pass


class _TellDirector(tune.Stopper):
    """Ray asks its stopper after every result, the last one of a trial too, before anything else is done with it."""

    def __init__(self, bridge: _Bridge) -> None:
        self._bridge = bridge

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._bridge.tell(trial_id, result)

    def stop_all(self) -> bool:
        return False


class _Failures(tune.Callback):
    def __init__(self, bridge: _Bridge) -> None:
        self._bridge = bridge

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_info: Any) -> None:
        self._bridge.broke(trial.trial_id, _noted_error(trial))


def _noted_error(trial: Any) -> Exception | None:
    """Why a trial broke, from Ray Tune's own note; its `get_error` looks where that has not been copied to yet."""
    noted = trial.pickled_error_file
    if noted is None or not Path(noted).is_file():
        return None
    with Path(noted).open("rb") as file:
        error: Exception = cloudpickle.load(file)  # written by this very process
    return error
