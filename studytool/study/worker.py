"""What runs in a process of Ray's: one trial after another, an epoch at a time; what breaks is told, not raised."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Generator
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
from studytool.study.director import Cause
from studytool.study.nodes import this_node
from studytool.study.nodewatch import what_node_lacks
from studytool.study.storage import Storage, fresh_workplace
from studytool.training.memory import is_out_of_memory, processes_killed_for_memory

if TYPE_CHECKING:
    from studytool.training.kept import Kept

DISK_FULL = "disk"
_ASKED_AGAIN_SECONDS = 0.02


class Worker(tune.Trainable):
    """Walks `train_trial`, one epoch per step; reused for one trial after another."""

    _epochs: Generator[EpochResult, None, None] | None = None
    _workplace: Storage | None = None
    _kept: Kept | None = None
    _node_lacks = ""

    def setup(self, config: dict[str, Any]) -> None:
        """Import what trials need, and begin the first one, unless the process is only to be ready for one."""
        self.reset_config(config)
        # Every trial ends with a collection, which need not walk through all that is imported each time.
        gc.freeze()

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Begin another trial."""
        # A pruned trial stands at its last epoch and still holds its network.
        self.cleanup()
        if (self._kept is None and not self._made_ready(config)) or config["trial"] is None:
            return True
        from studytool.training.device import choose_device, choose_precision, describe_device
        from studytool.training.loop import train_trial
        from studytool.training.peak import peak_flops

        trial = TrialSpec.model_validate_json(config["trial"])
        side_by_side = config["side_by_side"]
        folder = Path(config["folder"])
        if config["storage"] is not None:
            self._workplace = fresh_workplace(config["storage"], trial.trial_id)
            folder = self._workplace.folder
        self._epochs = train_trial(trial, folder, trials_side_by_side=side_by_side, kept=self._kept)
        device = choose_device(None)
        peak = peak_flops(device, choose_precision(trial.train.precision, device))
        self._device = to_dict(replace(describe_device(device, side_by_side), peak_flops=peak))
        return True

    def _made_ready(self, config: dict[str, Any]) -> bool:
        """Look at the node, then import what trials need; whether they can run here."""
        # With other versions, or without the study's storage, what follows would be the trial's failure.
        self._node_lacks = what_node_lacks(config["needs"]) if config["needs"] else ""
        if self._node_lacks:
            return False
        import torch

        from studytool.training.kept import Kept
        from studytool.training.loop import import_backbone

        torch.set_num_threads(config["cpu"])
        for name in config["backbones"]:
            import_backbone(name)
        self._kept = Kept()
        return True

    def step(self) -> dict[str, Any]:
        """Train an epoch; without a trial, say that the process is ready for one."""
        from studytool.training.checkpoint import LAST
        from studytool.training.predictions import PREDICTIONS
        from studytool.training.trained import RECORD, WEIGHTS

        if self._node_lacks:
            return {**_told(self._node_lacks, Cause.NODE), "node": this_node(), "done": True}
        if self._epochs is None:
            time.sleep(_ASKED_AGAIN_SECONDS)
            return {"ready": True}
        try:
            result = next(self._epochs)
            if self._workplace is not None:
                # In the order in which they are written: a trial stopped in between goes on as from a disk.
                self._workplace.push(LAST, WEIGHTS, RECORD, PREDICTIONS)
        except Exception as error:
            self.cleanup()
            return {**_failure(error), "done": True}
        told = {"epoch_result": json.dumps(to_dict(result)), "device": self._device, "done": result.is_last}
        return {**told, "node": this_node(), "killed_for_memory": processes_killed_for_memory()}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Ray saves a trial that it stops; ours has its own checkpoint, so there is nothing to add."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """The trial has resumed from its own checkpoint already."""

    def cleanup(self) -> None:
        """Let go of the trial."""
        if self._epochs is not None:
            self._epochs.close()
        if self._workplace is not None:
            rmtree(self._workplace.folder, ignore_errors=True)
            self._workplace = None


def _failure(error: Exception) -> dict[str, str]:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, DiskFullError):
        cause = None
    elif is_out_of_memory(error):
        cause = Cause.MEMORY
    elif isinstance(error, StudytoolError):
        cause = Cause.TRIAL  # its own fault: trying again would end the same way
    else:
        cause, line = Cause.WORKER, f"{type(error).__name__}: {line}"
    return _told(line, cause, traceback.format_exc())


def _told(line: str, cause: Cause | None, details: str = "") -> dict[str, str]:
    return {"failure": line, "cause": cause.value if cause else DISK_FULL, "details": details}
