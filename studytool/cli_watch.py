"""The commands that look at a study while it runs and afterwards: `studytool status`, `ui`."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

watch = typer.Typer()

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="A study file, a study's folder or its name.")]


@watch.command()
def status(
    study: StudyName,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for other programs.")] = False,
) -> None:
    """Say how a study stands: what runs, what is left, the best so far, time and money spent and left."""
    import json

    from studytool.study.folder import find_study
    from studytool.study.status import status_dict, status_lines, study_status

    found = study_status(find_study(study))
    print(json.dumps(status_dict(found), indent=1) if as_json else "\n".join(status_lines(found)))


@watch.command()
def ui(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="A study [all of ./mlflow.db].")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="[5000, or a free one.]")] = None,
) -> None:
    """Show the runs of a study in MLflow's pages, on this machine only, until Ctrl-C."""
    from studytool.settings import TrackingSettings
    from studytool.study.folder import find_study
    from studytool.study.tracking.ui import find_comparisons, mlflow_pages

    spec = None if study is None else find_study(study)
    uri = TrackingSettings().uri if spec is None else spec.tracking.uri
    found = find_comparisons(uri, None if spec is None else spec.name)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell that puts a command in the background has SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        with mlflow_pages(uri, port=port) as (address, process):
            print(address, flush=True)
            for one in found:
                print(f"runs of {one.study}: {address}{one.runs}", flush=True)
                if one.arms:
                    print(f"its arms compared: {address}{one.arms}", flush=True)
            if process is not None:
                print("Ctrl-C ends it", flush=True)
                process.wait()
    except KeyboardInterrupt:
        return
