"""A whole study, from the study file to the table: the order in which the rooms are visited."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from studytool.data.cachefolder import cache_folder
from studytool.data.damage import damaged_shards
from studytool.data.leakage import check_leakage
from studytool.data.remote_copy import local_copy
from studytool.data.shards import Dataset, Manifest, open_dataset, read_manifest
from studytool.errors import DamagedError, DataError, StudytoolError, WeightsError
from studytool.files import write_text
from studytool.models.weights import fetch_checkpoint, missing_weights
from studytool.remote import is_remote
from studytool.report.compare import ArmSummary, summarize_arms
from studytool.report.table import plain_text, table_notes, table_text
from studytool.settings import DataSettings, SimulateSettings
from studytool.spec import StudySpec
from studytool.study.budget import Budget
from studytool.study.choices import Choices, open_choices
from studytool.study.choosing import SECONDS_IN_ALL, choose, share_gpu
from studytool.study.counting import progress_of
from studytool.study.director import Director
from studytool.study.environment import describe_environment
from studytool.study.events import Observer
from studytool.study.folder import keep_study
from studytool.study.ledger import Ledger, set_aside
from studytool.study.observers import Housekeeping, TellTracker, TrialLogs, keep_run_ids
from studytool.study.plan import meter_of, plan_study
from studytool.study.plantext import total_lines
from studytool.study.progress import Progress, say
from studytool.study.reporting import try_report
from studytool.study.signals import SIGNAL_EXIT_CODES, Signals
from studytool.study.tracking import Tracker
from studytool.training.predictions import PREDICTIONS
from studytool.training.trained import WEIGHTS

BUDGET = "budget"
_MEASURE_SECONDS = 20.0
"""How long `run` measures at most for its estimate; `studytool plan` takes its time."""


@dataclass(frozen=True)
class StudyEnd:
    """How a run of a study ended: its arms as they stand and, if it was cut short, by which signal or the `BUDGET`."""

    summaries: tuple[ArmSummary, ...]
    ended_by: str | None


def run_study(
    spec: StudySpec,
    yaml_text: str,
    console: Console,
    *,
    verbose: bool = False,
    new: bool = False,
    estimate: bool = False,
    address: str | None = None,
) -> StudyEnd:
    """Do what is missing of a study: data, search, confirmation, table.

    Whatever can be found out beforehand is found out before the first trial: data, weights, settings that differ from
    those of existing results. With `new` those are put aside, and the study is begun anew. With `estimate` it says
    first what the study will take. With `address` the trials run on the Ray cluster there, else on a Ray of our own.

    Raises:
        StudytoolError: one line that says what has to be mended.
        EndedBySignal: a signal came before or after the trials.
    """
    with Signals() as signals:
        if address is not None:
            from studytool.study.clustercheck import with_full_paths

            spec = with_full_paths(spec, address)
        _check_weights(spec)
        if not is_remote(spec.data.path):
            ensure_dataset(spec.data, console)
        spec, folder, damage = _without_damage(spec, console)
        aside = set_aside(spec) if new else None
        if aside:
            say(console, f"begun anew; the results until now are in {aside}")
        dataset = open_dataset(folder, spec.data.split)
        notes = (*damage, *check_leakage(dataset).notes)
        with closing(Ledger(spec, dataset.fingerprint)) as ledger, ExitStack() as after:
            tracker = Tracker(spec.tracking.uri, spec, uid=ledger.uid)
            after.callback(lambda: keep_run_ids(tracker, ledger, ledger.records))  # once all is written
            after.enter_context(tracker)
            for note in ledger.notes:
                say(console, note)
            chosen = _choose(spec, ledger, console, on_cluster=address is not None)
            spec = _shared_out(spec, ledger, console, on_cluster=address is not None)
            environment = {**describe_environment(sys.argv), **chosen}
            keep_study(spec, environment)
            if ledger.storage is not None:
                ledger.storage.push_all()
            tracker.open_study(yaml_text, environment, folder / "manifest.json")
            tracker.catch_up(ledger.records)
            if estimate and address is None:  # it is measured on this machine, which may have no GPU
                _say_estimate(spec, console)
            ended_by = _run_trials(spec, ledger, tracker, dataset, console, signals, verbose=verbose, address=address)
            return _close(spec, ledger, tracker, ended_by, console, dataset, notes)


def _without_damage(spec: StudySpec, console: Console) -> tuple[StudySpec, Path, tuple[str, ...]]:
    """The study without the damaged shards of its dataset, where that is here, and what has to be said of it.

    Every shard is held against its checksum before anything relies on it. What is left out is decided here, once: the
    trials are told, so that all nodes read the same.

    Raises:
        DataError: a shard is damaged, and `data.on_damage` is "stop".
    """
    path, left_out = spec.data.path, {*spec.data.leave_out}
    copies_are_new = not is_remote(path)
    while True:
        try:
            folder = local_copy(path, look_again=True, leave_out=left_out)
            damaged = _damaged(folder, console)
        except DamagedError as error:  # at its address
            if spec.data.on_damage == "stop":
                raise
            left_out |= {*error.names}
            continue
        if not damaged:
            break
        if not copies_are_new:
            copies_are_new = True
            for name in damaged:
                (folder / name).resolve().unlink(missing_ok=True)
        elif spec.data.on_damage == "skip":
            left_out |= {*damaged}
            folder = local_copy(path, leave_out=left_out)
            break
        else:
            raise DataError(
                f"{folder / damaged[0]}: missing or damaged; {len(damaged)} of {len(read_manifest(folder).shards)} "
                f"shards of {folder} are; fetch or make the dataset again, or set data.on_damage: skip to go on "
                "without them"
            )
    if not left_out:
        return spec, folder, ()
    of = len(left_out) + len(read_manifest(folder).shards)
    note = f"left out as damaged: {len(left_out)} of {of} shards of {path}, the first of them {min(left_out)}"
    say(console, note)
    data = spec.data.model_copy(update={"leave_out": tuple(sorted(left_out))})
    return spec.model_copy(update={"data": data}), folder, (note,)


def _damaged(folder: Path, console: Console) -> list[str]:
    with progress_of(console, f"checking {folder}") as on_progress:
        return damaged_shards(folder, read_manifest(folder), on_progress, notes=cache_folder("checked"))


def _choose(spec: StudySpec, ledger: Ledger, console: Console, *, on_cluster: bool) -> dict[str, str]:
    """See that the ledger has what `auto` means in this study; the same in words, for MLflow."""
    wanted = open_choices(spec)
    if ledger.choices is None and wanted:
        if on_cluster:
            raise StudytoolError(
                f"train.{min(wanted)}: auto is measured on the machine that runs the study, which is not that of its "
                "trials here; give a value"
            )
        choices, lines = choose(spec, on_measuring=lambda line: say(console, line))
        ledger.keep_choices(choices)
        for line in lines:
            say(console, line)
    return {f"auto.{name}": str(value) for name, value in asdict(ledger.choices or Choices()).items() if name in wanted}


def _shared_out(spec: StudySpec, ledger: Ledger, console: Console, *, on_cluster: bool) -> StudySpec:
    """The study with a number of trials that share a GPU."""
    if spec.resources.trials_per_gpu != "auto":
        return spec
    if on_cluster:
        raise StudytoolError(
            "resources.trials_per_gpu: auto is measured on the machine that runs the study; give a number"
        )
    meter = meter_of(spec, SECONDS_IN_ALL, lambda line: say(console, line))
    spec, why = share_gpu(spec, ledger.choices or Choices(), meter)
    say(console, why)
    return spec


def _say_estimate(spec: StudySpec, console: Console) -> None:
    planned = plan_study(spec, seconds_in_all=_MEASURE_SECONDS, on_measuring=lambda line: say(console, line))
    if any(arm.search or arm.confirm for arm in planned.arms):
        for line in total_lines(planned):
            say(console, line)


def ensure_dataset(settings: DataSettings, console: Console) -> Manifest:
    """The dataset's manifest; a missing dataset is simulated if the study file says how.

    Raises:
        DataError: no usable dataset is there, or it was simulated in another way than the study file says.
    """
    folder = (
        local_copy(settings.path, leave_out=settings.leave_out) if is_remote(settings.path) else Path(settings.path)
    )
    if settings.simulate is not None and not is_remote(settings.path):
        if not folder.exists():
            _simulate(settings.simulate, folder, console)
        _check_simulated_as_said(settings.simulate, folder)
    return read_manifest(folder)


def _simulate(settings: SimulateSettings, folder: Path, console: Console) -> None:
    from studytool.data.simulate import simulate_dataset

    say(console, f"simulating {folder}")
    with progress_of(console, f"simulating {folder}") as on_progress:
        simulate_dataset(settings, folder, on_progress=on_progress)


def _check_simulated_as_said(settings: SimulateSettings, folder: Path) -> None:
    """A folder that an earlier, other study file made must not pass for what this one describes."""
    provenance = read_manifest(folder).provenance
    if provenance.get("kind") != "simulation":
        return
    there, said = provenance["settings"], settings.model_dump(mode="json")
    for key in said:
        if there.get(key) != said[key]:
            raise DataError(
                f"{folder}: was simulated with {key} = {there.get(key)!r}, data.simulate.{key} now says {said[key]!r}; "
                "choose another data.path, or remove the folder to have it made anew"
            )


def _check_weights(spec: StudySpec) -> None:
    """Stop before the first trial if an arm's pre-trained weights are neither in the cache nor to be had."""
    choices = {
        (trial.model.backbone, trial.model.init)
        for arm in spec.list_arms()
        for trial in [spec.trial(arm, {}, phase="search", number=0, seed=spec.seed)]
    }
    for backbone, init in sorted(choices):
        fetch_checkpoint(init)
        message = missing_weights(backbone, init)
        if message:
            raise WeightsError(message)


