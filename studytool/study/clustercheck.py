"""What has to be true of every node of a running Ray cluster before a trial of a study runs there."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from studytool.data.cachefolder import cache_folder
from studytool.data.manifest import Manifest
from studytool.data.remote_copy import is_copied
from studytool.doctor.finding import GB, Finding, first_line
from studytool.doctor.places import look_at_data, look_at_output, look_at_weights
from studytool.errors import StudytoolError
from studytool.models.backbones import CHECKPOINT, find_backbone
from studytool.models.weights import fetch_checkpoint
from studytool.registry import load
from studytool.remote import is_remote
from studytool.spec import StudySpec
from studytool.study.nodes import NodeAnswer, ask_every_node
from studytool.study.progress import say
from studytool.study.records import read_uid

_PACKAGES = ("studytool", "torch", "torchvision", "ray", "numpy")
"""Whose versions results depend on."""
_PATIENCE_SECONDS = 10.0
"""A network file system may show a file that late to another node."""
_SHARE_IT = "it has to lie on a folder that all nodes mount under the same name, or at an address (s3://BUCKET/…)"


@dataclass(frozen=True)
class Needs:
    """What every node has to have; `models` are (backbone, initialization), `versions` those of the driver's packages.

    Of the data no trial reads the shards `leave_out`; a copy takes `data_bytes`. `place` is where results go, a shared
    folder or an address; in a folder lies the ledger with the id `uid`.
    """

    data: str
    leave_out: tuple[str, ...]
    data_bytes: int
    place: str
    uid: str
    models: tuple[tuple[str, str], ...]
    versions: Mapping[str, str]


def with_full_paths(spec: StudySpec, address: str) -> StudySpec:
    """The study with paths that mean the same wherever a trial runs.

    Raises:
        StudytoolError: a path is relative, and the cluster has several nodes; or the address is of no use to a study.
    """
    if address.startswith("ray://"):
        raise StudytoolError(
            f"--address {address}: the driver has to be on a node of the cluster; run it there with --address auto, or "
            "send the study with `studytool submit STUDY.yaml --address http://HOST:8265`"
        )
    values = {"data.path": spec.data.path, "output": spec.output}
    values |= {
        f"init {init}": init.removeprefix(CHECKPOINT) for _, init in models_of(spec) if init.startswith(CHECKPOINT)
    }
    relative = {key: path for key, path in values.items() if not is_remote(path) and not Path(path).is_absolute()}
    if not relative:
        return spec
    nodes = len(ask_every_node(address, socket.gethostname))
    key, path = next(iter(relative.items()))
    if nodes > 1 or key.startswith("init"):
        raise StudytoolError(
            f"{key}: {path!r} is a relative path, which each node of the cluster would take for one of its own; give "
            "the full path of a folder that all nodes share, or an address (s3://BUCKET/…)"
        )
    data = spec.data.model_copy(update={"path": _full(spec.data.path)})
    return spec.model_copy(update={"data": data, "output": _full(spec.output)})


def _full(path: str) -> str:
    return path if is_remote(path) else str(Path(path).absolute())


def models_of(spec: StudySpec) -> tuple[tuple[str, str], ...]:
    """Every backbone with every initialization that occurs in the study."""
    trials = [spec.trial(arm, {}, phase="search", number=0, seed=spec.seed) for arm in spec.list_arms()]
    return tuple(sorted({(trial.model.backbone, trial.model.init) for trial in trials}))


def needs_of(spec: StudySpec, uid: str, manifest: Manifest) -> Needs:
    """What every node has to have for a study whose ledger has the id `uid`, beside this driver."""
    place = spec.storage_address or str(spec.folder.absolute())
    data_bytes = sum(shard.bytes for shard in manifest.shards)
    return Needs(spec.data.path, spec.data.leave_out, data_bytes, place, uid, models_of(spec), _versions_here())


def check_nodes(needs: Needs, address: str, console: Console) -> None:
    """Have every node read the data, import the networks, find the weights, and write where results go.

    Raises:
        StudytoolError: something has to be mended; a line on the console for each thing says how.
    """
    answers = ask_every_node(address, look_from_node, needs)
    problems: dict[Finding, list[str]] = {}
    for answer in answers:
        for finding in problems_in(answer):
            problems.setdefault(finding, []).append(answer.node)
    for finding, nodes in problems.items():
        say(console, f"{'all nodes' if len(nodes) == len(answers) else ', '.join(nodes)}: {finding}")
    if problems:
        raise StudytoolError(
            f"{len(problems)} {'thing has' if len(problems) == 1 else 'things have'} to be mended on the cluster at "
            f"{address} before the first trial"
        )


def problems_in(answer: NodeAnswer) -> tuple[Finding, ...]:
    """What is wrong on a node that was asked `look_from_node`; that it could not answer is something wrong, too."""
    if answer.problem is None:
        return tuple(answer.value)
    return (
        Finding("fail", "node", answer.problem, "see `ray status`, and install the same copy of the project there"),
    )


def look_from_node(needs: Needs) -> tuple[Finding, ...]:
    """What is wrong on this node; nothing is raised."""
    here = _versions_here()
    differing = [
        f"{name} {here[name]} instead of {there}" for name, there in needs.versions.items() if here[name] != there
    ]
    if differing:  # what else there is might not even load
        mend = "install the same copy of the project as the driver's: `bash cluster/install.sh`"
        return (Finding("fail", "versions", ", ".join(differing), mend),)
    problems = [*_look_at_place(needs), *_look_at_data(needs)]
    for backbone, init in needs.models:
        problems += _look_at_model(backbone, init)
    return tuple(problems)


def _versions_here() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _look_at_place(needs: Needs) -> list[Finding]:
    """Whether results can be written, on the same disk as the driver's, with room for them."""
    if not is_remote(needs.place) and not _is_the_driver_s(Path(needs.place), needs.uid):
        return [Finding("fail", "output", f"{needs.place}: the study that the driver has there is not here", _SHARE_IT)]
    return [finding for finding in look_at_output(needs.place) if finding.state == "fail"]


