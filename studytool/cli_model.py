"""The commands on a finished trial: `studytool predict`, `export`, `show`. Each handler imports what it needs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

model = typer.Typer()

Trial = Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's folder, or a study (then its best trial).")]


@model.command()
def predict(
    trial: Trial,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="What `data import` reads; labels are not needed.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .csv; .star of a STAR file, .tbl of a Dynamo table.")],
    split: Annotated[str | None, typer.Option(help="Only this split of a dataset: train, val or test.")] = None,
    reject_below: Annotated[float | None, typer.Option(min=0, max=1, help="Give no label below this probability.")] = (
        None
    ),
    per_class: Annotated[bool, typer.Option("--per-class", help="Also a STAR file for every class.")] = False,
    embed: Annotated[Path | None, typer.Option(metavar="FILE", help="Also features, as .npz or .parquet.")] = None,
    voxel_size: Annotated[float | None, typer.Option(help="Å, where the files do not tell, or not the truth.")] = None,
    invert: Annotated[
        bool | None, typer.Option("--invert/--no-invert", help="Of the contrast [as the training data's import].")
    ] = None,
    transpose: Annotated[str | None, typer.Option(help="Axes of the volumes, such as xyz->zyx.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that the paths in a table count from.")] = None,
    volumes: Annotated[Path | None, typer.Option(help="Folder of the volumes of a Dynamo table.")] = None,
    tomograms: Annotated[Path | None, typer.Option(help="Folder of tomograms to cut boxes from.")] = None,
    coordinates: Annotated[Path | None, typer.Option(help="Table of positions in the tomograms.")] = None,
    cut: Annotated[int | None, typer.Option(help="Side of boxes cut from tomograms, in their voxels.")] = None,
    raw_probabilities: Annotated[
        bool, typer.Option("--raw-probabilities", help="Without the temperature fitted on the validation split.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N [a GPU where there is one].")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that read [one per core, if it pays].")] = None,
) -> None:
    """Label particles with a trained network: a class, its probability and the entropy for each."""
    from rich.console import Console

    from studytool.data.readers.source import ReadOptions
    from studytool.labelling.label import find_trial, label_source
    from studytool.labelling.request import Request
    from studytool.study.counting import progress_of

    options = ReadOptions(
        label="",
        root=root,
        volumes=volumes,
        tomograms=tomograms,
        coordinates=coordinates,
        cut=cut,
        voxel_size_angstrom=voxel_size,
    )
    request = Request(
        source=source,
        out=out,
        options=options,
        split=split,
        reject_below=reject_below,
        per_class=per_class,
        embed=embed,
        invert=invert,
        transpose=transpose,
        calibrate=not raw_probabilities,
        device=device,
        workers=workers,
    )
    label_source(find_trial(trial), request, say=partial(print, flush=True), progress=partial(progress_of, Console()))


@model.command()
def export(
    trial: Trial,
    to: Annotated[str, typer.Option(help="exported-program, torchscript, onnx or mlflow.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The file, or for mlflow the folder, to write.")],
    invert: Annotated[
        bool | None, typer.Option("--invert/--no-invert", help="Of the contrast [as the training data's import].")
    ] = None,
) -> None:
    """Write a trained network, with its preprocessing, for other programs: raw volumes in, probabilities out."""
    from studytool.exporting import export_trial
    from studytool.labelling.label import find_trial

    for line in export_trial(find_trial(trial), to, out, invert=invert):
        print(line)


@model.command()
def show(
    trial: Trial,
    out: Annotated[Path, typer.Option(metavar="PNG", help="The picture to write.")],
    count: Annotated[int, typer.Option(min=1, max=60, help="How many test particles to draw.")] = 12,
    seed: Annotated[int, typer.Option(help="Draws the particles.")] = 0,
) -> None:
    """Draw what a trial has learned: its curve, its confusion matrix, and test particles with their labels."""
    from studytool.labelling.label import find_trial
    from studytool.showing import write_trial_picture

    for line in write_trial_picture(find_trial(trial), out, count=count, seed=seed):
        print(line)
