"""What a worker process does, without Ray: the epochs of one trial, or of several that are trained together."""

from __future__ import annotations

import json
import traceback
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from studytool.errors import DiskFullError, StudytoolError
from studytool.results import EpochResult, to_dict
from studytool.spec import TrialSpec
from studytool.study.events import Cause
from studytool.study.storage import Storage, fresh_workplace
from studytool.training.memory import is_out_of_memory

if TYPE_CHECKING:
    from studytool.training.together import Step

DISK_FULL = "disk"
"""What `Walk.step` gives as the cause, besides those of the director, where the study itself cannot go on."""


class Walk:
    """Trials (as JSON) on their way in `folders`, or in working copies of what they have at a `storage` address."""

    def __init__(self, trials: Sequence[str], folders: Sequence[str], storage: str | None, side_by_side: int) -> None:
        from studytool.training.device import choose_device, describe_device

        specs = [TrialSpec.model_validate_json(trial) for trial in trials]
        self._workplaces: tuple[Storage, ...] = ()
        places = [Path(folder) for folder in folders]
        if storage is not None:
            self._workplaces = tuple(fresh_workplace(storage, spec.trial_id) for spec in specs)
            places = [workplace.folder for workplace in self._workplaces]
        self._steps = _steps(specs, places, side_by_side)
        self._device = to_dict(describe_device(choose_device(None), side_by_side))

    def step(self) -> dict[str, Any]:
        """The next epoch: `results` and `failures` by trial id, as JSON, or the `failure` of all; and `done`."""
        from studytool.training.checkpoint import LAST
        from studytool.training.predictions import PREDICTIONS
        from studytool.training.trained import RECORD, WEIGHTS

        try:
            step = next(self._steps)
            for workplace in self._workplaces:
                # In the order in which they are written: a trial stopped in between goes on as from a disk.
                workplace.push(LAST, WEIGHTS, RECORD, PREDICTIONS)
        except Exception as error:
            self.close()
            return {**_failure(error), "done": True}
        results = {trial_id: to_dict(result) for trial_id, result in step.items() if isinstance(result, EpochResult)}
        failures = {trial_id: _failure(error) for trial_id, error in step.items() if isinstance(error, Exception)}
        return {
            "results": json.dumps(results),
            "failures": json.dumps(failures),
            "device": self._device,
            "done": all(result["is_last"] for result in results.values()),
        }

    def close(self) -> None:
        """Leave nothing in memory, nor of the working copies."""
        self._steps.close()
        for workplace in self._workplaces:
            rmtree(workplace.folder, ignore_errors=True)


def _steps(trials: Sequence[TrialSpec], folders: Sequence[Path], side_by_side: int) -> Generator[Step, None, None]:
    """The epochs of one trial, or of several that are trained together."""
    from studytool.training.loop import train_trial
    from studytool.training.together import train_together

    if len(trials) > 1:
        yield from train_together(trials, folders, trials_side_by_side=side_by_side)
        return
    with closing(train_trial(trials[0], folders[0], trials_side_by_side=side_by_side)) as epochs:
        for result in epochs:
            yield {trials[0].trial_id: result}


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
    details = "".join(traceback.format_exception(error))
    return {"failure": line, "cause": cause.value if cause else DISK_FULL, "details": details}
