"""The commands about machines and clusters. Each handler is short and imports what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from studytool.cli_data import Overrides

cluster = typer.Typer()


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
