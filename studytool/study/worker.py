"""What runs in a process of Ray's: one trial after another, an epoch at a time; what breaks is told, not raised."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from studytool.study import rayenvironment  # noqa: F401 - first of all, since Ray reads it as it is imported

# isort: split
from ray import tune

from studytool.errors import DiskFullError, StudytoolError
from studytool.results import EpochResult, to_dict
from studytool.spec import TrialSpec
from studytool.study.events import Cause
from studytool.study.nodes import this_node
from studytool.study.nodewatch import what_node_lacks
from studytool.study.storage import Storage, fresh_workplace
from studytool.training.memory import is_out_of_memory, processes_killed_for_memory

if TYPE_CHECKING:
    from studytool.training.kept import Kept
    from studytool.training.together import Step

DISK_FULL = "disk"
_ASKED_AGAIN_SECONDS = 0.02


class Worker(tune.Trainable):
    """Walks `train_trial` or `train_together`, one epoch per step; reused for one trial after another."""

    _steps: Generator[Step, None, None] | None = None
    _workplaces: tuple[Storage, ...] = ()
    _kept: Kept | None = None
    _node_lacks = ""

    def setup(self, config: dict[str, Any]) -> None:
        """Import what trials need, and begin the first one, unless the process is only to be ready for one."""
        self.reset_config(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Begin another trial."""
        # A pruned trial stands at its last epoch and still holds its network.
        self.cleanup()
        kept = self._kept = self._kept or self._made_ready(config)
        if kept is None or config["trials"] is None:
            return True
        from studytool.training.device import choose_device, choose_precision, describe_device
        from studytool.training.peak import peak_flops

        trials = [TrialSpec.model_validate_json(trial) for trial in config["trials"]]
        side_by_side = config["side_by_side"]
        folders = [Path(folder) for folder in config["folders"]]
        if config["storage"] is not None:
            self._workplaces = tuple(fresh_workplace(config["storage"], trial.trial_id) for trial in trials)
            folders = [workplace.folder for workplace in self._workplaces]
        self._steps = _steps(trials, folders, side_by_side, kept, self._push_state)
        device = choose_device(None)
        peak = peak_flops(device, choose_precision(trials[0].train.precision, device))
        self._device = to_dict(replace(describe_device(device, side_by_side), peak_flops=peak))
        return True

    def _made_ready(self, config: dict[str, Any]) -> Kept | None:
        """Look at the node, then import what trials need; None if they cannot run here."""
        # With other versions, or without the study's storage, what follows would be the trial's failure.
        self._node_lacks = what_node_lacks(config["needs"]) if config["needs"] else ""
        if self._node_lacks:
            return None
        import torch

        from studytool.training import loop, together  # noqa: F401 - with all that they import
        from studytool.training.kept import Kept
        from studytool.training.network import import_backbone

        torch.set_num_threads(config["cpu"])
        for name in config["backbones"]:
            import_backbone(name)
        # Every trial ends with a collection, which need not walk through all that was imported here.
        gc.freeze()
        return Kept()

    def step(self) -> dict[str, Any]:
        """Train an epoch; without a trial, say that the process is ready for one."""
        from studytool.training.checkpoint import LAST
        from studytool.training.device import choose_device, release_memory
        from studytool.training.predictions import PREDICTIONS
        from studytool.training.trained import RECORD, WEIGHTS

        if self._node_lacks:
            return {**_told(self._node_lacks, Cause.NODE), "node": this_node(), "done": True}
        if self._steps is None:
            time.sleep(_ASKED_AGAIN_SECONDS)
            return {"ready": True}
        begun = time.perf_counter()
        broken: dict[str, Any] | None = None
        try:
            step = next(self._steps)
            # In the order in which they are written: a trial stopped in between goes on as from a disk.
            has_ended = any(isinstance(result, EpochResult) and result.is_last for result in step.values())
            written = (WEIGHTS, PREDICTIONS, RECORD, LAST) if has_ended else (LAST,)
            for workplace in self._workplaces:
                workplace.push(*written)
        except Exception as error:
            broken = _failure(error)
        device_seconds = (time.perf_counter() - begun) / self._device["trials_side_by_side"]
        if broken is not None:
            # Not before the error is gone, whose traceback holds the network.
            self.cleanup()
            release_memory(choose_device(None))
            return {**broken, "device_seconds": device_seconds, "done": True}
        results = {trial_id: to_dict(result) for trial_id, result in step.items() if isinstance(result, EpochResult)}
        failures = {
            trial_id: {**_failure(error), "device_seconds": device_seconds / len(step)}
            for trial_id, error in step.items()
            if isinstance(error, Exception)
        }
        return {
            "results": json.dumps(results),
            "failures": json.dumps(failures),
            "device": self._device,
            "node": this_node(),
            "killed_for_memory": processes_killed_for_memory(),
            "done": all(result["is_last"] for result in results.values()),
        }

    def _push_state(self) -> None:
        from studytool.training.checkpoint import LAST

        for workplace in self._workplaces:
            workplace.push(LAST)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Ray saves a trial that it stops; ours has its own checkpoint, so there is nothing to add."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """The trial has resumed from its own checkpoint already."""

    def cleanup(self) -> None:
        """Let go of the trial."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None  # Ray Tune may have the process be ready for another trial before there is one
        for workplace in self._workplaces:
            rmtree(workplace.folder, ignore_errors=True)
        self._workplaces = ()


def _steps(
    trials: Sequence[TrialSpec], folders: Sequence[Path], side_by_side: int, kept: Kept, on_saved: Callable[[], None]
) -> Generator[Step, None, None]:
    """The epochs of one trial, or of several that are trained together."""
    from studytool.training.loop import train_trial
    from studytool.training.together import train_together

    if len(trials) > 1:
        yield from train_together(trials, folders, trials_side_by_side=side_by_side, kept=kept)
        return
    one = train_trial(trials[0], folders[0], trials_side_by_side=side_by_side, kept=kept, on_saved=on_saved)
    with closing(one) as epochs:
        for result in epochs:
            yield {trials[0].trial_id: result}


def _failure(error: Exception) -> dict[str, Any]:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, DiskFullError):
        cause = None
    elif is_out_of_memory(error):
        cause = Cause.MEMORY
    elif isinstance(error, StudytoolError):
        cause = Cause.TRIAL  # its own fault: trying again would end the same way
    else:
        cause, line = Cause.WORKER, f"{type(error).__name__}: {line}"
    return _told(line, cause, "".join(traceback.format_exception(error)))


def _told(line: str, cause: Cause | None, details: str = "") -> dict[str, Any]:
    return {"failure": line, "cause": cause.value if cause else DISK_FULL, "details": details, "device_seconds": 0.0}
