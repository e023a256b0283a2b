"""The report at the end of a run: it may fail, but never takes the study with it."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from studytool.data.remote_copy import local_copy
from studytool.data.shards import Dataset, open_dataset
from studytool.errors import StudytoolError
from studytool.files import write_text
from studytool.results import TrialRecord
from studytool.spec import StudySpec
from studytool.study.folder import read_environment
from studytool.study.progress import say
from studytool.study.records import read_records

REPORT_LOG = "report.log"


def try_report(
    spec: StudySpec, records: Sequence[TrialRecord], dataset: Dataset | None, console: Console, *, embed: bool
) -> tuple[Path, ...]:
    """Write the report of a study; the page and its tables, or nothing and a line on the console if it failed.

    What went wrong then stands in `report.log` in the study's folder.
    """
    log = spec.folder / REPORT_LOG
    try:
        from studytool.report.page import write_report
        from studytool.report.sections import StudyResults

        results = StudyResults(spec, records, spec.folder, read_environment(spec.folder), dataset)
        report = write_report(results, embed=embed)
    except Exception as error:
        try:
            write_text(log, traceback.format_exc())
        except OSError:
            say(console, f"no report: {type(error).__name__}: {error}".splitlines()[0])
        else:
            say(console, f"no report could be written, see {log}; the study itself is whole")
        return ()
    log.unlink(missing_ok=True)
    return (report.page, *report.tables)


def dataset_if_here(spec: StudySpec) -> Dataset | None:
    """The study's dataset, if it is on this machine and can be read; nothing is copied or simulated for it."""
    if not Path(spec.data.path).is_dir():
        return None
    try:
        return open_dataset(local_copy(spec.data.path, leave_out=spec.data.leave_out), spec.data.split)
    except StudytoolError:
        return None


def results_of(spec: StudySpec) -> tuple[TrialRecord, ...]:
    """What a study has so far, whether it runs or not.

    Raises:
        StudytoolError: it has no results, or its files are damaged.
    """
    records = read_records(spec.folder)
    if not records:
        raise StudytoolError(f"{spec.folder}: no trial has begun there; `studytool run` begins the study")
    return records