def check_inputs(spec: StudySpec, dataset: Dataset) -> None:
    """Check that weights and data are still those that the study began with.

    Raises:
        StudytoolError: which is not, and that the study may go on when it is back.
    """
    try:
        _check_weights(spec)
        damaged = damaged_shards(dataset.folder, dataset.manifest, notes=cache_folder("checked"))
        if damaged:
            raise DataError(f"{dataset.folder / damaged[0]}: missing or damaged")
        if open_dataset(dataset.folder, spec.data.split).fingerprint != dataset.fingerprint:
            raise DataError(f"{dataset.folder}: other data than the study began with")
    except StudytoolError as error:
        raise StudytoolError(
            f"{error}; the study stopped and lost nothing: put right what its trials need, and the same command goes on"
        ) from error


def _run_trials(
    spec: StudySpec,
    ledger: Ledger,
    tracker: Tracker,
    dataset: Dataset,
    console: Console,
    signals: Signals,
    *,
    verbose: bool,
    address: str | None,
) -> str | None:
    """Run what is missing; the name of the signal that ended it early, or None."""
    from studytool.study.nodes import ray_session
    from studytool.study.nodewatch import NodeWatch
    from studytool.study.tuning import plan_slots, run_trials

    # The log first: of a trial that failed it is uploaded.
    observers: list[Observer] = [TrialLogs(ledger), TellTracker(tracker, ledger), Housekeeping(ledger)]
    director = Director(spec, ledger, dataset.fingerprint, observers)
    if director.finished:
        director.announce_decided()
        return BUDGET if director.stopped_by_budget else None
    left = director.trials_left
    say(
        console,
        f"study {spec.name}: {len(spec.list_arms())} arms, {left['search']} search and {left['confirm']} confirm "
        f"trials to run; results in {spec.storage_address or spec.folder}",
    )
    try:
        needs = None
        if address is not None:
            from studytool.study.clustercheck import check_nodes, needs_of

            needs = needs_of(spec, ledger.uid, dataset.manifest)
            check_nodes(needs, address, console)
        with ray_session(address) as scratch:
            signals.watch()  # Ray has put its own handlers in place
            slots = plan_slots(spec.resources, on_cluster=address is not None)
            nodes = NodeWatch(spec.resources, slots, needs) if needs is not None else None
            with Progress(spec, console, slots.count, verbose=verbose) as progress:
                observers.append(progress)
                progress.take_up(ledger.records)
                director.announce_decided()
                ended_by = run_trials(
                    director,
                    ledger.trial_folder,
                    slots,
                    scratch=scratch,
                    signals=signals,
                    check_inputs=partial(check_inputs, spec, dataset),
                    nodes=nodes,
                    storage_address=spec.storage_address,
                    keep_workers=spec.resources.keep_workers,
                )
    except BaseException:
        if signals.caught is None:
            raise
        ended_by = signals.caught
    ended_by = ended_by or (None if director.finished else "SIGINT")
    if ended_by is None and director.stopped_by_budget:
        ended_by = BUDGET
    if ended_by:
        tracker.interrupt()  # before anything that takes time
    return ended_by


