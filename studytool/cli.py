"""The commands. Each handler is short and imports what it needs, so that `studytool --help` answers at once."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from studytool.cli_cluster import cluster
from studytool.cli_data import Overrides, StudyFile, data
from studytool.cli_model import model
from studytool.cli_report import report
from studytool.cli_watch import watch
from studytool.errors import StudytoolError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(data, name="data")
app.add_typer(cluster)
app.add_typer(model)
app.add_typer(watch)
app.add_typer(report)
weights = typer.Typer(no_args_is_help=True, help="Fetch, list and check pre-trained weights.")
app.add_typer(weights, name="weights")


def main() -> None:
    """Run the command line: exit 0 on success, 1 with one line on stderr for what the user can mend, 2 for usage."""
    try:
        app()
    except StudytoolError as error:
        _end(str(error))
    except OSError as error:
        # A file or folder that cannot be read or written: the system's own words, without the way there.
        _end(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _end(line: str) -> NoReturn:
    # A file's name may hold line breaks and terminal codes.
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    print(f"studytool: {shown}", file=sys.stderr)
    raise SystemExit(1) from None


@app.callback()
def about() -> None:
    """Find out which video network, initialization, freezing and learning rate classifies your subtomograms best."""


@app.command()
def run(
    study: StudyFile,
    override: Overrides = [],  # noqa: B006 - typer makes a new list for every call
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line for every epoch.")] = False,
    new: Annotated[bool, typer.Option("--new", help="Put existing results aside and begin anew.")] = False,
    budget_hours: Annotated[float | None, typer.Option(help="Device-hours the study may use in all.")] = None,
    budget_trials: Annotated[int | None, typer.Option(help="Trials the study may begin in all.")] = None,
    no_plan: Annotated[bool, typer.Option("--no-plan", help="Do not estimate first what it will take.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Use the Ray cluster at HOST:PORT, or `auto` on one of its nodes.")
    ] = None,
) -> None:
    """Run a study, or what is missing of it, and print which arm is best."""
    from rich.console import Console

    from studytool.spec import load_study

    budget = {"device_hours": budget_hours, "trials": budget_trials}
    given = [f"budget.{name}={value}" for name, value in budget.items() if value is not None]
    spec = load_study(study, [*override, *given])
    # Only now, as it takes seconds: a misspelt key is said at once.
    from studytool.study.run import BUDGET, run_study
    from studytool.study.signals import SIGNAL_EXIT_CODES, EndedBySignal

    try:
        end = run_study(
            spec,
            study.read_text(encoding="utf-8"),
            Console(),
            verbose=verbose,
            new=new,
            estimate=not no_plan,
            address=address,
        )
    except EndedBySignal as signal:  # before the first trial, or after the last one
        print(f"studytool: ended by {signal.name}; the same command goes on where the study stopped", file=sys.stderr)
        raise typer.Exit(signal.exit_code) from None
    if end.ended_by == BUDGET:
        return
    if end.ended_by:
        raise typer.Exit(SIGNAL_EXIT_CODES[end.ended_by])
    if not any(summary.is_winner for summary in end.summaries):
        raise StudytoolError(
            f"no trial of the study finished; see {spec.folder / 'trials'}/*/trial.log for the reasons"
        )


@app.command()
def plan(
    study: StudyFile,
    override: Overrides = [],  # noqa: B006
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Use only what was measured before and trials that have run.")
    ] = False,
) -> None:
    """Say what is left of a study, what it will take and what is missing; nothing is started."""
    from rich.console import Console

    from studytool.spec import load_study
    from studytool.study.choosing import choose, share_gpu
    from studytool.study.plan import SECONDS_IN_ALL, meter_of, plan_study
    from studytool.study.plantext import plan_lines
    from studytool.study.progress import say

    console = Console()
    spec = load_study(study, override)
    seconds = 0.0 if no_measure else SECONDS_IN_ALL
    on_measuring = partial(say, console)
    choices, chosen = choose(spec, seconds_in_all=seconds, on_measuring=on_measuring)
    if spec.resources.trials_per_gpu == "auto":
        spec, why = share_gpu(spec, choices, meter_of(spec, seconds, on_measuring))
        chosen += (why,)
    planned = plan_study(spec, choices=choices, seconds_in_all=seconds, on_measuring=on_measuring)
    for line in [*plan_lines(planned), *chosen]:
        say(console, line)


@app.command()
def train(
    study: StudyFile,
    override: Annotated[
        list[str], typer.Option("--set", metavar="FACTOR=VALUE", help="Choose a factor, e.g. learning_rate=1e-3.")
    ] = [],  # noqa: B006
    seed: Annotated[int | None, typer.Option(help="The trial's seed [default: the study's].")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for checkpoints [default: studies/NAME/single].")] = None,
) -> None:
    """Train one trial of a study here and now, without Ray: the quickest way to see that data and settings work."""
    from rich.console import Console

    from studytool.spec import factor_overrides, load_study, single_trial
    from studytool.study.choices import Choices
    from studytool.study.run import ensure_dataset
    from studytool.training.loop import train_trial

    spec = load_study(study)
    trial = Choices().applied(single_trial(spec, factor_overrides(override), seed=spec.seed if seed is None else seed))
    console = Console()
    ensure_dataset(spec.data, console)
    folder = out or spec.folder / "single" / trial.trial_id
    for epoch in train_trial(trial, folder):
        console.print(
            f"epoch {epoch.epoch}/{trial.train.max_epochs}  train loss {epoch.train_loss:.3f}  "
            f"val loss {epoch.val.loss:.3f}  {spec.metric.name} {epoch.val.metric(spec.metric.name):.3f}  "
            f"{epoch.cost.seconds:.0f} s",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"best checkpoint: {folder / 'best.safetensors'}", highlight=False, soft_wrap=True)


@app.command()
def models(name: Annotated[str | None, typer.Argument(help="A backbone, for all that is known of it.")] = None) -> None:
    """List the backbones: source, parameters, GFLOPs, stages that can be frozen, initializations, licence."""
    from rich.console import Console

    from studytool.models.catalogue import model_text, models_table

    if name is None:
        Console().print(models_table())
    else:
        print(model_text(name))


@app.command()
def pretrain(
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The weights to write.")],
    backbone: Annotated[str, typer.Option(help="A backbone, as `studytool models` lists them.")] = "r2plus1d_tiny",
    clips: Annotated[Path | None, typer.Option(help="A folder LABEL/VIDEO to learn from [default: generated].")] = None,
    count: Annotated[int, typer.Option(help="How many clips to generate for an epoch.")] = 40_000,
    epochs: Annotated[int, typer.Option(help="Passes over the clips.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the clips and the network.")] = 0,
) -> None:
    """Pre-train a network on moving pictures; a study uses the result as `init: checkpoint:OUT.safetensors`."""
    from studytool.pretraining.train import pretrain

    card = pretrain(
        backbone,
        out=out,
        videos=clips,
        clips=count,
        epochs=epochs,
        seed=seed,
        on_progress=lambda p: print(
            f"step {p.step}/{p.steps}  loss {p.loss:.3f}  accuracy {p.accuracy:.3f}", flush=True
        ),
    )
    print(f"{out}: accuracy on held-out clips {card['held_out_accuracy']}")


@weights.command("list")
def list_files() -> None:
    """List the published weights and whether they are here."""
    from rich.console import Console

    from studytool.models.catalogue import weights_table

    Console().print(weights_table())


@weights.command()
def fetch(
    backbone: Annotated[str, typer.Argument(help="A backbone, as `studytool models` lists them.")],
    init: Annotated[str, typer.Option(help="Which of its weights.")] = "kinetics400",
) -> None:
    """Download the weights of a backbone into the cache, or take an interrupted download up again."""
    from rich.progress import Progress

    from studytool.models.weights import fetch_weights

    with Progress(disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(f"{backbone} {init}", total=None)
        path = fetch_weights(backbone, init, lambda done, total: progress.update(task, completed=done, total=total))
    print(f"{backbone} {init}: {path or 'needs no file'}")


@weights.command("verify")
def verify_weights() -> None:
    """Check the weights that are here against their published digests."""
    from studytool.errors import WeightsError
    from studytool.models.weights import list_weights

    here = [row for row in list_weights() if row.path.is_file()]
    bad = [row for row in here if row.state not in ("published", "recorded", "unchecked")]
    for row in here:
        print(f"{row.path}: {row.state}")
    if bad:
        raise WeightsError(f"{len(bad)} of {len(here)} files are not what was published; remove them and fetch again")


if __name__ == "__main__":
    main()
