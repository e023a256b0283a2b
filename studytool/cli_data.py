"""The commands on datasets: `studytool data …`. Each handler is short and imports what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(no_args_is_help=True, help="Make, look at and check datasets.")

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the study file, e.g. confirm.seeds=3."),
]


@data.command()
def simulate(
    study: StudyFile,
    override: Overrides = [],  # noqa: B006
) -> None:
    """Simulate the dataset that a study file describes under data.simulate."""
    from rich.console import Console

    from studytool.errors import DataError
    from studytool.spec import load_study
    from studytool.study.run import ensure_dataset

    spec = load_study(study, override)
    if spec.data.simulate is None:
        raise DataError(f"{study}: data.simulate: missing; it says how to simulate, e.g. {{classes: 10, snr: 0.1}}")
    if Path(spec.data.path).exists():
        raise DataError(f"{spec.data.path}: exists already; choose another folder with --set data.path=…")
    ensure_dataset(spec.data, Console())


@data.command()
def verify(folder: Annotated[Path, typer.Argument(help="A dataset folder.")]) -> None:
    """Check every shard against its checksum and the manifest."""
    from studytool.data.shards import verify_dataset

    manifest = verify_dataset(folder)
    print(f"{folder}: {len(manifest.shards)} shards are as they were written")