def _close(
    spec: StudySpec,
    ledger: Ledger,
    tracker: Tracker,
    ended_by: str | None,
    console: Console,
    dataset: Dataset,
    data_notes: Sequence[str],
) -> StudyEnd:
    """Write the comparison down, here and in MLflow, with what has to be known of the data; say where to look next."""
    summaries = summarize_arms(spec, ledger.records)
    text = plain_text(summaries, spec) + "".join(f"{note}\n" for note in data_notes)
    write_text(spec.folder / "table.txt", text)
    for summary in summaries:
        tracker.close_arm(summary)
    winner = next((s for s in summaries if s.is_winner), None)
    storage = ledger.storage
    if storage is not None:
        if winner and winner.best_trial:
            storage.fetch(f"trials/{winner.best_trial}/{WEIGHTS}")
        for record in ledger.records:
            if record.test is not None:
                storage.fetch(f"trials/{record.trial_id}/{PREDICTIONS}")
    if winner and winner.best_trial:
        tracker.log_checkpoint(winner.best_trial, ledger.trial_folder(winner.best_trial))
    tracker.close_study(text, "INTERRUPTED" if ended_by else "COMPLETE")
    # After a signal there is no time for it; `studytool report` writes it.
    in_haste = ended_by in SIGNAL_EXIT_CODES
    if not in_haste:
        say(console, "writing the report")
    written = () if in_haste else try_report(spec, ledger.records, dataset, console, embed=ended_by is None)
    console.print()
    if console.is_terminal:
        console.print(table_text(summaries, spec))
        for note in (*table_notes(summaries, spec), *data_notes):
            say(console, note)
    else:
        say(console, text)
    if storage is not None:
        storage.push_all()
    if written:
        tracker.log_report(written)
        say(console, f"report:            {written[0]}")
    say(console, f"table and figures: {spec.folder}")
    say(console, f"compare the runs:  {tracker.how_to_look}")
    if winner and winner.best_trial:
        say(console, f"best checkpoint:   {spec.folder / 'trials' / winner.best_trial / 'best.safetensors'}")
    if ended_by == BUDGET:
        say(console, Budget(spec, ledger).words())
    elif ended_by:
        say(console, f"ended by {ended_by}; the same command goes on where the study stopped")
    return StudyEnd(summaries, ended_by)
