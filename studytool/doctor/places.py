"""Looking at what a study needs beside the machine: its data, a place for its results, MLflow, weights."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from studytool.doctor.finding import CLOCK_TOLERANCE_SECONDS, Finding, first_line, room_finding
from studytool.errors import StudytoolError
from studytool.remote import is_remote, open_remote


def look_at_data(address: str | None, *, can_be_made: bool) -> Iterable[Finding]:
    """Whether the dataset can be read, or made."""
    if address is None:
        return
    found = None
    try:
        if is_remote(address):
            open_remote(address).size("manifest.json")
            found = f"{address}: can be read"
        elif (Path(address).expanduser() / "manifest.json").is_file():
            found = f"{address}: is here"
    except StudytoolError as error:
        yield Finding("fail", "data", str(error), "is the address right, and are its keys in the environment?")
        return
    if found:
        yield Finding("ok", "data", found)
    elif can_be_made and not is_remote(address):
        yield Finding("ok", "data", f"{address}: is not here yet; the study simulates it")
    else:
        yield Finding("fail", "data", f"{address}: no manifest.json there", "`studytool data import` makes a dataset")


def look_at_output(address: str | None) -> Iterable[Finding]:
    """Whether the study's folder or address can be written to."""
    if address is None:
        return
    if is_remote(address):
        yield _remote_output(address)
        return
    existing = _nearest_folder(Path(address))
    try:
        ahead = _write_a_file(existing)
    except OSError as error:
        yield Finding("fail", "output", f"{existing}: {error.strerror}", "choose another with --set output=FOLDER")
        return
    if abs(ahead) > CLOCK_TOLERANCE_SECONDS:
        mend = "set both clocks: `timedatectl set-ntp on`"
        yield Finding("warn", "clock", f"{existing}: the file server's clock is {ahead:+.0f} s from ours", mend)
    yield room_finding("output", existing, "free some, or choose another with --set output=FOLDER")


def _remote_output(address: str) -> Finding:
    from pyarrow import fs

    try:
        filesystem, path = fs.FileSystem.from_uri(address)
        probe = f"{path.rstrip('/')}/.studytool-doctor-{uuid.uuid4().hex}"
        with filesystem.open_output_stream(probe) as file:
            file.write(b"studytool")
        with filesystem.open_input_file(probe) as file:
            whole = file.read() == b"studytool"
        filesystem.delete_file(probe)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        mend = "does the bucket exist, and may this machine's keys or profile write there?"
        return Finding("fail", "output", f"{address}: {first_line(error)}", mend)
    if not whole:
        return Finding("fail", "output", f"{address}: does not give back what was written", "use another storage")
    return Finding("ok", "output", f"{address}: can be written, read and deleted")


def _nearest_folder(path: Path) -> Path:
    absolute = path.expanduser().absolute()
    return next(place for place in (absolute, *absolute.parents) if place.is_dir())


def _write_a_file(folder: Path) -> float:
    """By how many seconds at least the clock of the file system is ahead of ours."""
    probe = folder / f".studytool-doctor-{uuid.uuid4().hex}"
    begin = time.time()
    probe.write_text("studytool")
    try:
        written = probe.stat().st_mtime
    finally:
        probe.unlink()
    end = time.time()
    return written - end if written > end else min(written - begin, 0.0)


def look_at_mlflow(uri: str | None) -> Iterable[Finding]:
    """Whether MLflow's store can be reached."""
    if uri is None:
        return
    if uri.startswith("sqlite:///"):
        folder = _nearest_folder(Path(uri.removeprefix("sqlite:///")).parent)
        try:
            _write_a_file(folder)
            yield Finding("ok", "mlflow", f"{uri}: a file of this machine")
        except OSError as error:
            yield Finding("fail", "mlflow", f"{uri}: {folder}: {error.strerror}", "choose another tracking.uri")
    elif uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10) as answer:
                answer.read(100)
            yield Finding("ok", "mlflow", f"{uri}: answers")
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            yield Finding(
                "fail", "mlflow", f"{uri}: {first_line(reason)}", "start the server, or open the SSH tunnel to it"
            )
    else:
        yield Finding("warn", "mlflow", f"{uri.split(':', 1)[0]}: cannot be looked at from here", "the study will tell")


def look_at_weights(wanted: Sequence[tuple[str, str]]) -> Iterable[Finding]:
    """Whether the weights that the arms start from are here."""
    from studytool.models.weights import missing_weights, weights_folder

    missing = [line for backbone, init in wanted if (line := missing_weights(backbone, init))]
    for line in missing:
        found, _, mend = line.partition("; ")
        yield Finding("fail", "weights", found, mend)
    if not missing:
        needed = f"all {len(wanted)} that the study needs" if wanted else "no study to need any"
        yield Finding("ok", "weights", f"{needed}; read from {weights_folder()}")