def _look_at_data(needs: Needs) -> list[Finding]:
    """Whether the data can be read and, at an address, whether there is room for the copy."""
    seen = look_at_data(needs.data, can_be_made=False)
    problems = [Finding("fail", "data", finding.found, _SHARE_IT) for finding in seen if finding.state == "fail"]
    if is_remote(needs.data) and not problems and not is_copied(needs.data, needs.leave_out):
        root = cache_folder("datasets")
        free = shutil.disk_usage(root).free
        if free < needs.data_bytes:
            found = f"{root}: {free / GB:.1f} GB free, the data has {needs.data_bytes / GB:.1f}"
            problems.append(Finding("fail", "room", found, "free some, or set STUDYTOOL_CACHE to a larger disk"))
    return problems


def _look_at_model(backbone: str, init: str) -> list[Finding]:
    try:
        found = find_backbone(backbone)
        for entry in (found.build, found.split):
            load(entry)
    except Exception as error:
        mend = "put the module's file on a shared folder that PYTHONPATH names on every node, or install it there"
        return [Finding("fail", "backbone", f"{backbone}: {type(error).__name__}: {first_line(error)}", mend)]
    try:
        fetch_checkpoint(init)
        return [finding for finding in look_at_weights([(backbone, init)]) if finding.state == "fail"]
    except (StudytoolError, OSError) as error:
        return [Finding("fail", "weights", first_line(error), "put the file where every node can read it")]


def _is_the_driver_s(folder: Path, uid: str) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        found = read_uid(folder)
        # Where there is no such folder at all, none will come.
        if found == uid or not folder.is_dir() or time.monotonic() > deadline:
            return found == uid
        time.sleep(0.5)
