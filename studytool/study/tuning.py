"""Running a study's trials through Ray Tune: the only module that imports Ray.

Ray Tune starts, feeds and restarts the workers; it decides nothing. Its searcher asks the director for the next trial,
its stopper hands every epoch to the director, its callback tells of failures. Ray's own state on disk is disposable:
trials resume from their own checkpoints, studies from the ledger.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read by Ray when it is imported: no telemetry, no folder change under a trial, no loggers of its own, no shipping of
# the working folder, one line per problem.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

import ray
from ray import tune
from ray.tune.search import Searcher

from studytool.errors import StudytoolError
from studytool.results import DeviceInfo, EpochResult, epoch_from_dict, to_dict
from studytool.settings import ResourceSettings
from studytool.spec import TrialSpec
from studytool.study.director import Director

RETRIES = 2
"""How often a trial is begun again from its last checkpoint after its worker died or raised."""


@dataclass(frozen=True)
class Slots:
    """How many trials run side by side, and what each holds (CPU cores; GPUs or a share of one)."""

    count: int
    cpu: int
    gpu: float


@contextmanager
def ray_session() -> Iterator[None]:
    """A Ray of our own on this machine, ended and cleaned up afterwards; no cluster is joined."""
    # Ray puts sockets below this folder and allows their paths 107 characters, so it has to be short; it is private.
    folder = Path(tempfile.mkdtemp(prefix="studytool-"))
    try:
        ray.init(
            address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=str(folder)
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def plan_slots(resources: ResourceSettings) -> Slots:
    """What the study's resources mean on the running Ray: "auto" is one GPU a trial where there are any, else one core.

    Raises:
        StudytoolError: a trial asks for more than there is.
    """
    available = ray.cluster_resources()
    cores, gpus = int(available["CPU"]), available.get("GPU", 0.0)
    gpu = (1.0 if gpus else 0.0) if resources.gpu == "auto" else float(resources.gpu)
    if gpu > gpus:
        raise StudytoolError(
            f"resources.gpu: a trial asks for {gpu:g} GPUs, this machine has {gpus:g}; set it to 0 or auto"
        )
    by_gpu = int(gpus / gpu + 1e-9) if gpu else cores
    cpu = max(1, cores // by_gpu) if resources.cpu == "auto" else resources.cpu
    if cpu > cores:
        raise StudytoolError(f"resources.cpu: a trial asks for {cpu} cores, this machine has {cores}")
    most = max(1, min(by_gpu, cores // cpu))
    count = most if resources.trials_at_once == "auto" else min(most, resources.trials_at_once)
    return Slots(count=count, cpu=cpu, gpu=gpu)


def run_trials(director: Director, folder_of: Callable[[str], Path], slots: Slots) -> str | None:
    """Run the director's trials until none is left; the name of the signal that ended it early, or None.

    Args:
        director: decides; see `studytool.study.director`.
        folder_of: a function from trial id to the folder the trial works in.
        slots: how many trials at once, and what each holds.
    """
    if director.finished:
        return None
    # The director's observers say what happens, once; Ray's own messages would say it again, with tracebacks.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    bridge = _Bridge(director, folder_of, slots)
    scratch = Path(tempfile.mkdtemp(prefix="studytool-tune-"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        tune.Tuner(
            tune.with_resources(_Worker, {"cpu": slots.cpu, "gpu": slots.gpu}),
            tune_config=tune.TuneConfig(search_alg=_AskDirector(bridge), num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name="study",
                storage_path=str(scratch),
                stop=_TellDirector(bridge),
                callbacks=[_Failures(bridge)],
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
        return bridge.signals.caught
    finally:
        bridge.signals.restore(handlers)
        shutil.rmtree(scratch, ignore_errors=True)


class _Worker(tune.Trainable):
    """Walks `train_trial` in a worker process, one epoch per step; reused for one trial after another."""

    _epochs: Generator[EpochResult, None, None] | None = None

    def setup(self, config: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(config["cpu"])
        self.reset_config(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        from studytool.training.device import choose_device, describe_device
        from studytool.training.loop import train_trial

        # A pruned trial stands at its last epoch and still holds its network.
        self.cleanup()
        trial = TrialSpec.model_validate_json(config["trial"])
        side_by_side = config["side_by_side"]
        self._epochs = train_trial(trial, Path(config["folder"]), trials_side_by_side=side_by_side)
        self._device = to_dict(describe_device(choose_device(None), side_by_side))
        return True

    def step(self) -> dict[str, Any]:
        assert self._epochs is not None
        try:
            result = next(self._epochs)
        except StudytoolError as error:
            # The trial's own fault: trying again would end the same way.
            return {"failure": str(error), "done": True}
        return {"epoch_result": json.dumps(to_dict(result)), "device": self._device, "done": result.is_last}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Ray saves a trial that it stops; ours has its own checkpoint, so there is nothing to add."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """The trial has resumed from its own checkpoint already."""

    def cleanup(self) -> None:
        if self._epochs is not None:
            self._epochs.close()


class _Bridge:
    """What the three hooks of Ray Tune share: the director, and which Ray trial is which of ours."""

    def __init__(self, director: Director, folder_of: Callable[[str], Path], slots: Slots) -> None:
        self.director = director
        self.folder_of = folder_of
        self.slots = slots
        self.ids: dict[str, str] = {}
        self.signals = _Signals()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Bridge:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray pickles its searcher and stopper with its own state, which nothing reads again.
        return (object, ())

    def ask(self, ray_id: str) -> dict[str, Any] | str | None:
        self.signals.watch()
        if self.director.finished:
            return str(Searcher.FINISHED)
        if len(self.director.running) >= self.slots.count:
            return None
        trial = self.director.next_trial()
        if trial is None:
            return None
        self.ids[ray_id] = trial.trial_id
        return {
            "trial": trial.model_dump_json(),
            "folder": str(self.folder_of(trial.trial_id)),
            "cpu": self.slots.cpu,
            # A whole GPU of its own is shared with nobody; cores of one machine share its memory and clock.
            "side_by_side": 1 if self.slots.gpu >= 1 else self.slots.count,
        }

    def tell(self, ray_id: str, result: dict[str, Any]) -> bool:
        trial_id = self.ids[ray_id]
        if "failure" in result:
            self.director.failed(trial_id, result["failure"])
            return True
        epoch: EpochResult = epoch_from_dict(json.loads(result["epoch_result"]))
        return self.director.epoch(trial_id, epoch, DeviceInfo(**result["device"]))


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
        lines = str(trial.get_error() or "the worker ended without a word").strip().splitlines()
        self._bridge.director.failed(self._bridge.ids[trial.trial_id], lines[-1].strip())

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_info: Any) -> None:
        self._bridge.director.retried(self._bridge.ids[trial.trial_id])


class _Signals:
    """Which signal ended the run: after SIGINT Ray Tune returns from `fit`; SIGTERM and SIGUSR1 do the same here.

    Tune puts its own handlers in place when `fit` begins, so ours are put before them from inside the run.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self._previous: dict[int, Any] = {}

    def watch(self) -> None:
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        end_the_run = signal.getsignal(signal.SIGINT)

        def note(number: int, frame: Any) -> None:
            self.caught = signal.Signals(number).name
            # The next signal stops at once.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if callable(end_the_run):
                end_the_run(number, frame)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, note)

    def restore(self, handlers: Mapping[signal.Signals, Any]) -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)
