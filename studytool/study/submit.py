"""Sending a study to a Ray cluster as a job, which outlives the terminal, and reading what jobs and trials say."""

from __future__ import annotations

import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from studytool.errors import StudytoolError
from studytool.remote import is_remote
from studytool.spec import StudySpec, load_study
from studytool.study.nodes import job_client
from studytool.study.observers import LOG
from studytool.study.records import read_records

_POLL_SECONDS = 2.0
_PATIENCE_SECONDS = 60.0
# Ray removes the folder that the study file travels in as soon as the trials are over, and the driver is not done then.
_ELSEWHERE = 'folder="$(mktemp -d)" && cp {study} "$folder" && cd "$folder" && exec '
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def submit_study(study: Path, overrides: Sequence[str], *, address: str) -> str:
    """Have the cluster whose dashboard is at `address` (http://HOST:PORT) run a study; the id of the job.

    The study file and the overrides travel; data, weights and modules of the user's own have to be there.

    Raises:
        StudytoolError: the study file is wrong, a path means nothing there, or the cluster does not answer.
    """
    spec = load_study(study, overrides)
    _refuse_relative_paths(spec)
    job = f"{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    words = ["studytool", "run", study.name, "--address", "auto", *(w for text in overrides for w in ("--set", text))]
    with tempfile.TemporaryDirectory(prefix="submit-") as folder:
        shutil.copyfile(study, Path(folder) / study.name)
        with job_client(address) as client:
            _when_ready(
                lambda: client.submit_job(
                    entrypoint=_ELSEWHERE.format(study=shlex.quote(study.name)) + shlex.join(words),
                    submission_id=job,
                    runtime_env={"working_dir": folder},
                )
            )
    return job


def job_log(job: str, *, address: str, follow: bool = False) -> Iterator[str]:
    """What a job has printed, in pieces; with `follow` until it ends.

    Raises:
        StudytoolError: there is no such job, the cluster does not answer, or the job that is followed failed.
    """
    shown = 0
    with job_client(address) as client:
        while True:
            status = str(client.get_job_status(job).value)
            text = client.get_job_logs(job)
            yield text[shown:]
            shown = len(text)
            if not follow or status in _ENDED:
                break
            time.sleep(_POLL_SECONDS)
    if follow and status != "SUCCEEDED":
        raise StudytoolError(
            f"job {job}: {status.lower()}; the same `studytool submit` goes on where the study stopped"
        )


def newest_job(study: str, *, address: str) -> str:
    """The id of the last job of a study, by the study's name, or of the job of that id.

    Raises:
        StudytoolError: there is none, or the cluster does not answer.
    """
    with job_client(address) as client:
        jobs = [job for job in client.list_jobs() if job.submission_id]
    found = [job for job in jobs if job.submission_id == study or job.submission_id.rsplit("-", 3)[0] == study]
    if not found:
        known = ", ".join(sorted(job.submission_id for job in jobs)) or "none"
        raise StudytoolError(f"{study}: no job of that id or study at {address}; there are: {known}")
    return str(max(found, key=lambda job: job.start_time or 0).submission_id)


def trial_logs(spec: StudySpec, *, lines: int) -> Iterator[str]:
    """The last lines of the logs of the trials that run or have failed; of the one that ended last, if there are none.

    Raises:
        StudytoolError: no trial has begun.
    """
    records = [
        record for record in read_records(spec.folder) if (spec.folder / "trials" / record.trial_id / LOG).is_file()
    ]
    if not records:
        raise StudytoolError(f"{spec.storage_address or spec.folder}: no trial has begun there")
    logs = {record.trial_id: spec.folder / "trials" / record.trial_id / LOG for record in records}
    wanted = [record.trial_id for record in records if record.outcome is None or record.outcome == "FAILED"]
    for trial_id in wanted or [max(logs, key=lambda name: logs[name].stat().st_mtime)]:
        yield f"== {trial_id}"
        yield from logs[trial_id].read_text(encoding="utf-8").splitlines()[-lines:]


def _when_ready(submit: Callable[[], object]) -> None:
    """A cluster that has just come up answers before it can take a job."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            submit()
            return
        except RuntimeError as error:
            if "try again later" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)


def _refuse_relative_paths(spec: StudySpec) -> None:
    """A job works in a folder of its own, which goes when it is done."""
    sqlite = spec.tracking.uri.removeprefix("sqlite:///") if spec.tracking.uri.startswith("sqlite:///") else "/"
    for key, path in {"data.path": spec.data.path, "output": spec.output, "tracking.uri": sqlite}.items():
        if not is_remote(path) and not Path(path).is_absolute():
            instead = "http://127.0.0.1:5000" if key == "tracking.uri" else "s3://BUCKET/…"
            raise StudytoolError(
                f"{key}: {path!r} is a relative path, and the job works in a folder of its own; give a full path or an "
                f"address, as --set {key}={instead}"
            )
