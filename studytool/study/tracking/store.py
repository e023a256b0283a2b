"""Where MLflow keeps its runs: the address in a study file made absolute, and an SQLite store created whole.

The schema is made under a temporary name while a file lock is held, so that any number of processes may start at once
and none finds half a store (MLflow alone fails there).
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from studytool.errors import StudytoolError
from studytool.files import whole_file
from studytool.spec import StudySpec
from studytool.study.tracking.outbox import Problem

REACH = "start the server, or set tracking.uri to sqlite:///mlflow.db"
_SERVERS = ("http", "https", "postgresql", "mysql", "mssql", "databricks")
_ADVICE = "write sqlite:///mlflow.db for a file, or http://HOST:PORT for a server"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's pages then show runs and metrics first, not traces and prompts."""
FOLDER_TAG = "studytool.folder"
"""The tag of an experiment that names its study's folder on the machine of its driver."""
_NOT_OF_THE_STORE = (AssertionError, AttributeError, LookupError, NameError, TypeError)


def absolute_uri(uri: str) -> str:
    """`uri` with an SQLite path made absolute against the current folder; servers pass as they are.

    Raises:
        StudytoolError: a folder, an SQLite database in memory, or a scheme that MLflow has no store for.
    """
    match = re.match(r"([a-z]+)(\+[a-z0-9_]+)?:(//)?", uri)
    scheme = match[1] if match else ""
    if scheme in _SERVERS:
        return uri
    if scheme != "sqlite":
        what = "a folder of files, which MLflow no longer takes" if scheme in ("", "file") else f"of kind {scheme!r}"
        raise StudytoolError(f"tracking.uri: {uri!r} is {what}; {_ADVICE}")
    name = uri.removeprefix("sqlite:///")
    if name == uri or name in ("", ":memory:"):
        raise StudytoolError(f"tracking.uri: {uri!r} names no file; {_ADVICE}")
    path = Path(os.path.abspath(Path(name).expanduser()))  # noqa: PTH100 - resolve() would follow links
    if "?" in str(path):
        raise StudytoolError(f"tracking.uri: {uri!r}: MLflow cannot take a path with a question mark; {_ADVICE}")
    return f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """The database file of an absolute SQLite address; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def open_client(uri: str) -> Any:
    """MLflow's client for an absolute address; an SQLite store is created, private, if it is not there.

    Raises:
        StudytoolError: something else is in the store's place, or it is of another MLflow version.
    """
    quiet_mlflow()
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    with explained(uri):
        if path is not None:
            private_folder(path.parent)
            with _one_process_at_a_time(path):
                _create_sqlite_store(path)
        return MlflowClient(tracking_uri=uri)


def open_experiment(client: Any, uri: str, spec: StudySpec, warn: Callable[[str], None]) -> str:
    """The id of the experiment named as the study: made, with artifacts in the study's folder, or restored."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(spec.name)
    if experiment is None:
        location = None
        if not uri.startswith(("http:", "https:", "databricks")):  # such a server keeps artifacts itself
            folder = spec.folder.absolute() / "mlflow"
            private_folder(folder)
            location = folder.as_uri()
        try:
            tags = {**_EXPERIMENT_TAGS, FOLDER_TAG: str(spec.folder.absolute())}
            return str(client.create_experiment(spec.name, artifact_location=location, tags=tags))
        except MlflowException as error:
            experiment = client.get_experiment_by_name(spec.name)  # another driver may have been first
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
        warn(f"MLflow: the experiment {spec.name!r} was deleted; it is restored")
    if experiment.tags.get(FOLDER_TAG) != str(spec.folder.absolute()):
        client.set_experiment_tag(experiment.experiment_id, FOLDER_TAG, str(spec.folder.absolute()))
    return str(experiment.experiment_id)


def judge(client: Any, error: Exception) -> Problem | None:
    """What an exception of a call to the store means; None for a defect of the program."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, _NOT_OF_THE_STORE):
        return None
    if isinstance(error, StudytoolError | FileNotFoundError | PermissionError):
        return Problem.WRONG
    # MLflow's own exception hides that of the connection.
    causes = (error, error.__context__)
    if any(isinstance(cause, requests.ConnectionError | requests.Timeout) for cause in causes):
        return Problem.AWAY
    if isinstance(error, MlflowException):
        if error.error_code in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"):
            return Problem.AWAY
        if error.error_code != "INTERNAL_ERROR":
            return Problem.WRONG
    try:
        client.search_experiments(max_results=1)
    except (MlflowException, OSError):
        return Problem.AWAY
    return Problem.DOUBTFUL


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what MLflow and the file system raise into one line for the user."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, OSError, SQLAlchemyError) as error:
        text = str(error).strip().split("\n", 1)[0]
        if "out-of-date database schema" in text:
            text = (
                "its tables are of another MLflow version; make a copy, then run `mlflow db upgrade` with this address"
            )
        elif isinstance(error, MlflowException) and uri.startswith("http"):
            text = f"{text}; {REACH}"
        raise StudytoolError(f"tracking.uri: MLflow at {uri}: {text}") from error


def private_folder(path: Path) -> None:
    """Make a folder and the missing ones above it with mode 0700; existing ones are left as they are."""
    for folder in reversed([path, *path.parents]):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)


def _create_sqlite_store(path: Path) -> None:
    if path.is_dir():
        raise StudytoolError(f"tracking.uri: {path} is a folder; name a file in it, such as sqlite:///{path}/mlflow.db")
    if not path.exists() or path.stat().st_size == 0:
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        with whole_file(path) as temporary:
            SqlAlchemyStore(f"sqlite:///{temporary}", str(path.parent / "mlruns")).engine.dispose()
        path.chmod(0o600)
    try:
        # Not read-only: what a killed process had written by half is taken back by whoever reads next.
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=_LOCKED_SECONDS)) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:  # MLflow would try for two minutes, then fail with the same
        raise StudytoolError(
            f"tracking.uri: {path} cannot be read as an SQLite database ({error}); move it away, or name another file"
        ) from error


_LOCKED_SECONDS = 60.0
"""Longer than any other study or the UI writes at a time."""


@contextmanager
def _one_process_at_a_time(path: Path) -> Iterator[None]:
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def quiet_mlflow() -> None:
    """No telemetry, no log lines or addresses on the terminal; no long retries either, the outbox has its own."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    if os.environ["MLFLOW_LOGGING_LEVEL"] == "CRITICAL":
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # for an MLflow that was imported before
    for name in ("alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
