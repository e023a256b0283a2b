"""The commands on datasets: `studytool data …`. Each handler is short and imports what it needs."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(no_args_is_help=True, help="Make, look at and check datasets.")

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the study file, e.g. confirm.seeds=3."),
]
DatasetAddress = Annotated[str, typer.Argument(metavar="DIR", help="A dataset's folder, or its address (s3://…).")]
Split = Annotated[str, typer.Option(help="Which of the dataset's splits: stored, NAME or NAME/FOLD.")]


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
def verify(address: DatasetAddress) -> None:
    """Check every shard against its checksum and the manifest, and every voxel to be a finite number."""
    from studytool.data.remote_copy import local_copy
    from studytool.data.shards import verify_dataset

    manifest = verify_dataset(local_copy(address, look_again=True))
    print(f"{address}: {len(manifest.shards)} shards are as they were written")


@data.command()
def split(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A dataset's folder.")],
    name: Annotated[str | None, typer.Option(help="Its name in a study file [default: seedN, or kfoldK].")] = None,
    fractions: Annotated[str | None, typer.Option(metavar="A,B,C", help="Of train, val, test [0.6,0.2,0.2].")] = None,
    counts: Annotated[str | None, typer.Option(metavar="A,B,C", help="Volumes in train, val and test.")] = None,
    folds: Annotated[int | None, typer.Option(help="So many folds instead, for as many studies.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses between equally good ways.")] = 0,
) -> None:
    """Split a dataset anew by whole tomograms, check it against leaks, and store it with the dataset under a name."""
    from rich.console import Console

    from studytool.data.shards import open_dataset
    from studytool.data.splits import read_recipe, split_text, store_split
    from studytool.data.splitting import make_split
    from studytool.study.counting import progress_of

    recipe = read_recipe(fractions=fractions, counts=counts, folds=folds, seed=seed)
    dataset = open_dataset(folder)
    with progress_of(Console(), "comparing") as on_progress:
        made = make_split(dataset, recipe, name or recipe.usual_name, on_progress=on_progress)
    path = store_split(folder, made)
    print(split_text(dataset, made, path), end="")


@data.command()
def info(address: DatasetAddress, split: Split = "stored") -> None:
    """Say what a dataset holds: classes, splits, intensities, and what brightness alone would tell of the classes."""
    from rich.console import Console

    from studytool.data.info import dataset_info, info_text
    from studytool.data.remote_copy import local_copy
    from studytool.data.shards import open_dataset
    from studytool.study.counting import progress_of

    dataset = open_dataset(local_copy(address, look_again=True), split)
    with progress_of(Console(), "reading") as on_progress:
        facts = dataset_info(dataset, on_progress=on_progress)
    print(info_text(dataset, facts), end="")


@data.command()
def show(
    address: DatasetAddress,
    out: Annotated[Path, typer.Option(metavar="MONTAGE.png", help="The picture to write.")],
    per_class: Annotated[int, typer.Option(help="How many volumes of each class.")] = 4,
    seed: Annotated[int, typer.Option(help="Draws the volumes.")] = 0,
) -> None:
    """Draw the central slices of some volumes of every class."""
    from studytool.data.montage import write_montage
    from studytool.data.remote_copy import local_copy
    from studytool.data.shards import open_dataset

    write_montage(open_dataset(local_copy(address, look_again=True)), out, per_class=per_class, seed=seed)
    print(out)


@data.command()
def export(
    address: DatasetAddress,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to make.")],
    half: Annotated[bool, typer.Option("--half", help="Write MRC mode 12 (float16), which not all programs read.")] = (
        False
    ),
    split: Split = "stored",
) -> None:
    """Write a dataset as MRC files, a folder per class, with a STAR file in the manner of RELION 3."""
    from rich.console import Console

    from studytool.data.export import export_dataset
    from studytool.data.remote_copy import local_copy
    from studytool.data.shards import open_dataset
    from studytool.study.counting import progress_of

    dataset = open_dataset(local_copy(address, look_again=True), split)
    with progress_of(Console(), "writing") as on_progress:
        star = export_dataset(dataset, out, half=half, on_progress=on_progress)
    print(f"{star}: {len(dataset)} volumes")


@data.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A file or folder, known by its content.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The dataset folder to make.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be imported, and write nothing.")] = False,
    voxel_size: Annotated[float | None, typer.Option(help="Å, where the files do not tell, or not the truth.")] = None,
    rescale: Annotated[float | None, typer.Option(help="Bring all volumes to this voxel size in Å.")] = None,
    box: Annotated[int | None, typer.Option(help="Crop or pad to this side in voxels, after rescaling.")] = None,
    cut: Annotated[int | None, typer.Option(help="Side of boxes cut from tomograms, in their voxels [--box].")] = None,
    invert: Annotated[bool, typer.Option("--invert", help="Turn dark particles bright.")] = False,
    transpose: Annotated[str | None, typer.Option(help="Axes of the volumes, such as xyz->zyx.")] = None,
    normalize: Annotated[str, typer.Option(help="standard (mean 0, deviation 1) or none.")] = "standard",
    dtype: Annotated[str, typer.Option(help="float16, float32, or uint8 (normalized volumes only).")] = "float16",
    compress: Annotated[bool, typer.Option("--compress", help="zstd, to keep or send; slow to train from.")] = False,
    label_column: Annotated[str | None, typer.Option(help="Column of a table that names the class.")] = None,
    group_column: Annotated[str | None, typer.Option(help="Column of a table that names the tomogram.")] = None,
    label: Annotated[str | None, typer.Option(help="One class for all, where the source has none.")] = None,
    include: Annotated[list[str], typer.Option(help="Only this class; may be repeated.")] = [],  # noqa: B006
    exclude: Annotated[list[str], typer.Option(help="Not this class; may be repeated.")] = [],  # noqa: B006
    min_per_class: Annotated[int, typer.Option(help="Leave out classes with fewer volumes.")] = 1,
    root: Annotated[Path | None, typer.Option(help="Folder that the paths in a table count from.")] = None,
    volumes: Annotated[Path | None, typer.Option(help="Folder of the volumes of a Dynamo table.")] = None,
    tomograms: Annotated[Path | None, typer.Option(help="Folder of tomograms to cut boxes from.")] = None,
    coordinates: Annotated[Path | None, typer.Option(help="Table of positions in the tomograms.")] = None,
    tomogram_type: Annotated[str | None, typer.Option(help="Kind of reconstruction, where a project has more.")] = None,
    picks_of: Annotated[str | None, typer.Option(help="USER/SESSION or annotation, where a project has more.")] = None,
    volumes_per_shard: Annotated[int, typer.Option(help="Volumes in one file of the dataset.")] = 4096,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out volumes that cannot be read, and say so.")] = (
        False
    ),
    workers: Annotated[int | None, typer.Option(min=1, help="Processes [one per core, if it pays].")] = None,
) -> None:
    """Turn a lab's volumes into a dataset: MRC folders, STAR, Dynamo, EMAN2, EM, tomograms, arrays, other datasets."""
    from rich.console import Console

    from studytool.data.importing import import_dataset, plan_import, recognize
    from studytool.data.importplan import import_settings, oddity_lines, plan_lines, skipped_lines
    from studytool.data.readers.source import ReadOptions
    from studytool.errors import DataError
    from studytool.study.counting import progress_of

    settings = import_settings(
        voxel_size_angstrom=voxel_size,
        rescale_to_angstrom=rescale,
        box=box,
        invert=invert,
        transpose=transpose,
        normalize=normalize,
        dtype=dtype,
        compression="zstd" if compress else "none",
        include=tuple(include),
        exclude=tuple(exclude),
        min_per_class=min_per_class,
        volumes_per_shard=volumes_per_shard,
    )
    options = ReadOptions(
        label_column=label_column,
        group_column=group_column,
        label=label,
        root=root,
        volumes=volumes,
        tomograms=tomograms,
        coordinates=coordinates,
        cut=cut,
        box=box,
        voxel_size_angstrom=voxel_size,
        tomogram_type=tomogram_type,
        picks_of=picks_of,
    )
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{out}: lies in the source {source}, which is left as it is; choose a folder elsewhere")
    found = recognize(source, options)
    for line in [f"{source}: {found.kind}", *(f"note: {note}" for note in found.notes)]:
        print(line, flush=True)
    if dry_run:
        print(*plan_lines(plan_import(found, settings, skip_bad=skip_bad)), f"nothing was written to {out}", sep="\n")
        return
    try:
        with progress_of(Console(), f"importing {source.name}") as on_progress:
            manifest = import_dataset(found, out, settings, skip_bad=skip_bad, workers=workers, on_progress=on_progress)
    except KeyboardInterrupt:
        print(f"{out}: interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(f"{out}: no space left; make room, and the same command goes on where it stopped") from error
    for line in oddity_lines(manifest.provenance["oddities"]) + skipped_lines(manifest.provenance, out):
        print(line)
    print(f"{out}: {manifest.num_volumes} volumes of {len(manifest.classes)} classes")
