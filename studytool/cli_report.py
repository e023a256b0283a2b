"""The commands on results: `studytool report` and `compare`. Each handler imports what it needs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from studytool.cli_data import Overrides

report = typer.Typer()

Study = Annotated[str, typer.Argument(metavar="STUDY", help="A study file, a study's folder or name, an experiment.")]
Tracking = Annotated[str | None, typer.Option(metavar="URI", help="The MLflow store that knows the experiment.")]
Latex = Annotated[bool, typer.Option("--latex", help="Only print the tables, as LaTeX.")]
Csv = Annotated[bool, typer.Option("--csv", help="Only print the tables, as CSV.")]


@report.command("report")
def write(
    study: Study,
    override: Overrides = [],  # noqa: B006 - typer makes a new list for every call
    latex: Latex = False,
    csv: Csv = False,
    no_features: Annotated[bool, typer.Option("--no-features", help="Leave out the features: they take longest.")] = (
        False
    ),
    tracking: Tracking = None,
) -> None:
    """Write what a study has found as one HTML page, with figures and CSV tables; also while it runs."""
    from rich.console import Console

    from studytool.report.page import write_report
    from studytool.report.sections import StudyResults
    from studytool.report.tables import arms_table, claims_tables
    from studytool.study.folder import find_study, read_environment
    from studytool.study.progress import say
    from studytool.study.reporting import dataset_if_here, results_of

    spec = find_study(study, override, tracking_uri=tracking)
    dataset = None if latex or csv else dataset_if_here(spec)
    results = StudyResults(spec, results_of(spec), spec.folder, read_environment(spec.folder), dataset)
    if latex or csv:
        tables = [arms_table(spec, results.summaries, results.gaps), *claims_tables(spec, results.comparisons)]
        sys.stdout.write("\n".join(table.latex() if latex else table.csv() for table in tables))
        return
    written = write_report(results, embed=not no_features)
    console = Console()
    for sentence in (written.answer.headline, *written.answer.how_sure):
        say(console, sentence)
    say(console, f"report: {written.page}")


@report.command()
def compare(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="Study files, folders, names, experiments.")],
    latex: Latex = False,
    csv: Csv = False,
    tracking: Tracking = None,
) -> None:
    """Set several studies side by side: the arms they share, and what each study found."""
    from rich.console import Console

    from studytool.report.across import across_table, answers_table, terminal_table
    from studytool.report.sections import StudyResults
    from studytool.study.folder import find_study
    from studytool.study.progress import say
    from studytool.study.reporting import results_of

    specs = [find_study(study, tracking_uri=tracking) for study in studies]
    results = [StudyResults(spec, results_of(spec), spec.folder) for spec in specs]
    tables = [answers_table(results), across_table(results)]
    if latex or csv:
        sys.stdout.write("\n".join(table.latex() if latex else table.csv() for table in tables))
        return
    # A file has no width; rich would take 80 columns and fold names.
    console = Console(width=None if sys.stdout.isatty() else 1000)
    for table in tables:
        console.print(terminal_table(table))
        for note in table.notes:
            say(console, note)
        console.print()
