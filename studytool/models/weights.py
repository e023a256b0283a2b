"""Files of published weights: where they are kept, how they get there, and whether they are what they say they are."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from studytool.errors import WeightsError
from studytool.files import read_with_sha256, sha256_of, write_text
from studytool.models.backbones import BACKBONES, CHECKPOINT, WeightsFile, find_backbone
from studytool.remote import is_remote, open_remote

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60
_TRIAL_WEIGHTS, _TRIAL_RECORD = "best.safetensors", "best.json"
SHIPPED = Path(__file__).with_name("weights_shipped")
"""The folder of the weights that come with studytool."""


@dataclass(frozen=True)
class FileCheck:
    """What is known of a file of weights, and its SHA-256.

    `state` is "published" if it has the digest its makers give, "recorded" if it has the one recorded beside it in
    `NAME.sha256` (written at download, or by `record_digest` for a file of one's own) or, for `best.safetensors` of a
    trial, in `best.json`; "unchecked" if there is none of these.
    """

    state: str
    sha256: str


@dataclass(frozen=True)
class WeightsRow:
    """One published file and the state of its copy here: "missing", its `FileCheck`, or what is wrong."""

    backbone: str
    init: str
    file: WeightsFile
    path: Path
    state: str


def weights_folder() -> Path:
    """The cache folder: `STUDYTOOL_WEIGHTS`, else the checkpoints folder of torch.hub."""
    chosen = os.environ.get("STUDYTOOL_WEIGHTS")
    if chosen:
        return Path(chosen)
    import torch.hub

    return Path(torch.hub.get_dir()) / "checkpoints"


def weights_file(backbone: str, init: str) -> WeightsFile | None:
    """The published file that an initialization reads; None for `random` and `checkpoint:PATH`."""
    chosen = find_backbone(backbone)
    return chosen.weights.get(chosen.video_init if init == "shuffled" else init)


def weights_path(backbone: str, init: str) -> Path | None:
    """Where the file of an initialization is, or has to be put; None where it needs none."""
    if init.startswith(CHECKPOINT):
        address = init.removeprefix(CHECKPOINT)
        if is_remote(address):
            mark = hashlib.sha256(address.encode()).hexdigest()[:16]
            return weights_folder() / f"{mark}-{address.rsplit('/', 1)[-1]}"
        path = Path(address).expanduser()
        return path / _TRIAL_WEIGHTS if path.is_dir() else path
    file = weights_file(backbone, init)
    return _place(file) if file else None


def fetch_checkpoint(init: str) -> None:
    """Copy `checkpoint:s3://…` (or another address) into the cache unless it is there; nothing to do for the others.

    Raises:
        DataError: there is no such file, or its server does not answer.
    """
    address = init.removeprefix(CHECKPOINT)
    path = weights_path("", init) if init.startswith(CHECKPOINT) and is_remote(address) else None
    if path is not None and not path.is_file():
        folder, name = address.rsplit("/", 1)
        open_remote(folder).fetch(name, path)


def missing_weights(backbone: str, init: str) -> str | None:
    """One line that says which file to put where, or None if nothing is missing."""
    path = weights_path(backbone, init)
    if path is None or path.is_file():
        return None
    file = weights_file(backbone, init)
    if file is None:
        return f"{init}: there is no file {path}; give the path of a .safetensors or .pth file, or a trial's folder"
    if not file.url:
        return f"{backbone}, {init}: {path} is missing; download {file.name} from {file.page} and put it there"
    option = f" --init {init}" if init == "imagenet_inflated" else ""
    return (
        f"{backbone}, {init}: {path} is missing; run `studytool weights fetch {backbone}{option}`, or on a machine "
        f"without internet copy {file.url} to that path"
    )


def fetch_weights(
    backbone: str, init: str, on_progress: Callable[[int, int | None], None] | None = None
) -> Path | None:
    """Download the file of an initialization unless it is there; an interrupted download is taken up again.

    `on_progress` gets the bytes present and the bytes in all (None if the server does not say).

    Raises:
        WeightsError: no direct link, no connection, or the file is not the published one.
    """
    path, file = weights_path(backbone, init), weights_file(backbone, init)
    if path is None or path.is_file():
        return path
    if file is None or not file.url:
        raise WeightsError(missing_weights(backbone, init))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    with partial.open("ab") as output:
        fcntl.flock(output, fcntl.LOCK_EX)
        if path.is_file():
            return path
        try:
            _download(file.url, output, on_progress or (lambda _done, _total: None))
        except (OSError, urllib.error.URLError) as error:
            raise WeightsError(
                f"{file.url}: {error}; run the command again to go on, or copy the file to {path} from another machine"
            ) from error
        output.flush()
        os.fsync(output.fileno())
        found = sha256_of(partial)
        if not found.startswith(file.digest):
            partial.unlink()
            raise WeightsError(f"{file.url}: its SHA-256 is {found}, not {file.digest}…; the download was removed")
        write_text(_record(path), f"{found}  {path.name}\n")
        partial.replace(path)
    return path


def check_file(path: Path, file: WeightsFile | None) -> FileCheck:
    """Compare a file with what is known of it: the digest its makers give, else the one recorded beside it.

    Raises:
        WeightsError: it has another digest.
    """
    return _check(path, sha256_of(path), file)


def read_checked(path: Path, file: WeightsFile | None) -> tuple[bytes, FileCheck]:
    """A file's bytes, and what `check_file` says about these very bytes.

    Raises:
        WeightsError: it cannot be read, or has another digest.
    """
    try:
        content, found = read_with_sha256(path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    return content, _check(path, found, file)


def list_weights(backbones: tuple[str, ...] = tuple(BACKBONES)) -> tuple[WeightsRow, ...]:
    """Every published file of the backbones and the state of its copy; a damaged one has the error as its state."""
    rows = []
    for name in backbones:
        for init, file in find_backbone(name).weights.items():
            path = _place(file)
            try:
                state = check_file(path, file).state if path.is_file() else "missing"
            except WeightsError as error:
                state = str(error)
            rows.append(WeightsRow(name, init, file, path, state))
    return tuple(rows)


def record_digest(path: Path) -> str:
    """Write the SHA-256 of a file of one's own beside it, so that `check_file` accepts it as "recorded"."""
    digest = sha256_of(path)
    write_text(_record(path), f"{digest}  {path.name}\n")
    return digest


def _check(path: Path, found: str, file: WeightsFile | None) -> FileCheck:
    published = file.digest if file else ""
    if published and found.startswith(published):
        return FileCheck("published", found)
    record = _record(path)
    if record.is_file():
        recorded = "".join(record.read_text(encoding="utf-8").split()[:1])
    else:
        record = path.with_name(_TRIAL_RECORD)
        recorded = _trials_digest(record) if path.name == _TRIAL_WEIGHTS and record.is_file() else ""
    if recorded == found:
        return FileCheck("recorded", found)
    if recorded:
        remedy = "copy the folder again, or put weights of your own elsewhere"
        remedy = remedy if record.name == _TRIAL_RECORD else "fetch the file again"
        raise WeightsError(f"{path}: SHA-256 is {found}, but {record.name} says {recorded}; {remedy}")
    if published:
        raise WeightsError(
            f"{path}: SHA-256 is {found}, but the published file's begins with {published}; fetch it again"
        )
    return FileCheck("unchecked", found)


def _trials_digest(record: Path) -> str:
    """The SHA-256 that a trial's record gives for its weights; "" for a record of some other program."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{record} is damaged ({type(error).__name__}); copy the trial's folder again") from error
    if not isinstance(content, dict) or "sha256" not in content:
        return ""
    if not content["sha256"]:
        raise WeightsError(
            f"{record.parent}: the trial has not ended, and its weights are not written yet; let it go on"
        )
    return str(content["sha256"])


def _place(file: WeightsFile) -> Path:
    return (SHIPPED if file.shipped else weights_folder()) / file.name


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _download(url: str, output: BinaryIO, on_progress: Callable[[int, int | None], None]) -> None:
    """Append to `output` what of `url` it lacks; starts over where the server cannot resume."""
    done = output.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing is left to send: the file was whole, and only its renaming was lost
            return
        raise
    with response:
        if done and response.status != 206:
            output.truncate(0)
            done = 0
        length = response.headers["Content-Length"]
        total = done + int(length) if length else None
        while chunk := response.read(_CHUNK_BYTES):
            output.write(chunk)
            done += len(chunk)
            on_progress(done, total)
    if total is not None and done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes")
