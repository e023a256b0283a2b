"""What the driver of a study tells MLflow. Nothing here waits for the store, but the start of the study.

Only the driver process writes, through an outbox with one thread, so that training never waits and a server that is
away for a while misses nothing.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from studytool.errors import StudytoolError
from studytool.results import EpochResult, TrialRecord
from studytool.spec import StudySpec, TrialSpec
from studytool.study.tracking import store
from studytool.study.tracking.outbox import Outbox
from studytool.study.tracking.writer import Writer

if TYPE_CHECKING:
    from studytool.report.compare import ArmSummary

START_SECONDS = 60.0
CLOSE_SECONDS = 60.0
CLOSE_SECONDS_IF_INTERRUPTED = 6.0
"""After a signal the program has to be gone soon; what the store then lacks is filled in at the next start."""


class Tracker:
    """Writes one study to MLflow; as a context manager it ends in `close`, after an error in `interrupt` first.

    Every `run` is the run id that `run_id` gives or the trial's own id. `uid` tells studies of one name in one
    store apart, so that a study begun anew does not continue the runs of a deleted one. `warn` gets one line when
    something cannot be written (stderr by default).

    Raises:
        StudytoolError: the address is no store, or the store cannot be opened.
    """

    def __init__(
        self, uri: str, spec: StudySpec, *, uid: str | None = None, warn: Callable[[str], None] | None = None
    ) -> None:
        self._warn = warn if warn is not None else _to_stderr
        self.uri = store.absolute_uri(uri)
        self._folder = spec.folder
        client = store.open_client(self.uri)
        with store.explained(self.uri):
            self.experiment_id = store.open_experiment(client, self.uri, spec, self._warn)
        self._writer = Writer(client, self.uri, self.experiment_id, spec, uid)
        self._outbox = Outbox(partial(store.judge, client), self._warn)
        self._close_seconds = CLOSE_SECONDS
        self._opened: dict[str, Future[str]] = {}
        self._left_out: set[str] = set()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.interrupt()
        self.close()

    @property
    def how_to_look(self) -> str:
        """The command or the address that shows the study's runs in a browser."""
        if store.sqlite_path(self.uri) is None:
            return f"{self.uri.rstrip('/')}/#/experiments/{self.experiment_id}"
        return f"studytool ui {shlex.quote(str(self._folder))}"

    def open_study(self, yaml_text: str, environment: Mapping[str, str], manifest_path: Path) -> str:
        """Begin the study's run or take it up, with study file, environment and dataset manifest; its run id.

        Runs that an earlier driver left RUNNING are marked INTERRUPTED.

        Raises:
            StudytoolError: the store refuses or does not answer, or the manifest cannot be read.
        """
        classes = _classes(manifest_path)
        begin = partial(self._writer.open_study, yaml_text, dict(environment), manifest_path, classes, _now())
        with store.explained(self.uri):
            run_id: str | None = self._outbox.ask("the study", begin, timeout_seconds=START_SECONDS)
        if run_id is None:
            raise StudytoolError(f"tracking.uri: MLflow at {self.uri} does not answer; {store.REACH}")
        return run_id

    def catch_up(self, records: Sequence[TrialRecord]) -> None:
        """Fill in what a killed driver or an outage kept from the store: the ledger's records, after `open_study`."""
        for record in records:
            self._outbox.put(record.trial_id, partial(self._writer.catch_up, record, _now()))

    def open_trial(self, trial: TrialSpec, config_hash: str) -> None:
        """Begin a trial's run below its arm's, or take it up; the store's answer is not waited for."""
        values = {**trial.parameters, "seed": trial.seed, "phase": trial.phase, "arm": trial.arm}
        begin = partial(self._writer.open_trial, trial.trial_id, values, config_hash, _now())
        self._left_out.discard(trial.trial_id)
        self._opened[trial.trial_id] = self._outbox.promise(trial.trial_id, begin)

    def run_id(self, trial_id: str, *, timeout_seconds: float = 0.0) -> str | None:
        """The id of a trial's run; None while it is not known, since the store has not answered yet.

        Raises:
            StudytoolError: the run exists with another value of a parameter.
        """
        opened = self._opened.get(trial_id)
        if opened is None:
            return self._writer.run_id(trial_id)
        if not wait([opened], timeout_seconds).done:
            return None
        error = opened.exception()
        if error is None:
            return opened.result()
        if isinstance(error, StudytoolError):
            raise error
        del self._opened[trial_id]
        self._leave_out(trial_id, error)
        return None

    def _leave_out(self, trial_id: str, error: BaseException) -> None:
        """The store refuses a trial's run: as with any other record, the study goes on and fills it in another time."""
        if not self._left_out:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warn(f"MLflow at {self.uri} refuses the run of {trial_id} ({line[:300]}); the study goes on without")
        self._left_out.add(trial_id)

    def log_epoch(self, run: str, result: EpochResult) -> None:
        """One point of every curve, unless the store has this epoch already; NaN and infinity are left out."""
        if run in self._left_out:
            return
        send = partial(self._writer.log_epochs, run, (result,), _now())
        self._outbox.put(f"{run}, epoch {result.epoch}", send, can_be_filled_in=True)

    def close_trial(self, run: str, record: TrialRecord) -> None:
        """End a trial's run: missing epochs, final scores, outcome and, for a confirm trial, its confusion matrix."""
        self._opened.pop(record.trial_id, None)
        if record.trial_id in self._left_out:
            return
        self._outbox.put(record.trial_id, partial(self._writer.close_trial, run, record, _now()))

    def log_file(self, run: str, path: Path) -> None:
        """Upload a file, such as the log of a trial that failed."""
        self._outbox.put(f"{run}, {path.name}", partial(self._writer.log_file, run, path))

    def log_checkpoint(self, run: str, folder: Path) -> None:
        """Upload the best weights and what is said of them: `best.safetensors` and `best.json` of `folder`."""
        self._outbox.put(f"{run}, checkpoint", partial(self._writer.log_checkpoint, run, folder))

    def close_arm(self, summary: ArmSummary) -> None:
        """End an arm's run with the arm's means, or bring them up to date."""
        self._outbox.put(summary.arm, partial(self._writer.close_arm, summary, _now()))

    def close_study(self, text_table: str, outcome: Literal["COMPLETE", "FAILED", "INTERRUPTED"]) -> None:
        """End the study's run with its comparison table."""
        self._outbox.put("the study's end", partial(self._writer.close_study, text_table, outcome, _now()))

    def log_report(self, files: Sequence[Path]) -> None:
        """Upload the report of the study and its tables as artifacts of the study's run."""
        self._outbox.put("the report", partial(self._writer.log_report, files))

    def interrupt(self) -> None:
        """Mark everything that is still RUNNING as INTERRUPTED, after what is queued already; the end is near."""
        self._close_seconds = CLOSE_SECONDS_IF_INTERRUPTED
        self._outbox.put("the interruption", partial(self._writer.stop_all, _now()))

    def close(self, timeout_seconds: float | None = None) -> None:
        """Write what still waits, for at most so long; what is left is said in one warning."""
        left = self._outbox.close(self._close_seconds if timeout_seconds is None else timeout_seconds)
        left += len(self._left_out)
        if left:
            self._warn(f"MLflow at {self.uri} lacks {left} records; `studytool run` of the same study fills them in")


def _classes(manifest_path: Path) -> tuple[str, ...]:
    try:
        return tuple(json.loads(manifest_path.read_text(encoding="utf-8"))["classes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudytoolError(f"{manifest_path}: no dataset manifest with classes ({error})") from error


def _now() -> int:
    """Milliseconds since 1970, as MLflow counts: when it happened, not when it could be written."""
    return time.time_ns() // 1_000_000


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
