"""The commands about machines and clusters. Each handler is short and imports what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from studytool.cli_data import Overrides, StudyFile

cluster = typer.Typer()

Dashboard = Annotated[str, typer.Option("--address", metavar="http://HOST:PORT", help="The cluster's dashboard.")]


@cluster.command()
def doctor(
    study: Annotated[
        Path | None, typer.Argument(metavar="[STUDY.yaml]", help="Also look at what this study needs.")
    ] = None,
    override: Overrides = [],  # noqa: B006 - typer makes a new list for every call
    address: Annotated[
        str | None, typer.Option(help="Look at every node of the Ray cluster at HOST:PORT, or `auto` on one of them.")
    ] = None,
) -> None:
    """Look at what a study needs of this machine or of a cluster's nodes, and say how to mend what is missing."""
    from studytool.doctor import examine
    from studytool.errors import StudytoolError

    wanted = examine.wanted_by(study, override)
    findings = examine.examine_cluster(address, wanted) if address else examine.examine(wanted).findings
    for finding in findings:
        print(finding)
    failed = sum(finding.state == "fail" for finding in findings)
    if failed:
        raise StudytoolError(f"{failed} of {len(findings)} findings have to be mended before a study can run")


@cluster.command()
def submit(
    study: StudyFile,
    override: Overrides = [],  # noqa: B006
    address: Dashboard = "http://127.0.0.1:8265",
) -> None:
    """Send a study to a Ray cluster as a job that outlives the terminal."""
    from studytool.study.submit import submit_study

    job = submit_study(study, override, address=address)
    print(f"job {job}; follow it: studytool logs {job} --follow --address {address}")


@cluster.command()
def logs(
    name: Annotated[str, typer.Argument(metavar="STUDY|JOB", help="A study, or with --address a job or its study.")],
    address: Annotated[
        str | None,
        typer.Option(metavar="http://HOST:PORT", help="Read what a job of this cluster's dashboard printed."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="With --address: until the job ends.")] = False,
    lines: Annotated[int, typer.Option(min=1, help="Of each trial's log.")] = 20,
) -> None:
    """Show what a job printed, or the logs of a study's trials: those that run or have failed, else the last one."""
    from studytool.study.folder import find_study
    from studytool.study.submit import job_log, newest_job, trial_logs

    if address is None:
        for line in trial_logs(find_study(name), lines=lines):
            print(line)
        return
    for piece in job_log(newest_job(name, address=address), address=address, follow=follow):
        print(piece, end="", flush=True)
