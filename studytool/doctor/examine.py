"""What a study needs of a machine, looked at one thing after the other, and how to mend what is missing.

`examine` looks at the machine it runs on and raises nothing; on a cluster it is called on every node. `studytool
doctor` prints what it finds.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from studytool.doctor import machine, places
from studytool.doctor.finding import CLOCK_TOLERANCE_SECONDS, SET_CLOCK, Finding, first_line
from studytool.remote import is_remote


@dataclass(frozen=True)
class Wanted:
    """What a study needs beside the program itself; without a study, nothing.

    `data` and `output` are paths or addresses, `tracking_uri` is MLflow's; `weights` are (backbone, initialization).
    """

    output: str | None = None
    data: str | None = None
    data_can_be_made: bool = False
    tracking_uri: str | None = None
    weights: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Examination:
    """What was found on one machine, and the version of every package there."""

    findings: tuple[Finding, ...]
    versions: Mapping[str, str]


def examine(wanted: Wanted) -> Examination:
    """Look at this machine: a finding for each thing, whatever happens while looking."""
    looks: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("python", machine.look_at_python),
        ("packages", machine.look_at_packages),
        ("torch", machine.look_at_torch),
        ("gpu", machine.look_at_gpus),
        ("shared memory", machine.look_at_shared_memory),
        ("disk", machine.look_at_disks),
        ("clock", machine.look_at_clock),
        ("data", lambda: places.look_at_data(wanted.data, can_be_made=wanted.data_can_be_made)),
        ("output", lambda: places.look_at_output(wanted.output)),
        ("mlflow", lambda: places.look_at_mlflow(wanted.tracking_uri)),
        ("weights", lambda: places.look_at_weights(wanted.weights)),
    )
    findings: list[Finding] = []
    for what, look in looks:
        try:
            findings += look()
        except Exception as error:
            findings.append(Finding("fail", what, f"{type(error).__name__}: {first_line(error)}", "reinstall"))
    versions = {
        dist.name.lower().replace("_", "-"): dist.version for dist in importlib.metadata.distributions() if dist.name
    }
    return Examination(tuple(findings), {"python": platform.python_version(), **versions})


def compare_versions(versions: Mapping[str, Mapping[str, str]]) -> Finding:
    """Whether the machines, by name, have the same versions of everything."""
    names = sorted({name for found in versions.values() for name in found})
    differing = {
        name: {found.get(name, "missing") for found in versions.values()}
        for name in names
        if len({found.get(name) for found in versions.values()}) > 1
    }
    if not differing:
        return Finding("ok", "versions", f"the same {len(names)} packages on {len(versions)} nodes")
    shown = [f"{name} ({', '.join(sorted(found))})" for name, found in list(differing.items())[:4]]
    more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
    return Finding(
        "fail",
        "versions",
        f"nodes differ in {', '.join(shown)}{more}",
        "install the same copy of the project on all of them: `bash cluster/install.sh`",
    )


def wanted_by(study: Path | None, overrides: Sequence[str] = ()) -> Wanted:
    """What the study of a file needs; without one, nothing.

    Raises:
        SpecError: the study file is wrong.
    """
    if study is None:
        return Wanted()
    from studytool.spec import load_study

    spec = load_study(study, overrides)
    trials = [spec.trial(arm, {}, phase="single", number=0, seed=0) for arm in spec.list_arms()]
    return Wanted(
        output=spec.storage_address or str(spec.folder),
        data=spec.data.path,
        data_can_be_made=spec.data.simulate is not None,
        tracking_uri=spec.tracking.uri,
        weights=tuple(sorted({(trial.model.backbone, trial.model.init) for trial in trials})),
    )


def examine_cluster(address: str, wanted: Wanted) -> tuple[Finding, ...]:
    """What every node of a Ray cluster says of itself, and whether they fit together; equal lines are given once.

    Raises:
        StudytoolError: there is no cluster at the address.
    """
    from studytool.study.nodes import ask_every_node

    # Only the driver, on the head, speaks to MLflow.
    on_nodes = replace(wanted, tracking_uri=None)
    answers = ask_every_node(address, examine, on_nodes)
    found: dict[Finding, list[str]] = {}
    for answer in answers:
        if answer.problem is not None:
            mend = "see `ray status`, and install the project there: `bash cluster/install.sh`"
            findings: tuple[Finding, ...] = (Finding("fail", "node", answer.problem, mend),)
        else:
            findings = answer.value.findings
            if abs(answer.clock_ahead_seconds) > CLOCK_TOLERANCE_SECONDS:
                text = f"{answer.clock_ahead_seconds:+.0f} s from this machine's"
                findings = (*findings, Finding("warn", "clock", text, SET_CLOCK))
        for finding in findings:
            found.setdefault(finding, []).append(answer.node)
    lines = [_of_nodes(finding, nodes, len(answers)) for finding, nodes in found.items()]
    lines.append(compare_versions({a.node: a.value.versions for a in answers if a.problem is None}))
    if len(answers) > 1:
        lines += paths_of_one_machine(wanted)
    return (*lines, *places.look_at_mlflow(wanted.tracking_uri))


def _of_nodes(finding: Finding, nodes: Sequence[str], count: int) -> Finding:
    whose = f"all {count} nodes" if len(nodes) == count > 1 else ", ".join(nodes)
    return replace(finding, found=f"{finding.found} ({whose})")


def paths_of_one_machine(wanted: Wanted) -> tuple[Finding, ...]:
    """What cannot work on a cluster of several nodes, since each would see a folder of its own."""
    return tuple(
        Finding(
            "fail",
            what,
            f"{path!r} is a relative path: each node would have its own",
            "give an address (s3://BUCKET/…, gs://BUCKET/…) or the full path of a folder that all nodes share",
        )
        for what, path in (("output", wanted.output), ("data", wanted.data))
        if path is not None and not is_remote(path) and not Path(path).expanduser().is_absolute()
    )
