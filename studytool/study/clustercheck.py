"""What has to be true of every node of a running Ray cluster before the first trial of a study."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from studytool.doctor.examine import compare_versions
from studytool.doctor.finding import Finding, first_line
from studytool.doctor.places import look_at_data, look_at_output, look_at_weights
from studytool.errors import StudytoolError
from studytool.models.backbones import CHECKPOINT, find_backbone
from studytool.models.weights import fetch_checkpoint
from studytool.registry import load
from studytool.remote import is_remote
from studytool.spec import StudySpec
from studytool.study.nodes import ask_every_node
from studytool.study.progress import say

_PACKAGES = ("studytool", "torch", "torchvision", "ray", "numpy")
"""Whose versions results depend on."""
_PATIENCE_SECONDS = 10.0
"""A network file system may show a file that late to another node."""
_SHARE_IT = "it has to lie on a folder that all nodes mount under the same name, or at an address (s3://BUCKET/…)"


@dataclass(frozen=True)
class Needs:
    """What every node has to have; `models` are (backbone, initialization).

    `probes` is a shared folder for small files; None if results go to the address `storage`.
    """

    data: str
    probes: str | None
    storage: str | None
    models: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class NodeView:
    """What one node says: what is wrong there, the file it has written, its versions."""

    problems: tuple[Finding, ...]
    written: str
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


def check_nodes(spec: StudySpec, address: str, console: Console) -> None:
    """Have every node read the data, import the networks, find the weights, and write where results go.

    Raises:
        StudytoolError: something has to be mended; a line on the console for each thing says how.
    """
    probes = spec.folder.absolute() / f".nodes-{uuid.uuid4().hex}"
    probes.mkdir(parents=True)
    storage = spec.storage_address
    try:
        (probes / "driver").write_text(probes.name)
        needs = Needs(spec.data.path, None if storage else str(probes), storage, models_of(spec))
        answers = ask_every_node(address, look_from_node, needs)
        problems: dict[Finding, list[str]] = {}
        for answer in answers:
            if answer.problem is not None:
                mend = "see `ray status`, and install the same copy of the project there"
                found: Sequence[Finding] = [Finding("fail", "node", answer.problem, mend)]
            else:
                found = answer.value.problems
                if not found and storage is None and not _appears(probes / answer.value.written):
                    lost = f"{spec.folder.absolute()}: what it writes there cannot be read here"
                    found = [Finding("fail", "output", lost, _SHARE_IT)]
            for finding in found:
                problems.setdefault(finding, []).append(answer.node)
    finally:
        _remove(probes)
    versions = compare_versions({f"{i} {a.node}": a.value.versions for i, a in enumerate(answers) if not a.problem})
    if versions.state != "ok":
        problems[versions] = [answer.node for answer in answers]
    for finding, nodes in problems.items():
        say(console, f"{'all nodes' if len(nodes) == len(answers) else ', '.join(nodes)}: {finding}")
    if problems:
        raise StudytoolError(
            f"{len(problems)} {'thing has' if len(problems) == 1 else 'things have'} to be mended on the cluster at "
            f"{address} before the first trial"
        )


def look_from_node(needs: Needs) -> NodeView:
    """What this node says of itself; nothing is raised."""
    problems = [finding for finding in look_at_output(needs.storage) if finding.state == "fail"]
    written = f"node-{uuid.uuid4().hex}"
    if needs.probes is not None:
        driver = Path(needs.probes) / "driver"
        try:
            if not _appears(driver):
                raise FileNotFoundError(2, "No such file or directory", str(driver.parent.parent))
            (driver.parent / written).write_text(written)
        except OSError as error:
            problems.append(Finding("fail", "output", f"{driver.parent.parent}: {error.strerror}", _SHARE_IT))
    seen = look_at_data(needs.data, can_be_made=False)
    problems += [Finding("fail", "data", finding.found, _SHARE_IT) for finding in seen if finding.state == "fail"]
    for backbone, init in needs.models:
        problems += _look_at_model(backbone, init)
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return NodeView(tuple(problems), written, {"python": platform.python_version(), **versions})


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


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not path.is_file():
        # Where there is no such folder at all, none will come.
        if not path.parent.parent.is_dir() or time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _remove(probes: Path) -> None:
    for path in probes.iterdir():
        path.unlink()
    probes.rmdir()
