"""What runs in a process of Ray's: one trial after another, an epoch at a time; what breaks is told, not raised."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from shutil import rmtree
from typing import Any

from studytool.study import rayenvironment  # noqa: F401 - first of all, since Ray reads it as it is imported

# isort: split
from ray import tune

from studytool.errors import DiskFullError, StudytoolError
from studytool.results import EpochResult, to_dict
from studytool.spec import TrialSpec
from studytool.study.director import Cause
from studytool.study.storage import Storage, fresh_workplace
from studytool.training.memory import is_out_of_memory

DISK_FULL = "disk"
_ASKED_AGAIN_SECONDS = 0.02


class Worker(tune.Trainable):
    """Walks `train_trial`, one epoch per step; reused for one trial after another."""

    _epochs: Generator[EpochResult, None, None] | None = None
    _workplace: Storage | None = None

    def setup(self, config: dict[str, Any]) -> None:
        """Import what trials need, and begin the first one, unless the process is only to be ready for one."""
        import torch

        from studytool.training.kept import Kept
        from studytool.training.loop import import_backbone

        torch.set_num_threads(config["cpu"])
        self._kept = Kept()
        if config["trial"] is None:
            for name in config["backbones"]:
                import_backbone(name)
        else:
            self.reset_config(config)
        # Every trial ends with a collection, which need not walk through all that is imported each time.
        gc.freeze()

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Begin another trial."""
        from studytool.training.device import choose_device, describe_device
        from studytool.training.loop import train_trial

        # A pruned trial stands at its last epoch and still holds its network.
        self.cleanup()
        trial = TrialSpec.model_validate_json(config["trial"])
        side_by_side = config["side_by_side"]
        folder = Path(config["folder"])
        if config["storage"] is not None:
            self._workplace = fresh_workplace(config["storage"], trial.trial_id)
            folder = self._workplace.folder
        self._epochs = train_trial(trial, folder, trials_side_by_side=side_by_side, kept=self._kept)
        self._device = to_dict(describe_device(choose_device(None), side_by_side))
        return True

    def step(self) -> dict[str, Any]:
        """Train an epoch; without a trial, say that the process is ready for one."""
        from studytool.training.checkpoint import LAST
        from studytool.training.predictions import PREDICTIONS
        from studytool.training.trained import RECORD, WEIGHTS

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
        return {"epoch_result": json.dumps(to_dict(result)), "device": self._device, "done": result.is_last}

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
    return {"failure": line, "cause": cause.value if cause else DISK_FULL, "details": traceback.format_exc()}
