"""`studytool predict`: which network, which volumes, what is done to them, what is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from studytool.data.export import ID_COLUMN
from studytool.data.importing import recognize
from studytool.data.manifest import MANIFEST_NAME
from studytool.data.preparation import Contrast, prepare
from studytool.data.readers.dynamo import DynamoSource
from studytool.data.readers.source import ReadOptions, Source
from studytool.data.readers.star import StarSource
from studytool.data.readers.startable import read_star_table
from studytool.data.shards import Dataset, open_dataset
from studytool.errors import DataError, StudytoolError
from studytool.labelling import star as star_files
from studytool.labelling.labels import REJECTED, Labels, label
from studytool.labelling.tables import check_embedding_name, origins_of, write_csv, write_dynamo, write_embedding
from studytool.predict import OnProgress, Predictions, Predictor, fits, rows_of
from studytool.training.calibration import Calibration, with_temperature
from studytool.training.metrics import score

Progress = Callable[[str], AbstractContextManager[OnProgress]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to label and what to write. `invert` and `transpose` overrule what the training volumes' import did.

    `split` takes only these particles of a dataset. `calibrate` divides the logits by the temperature that suits the
    validation split.
    """

    source: Path
    out: Path
    options: ReadOptions = field(default_factory=lambda: ReadOptions(label=""))
    split: str | None = None
    reject_below: float | None = None
    per_class: bool = False
    embed: Path | None = None
    invert: bool | None = None
    transpose: str | None = None
    calibrate: bool = True
    device: str | None = None
    workers: int | None = None


def find_trial(text: str) -> Path:
    """The folder of a trained network: a trial's own folder, or that of the best trial of a study's best arm.

    Raises:
        StudytoolError: it is none of these, or no trial of the study has finished.
    """
    folder = Path(text)
    if (folder / "best.json").is_file():
        return folder
    from studytool.report.compare import summarize_arms
    from studytool.study.folder import find_study
    from studytool.study.records import read_records

    spec = find_study(text)
    summaries = summarize_arms(spec, read_records(spec.folder))
    best = next((summary.best_trial for summary in summaries if summary.is_winner), None)
    if best is None:
        raise StudytoolError(f"{text}: no trial of this study has finished yet; see `studytool status {text}`")
    return spec.folder / "trials" / best


def label_source(trial_folder: Path, request: Request, *, say: Say, progress: Progress) -> Labels:
    """Label the particles of a source with the network of a trial, and write what was asked for.

    Raises:
        DataError: the source cannot be read, or the output does not suit it.
        WeightsError: there is no network.
    """
    if request.embed is not None:
        check_embedding_name(request.embed)
        _check_place(request.embed, request)
    dataset = _dataset(request)
    source = None if dataset is not None else recognize(request.source, request.options)
    _check_out(request, source)
    with Predictor(trial_folder, device=request.device) as predictor:
        say(f"network: {predictor.trial.model.backbone} of {trial_folder}")
        calibration = _calibration(predictor, request, say)
        if dataset is not None and fits(predictor.record, dataset) and request.invert is None:
            predictions, origins = _of_dataset(predictor, request, say, progress)
        else:
            source = source or recognize(request.source, request.options)
            predictions, origins = _of_source(predictor, source, request, say, progress)
        _compare_contrast(calibration, predictions.contrast, say)
    raw = predictions.probabilities
    temperature = calibration.temperature if calibration else 1.0
    labels = label(
        with_temperature(raw, temperature),
        predictions.classes,
        most_probable=raw.argmax(axis=1),
        reject_below=request.reject_below,
    )
    _write(request, source, predictions, origins, labels, say)
    return labels


def _dataset(request: Request) -> Dataset | None:
    return open_dataset(request.source) if (request.source / MANIFEST_NAME).is_file() else None


def _check_out(request: Request, source: Source | None) -> None:
    """Refuse what could not be written in the end."""
    ending = request.out.suffix.lower()
    kind = "a studytool dataset" if source is None else source.kind
    if ending not in (".csv", ".star", ".tbl"):
        raise DataError(
            f"{request.out}: labels are written as .csv, or as .star of a STAR file, .tbl of a Dynamo table"
        )
    if (ending == ".star" or request.per_class) and not (ending == ".star" and isinstance(source, StarSource)):
        raise DataError(f"{request.out}: STAR files can be written of a STAR file, this is {kind}; give a .csv")
    if ending == ".tbl" and not isinstance(source, DynamoSource):
        raise DataError(f"{request.out}: a Dynamo table can be written of a Dynamo table, this is {kind}; give a .csv")
    _check_place(request.out, request)
    if request.per_class and _may_be_of_a_class(request):
        raise DataError(
            f"{request.source}: --per-class writes files named {request.out.stem}_CLASS.star, the source may be one of "
            "them, which is left as it is; choose another name for --out"
        )
    if request.split is not None and source is not None and not any(e.split == request.split for e in source.entries):
        raise DataError(f"{request.source}: no particle is in the split {request.split!r}; leave --split away")
    if request.split is not None and ending != ".csv":
        raise DataError(f"{request.out}: --split leaves particles out, a table has to keep them; give a .csv")


def _check_place(out: Path, request: Request) -> None:
    """Refuse a file that is the source or a folder, before anything is computed for it."""
    if out.is_dir():
        raise DataError(f"{out}: is a folder; give the name of a file")
    if request.source.exists() and out.exists() and out.samefile(request.source):
        raise DataError(f"{out}: is the source itself, which is left as it is; choose another name")


def _may_be_of_a_class(request: Request) -> bool:
    source, out = request.source.resolve(), request.out.resolve()
    return source.parent == out.parent and source.name.startswith(f"{out.stem}_") and source.suffix == out.suffix


def _of_dataset(predictor: Predictor, request: Request, say: Say, progress: Progress) -> tuple[Predictions, list[str]]:
    split = request.split
    named = open_dataset(request.source, predictor.data_split_for(split, None))
    rows = rows_of(named, split)
    say(f"volumes: {len(rows)} of {request.source}, of the box and voxel size of the training volumes")
    with progress("labelling") as on_progress:
        predictions = predictor.label_rows(named, rows, features=request.embed is not None, on_progress=on_progress)
    _say_scores(predictor, named, rows, predictions, split, say)
    return predictions, [f"{request.source}, particle {name}" for name in named.particle_ids[rows].tolist()]


def _of_source(
    predictor: Predictor, source: Source, request: Request, say: Say, progress: Progress
) -> tuple[Predictions, list[str]]:
    wanted = predictor.preparation()
    preparer = prepare(
        source,
        wanted,
        raw=not _is_of_studytool(request, source),
        voxel_size_angstrom=request.options.voxel_size_angstrom,
        invert=request.invert,
        transpose=request.transpose,
    )
    if request.split is not None:
        chosen = tuple(entry for entry in source.entries if entry.split == request.split)
        preparer = type(preparer)(source, chosen, wanted, preparer.settings)
    say(f"volumes: {len(preparer.entries)} ({source.kind}); {preparer.what_is_done()}")
    with progress("labelling") as on_progress:
        predictions = predictor.label_source(
            preparer, features=request.embed is not None, workers=request.workers, on_progress=on_progress
        )
    return predictions, origins_of(preparer.entries)


def _is_of_studytool(request: Request, source: Source) -> bool:
    """Whether the volumes went through an import before: those of a dataset, and what `data export` has written."""
    if isinstance(source, StarSource):
        return ID_COLUMN in read_star_table(request.source).particles
    return source.kind == "studytool dataset"


def _calibration(predictor: Predictor, request: Request, say: Say) -> Calibration | None:
    try:
        calibration = predictor.calibration()
    except PermissionError as error:
        say(f"note: probabilities are not calibrated: {error.filename}: {error.strerror}")
        return None
    if calibration is None:
        say(
            f"note: probabilities are not calibrated, and contrast is not compared: {predictor.trial.data_path}, which "
            "the network was trained on, is not there or was changed"
        )
        return None
    if not request.calibrate:
        return Calibration(**{**calibration.__dict__, "temperature": 1.0})
    say(
        f"temperature of the probabilities: {calibration.temperature:.3g} (loss on {calibration.count} validation "
        f"volumes {calibration.loss_before:.3f} without, {calibration.loss_after:.3f} with it)"
    )
    return calibration


def _compare_contrast(calibration: Calibration | None, contrast: Contrast | None, say: Say) -> None:
    """Say it if these particles are dark and those of the training were bright, or the other way round."""
    if calibration is None or contrast is None:
        return
    trained = Contrast(calibration.contrast, calibration.contrast_error)
    if trained.sign * contrast.sign == -1:
        words = {1: "bright", -1: "dark"}
        say(
            f"warning: these particles are {words[contrast.sign]} ({contrast.mean:+.2f} deviations against their "
            f"surroundings), those of the training were {words[trained.sign]} ({trained.mean:+.2f}); the labels are "
            "worth nothing if that is not meant: see --invert and --no-invert"
        )


def _say_scores(
    predictor: Predictor,
    dataset: Dataset,
    rows: np.ndarray[tuple[int], np.dtype[np.int64]],
    predictions: Predictions,
    split: str | None,
    say: Say,
) -> None:
    """How well the labels match the dataset's own, where they are of the same classes."""
    classes = dataset.manifest.classes
    if not {*classes} <= {*predictions.classes}:
        return
    place = np.array([predictions.classes.index(name) for name in classes])
    if split is None and dataset.fingerprint == predictor.record.data_fingerprint:
        say("this is the dataset that the network was trained on; --split test scores it on volumes it has not seen")
        return
    scores = score(predictions.probabilities, place[dataset.labels[rows]], len(predictions.classes))
    line = f"accuracy {scores.accuracy!r}, balanced {scores.balanced_accuracy!r}, against the labels of the dataset"
    logged = predictor.record.result.test
    if split == "test" and logged is not None and dataset.fingerprint == predictor.record.data_fingerprint:
        line += f"; logged were {logged.accuracy!r} and {logged.balanced_accuracy!r}"
    say(line)


def _write(
    request: Request,
    source: Source | None,
    predictions: Predictions,
    origins: Sequence[str],
    labels: Labels,
    say: Say,
) -> None:
    if request.out.suffix.lower() == ".csv":
        write_csv(request.out, predictions.particle_ids.tolist(), origins, labels)
    elif isinstance(source, StarSource):
        star_files.write_labelled_star(request.source, request.out, labels)
    else:
        write_dynamo(request.source, request.out, labels)
    written = [str(request.out)]
    if request.per_class:
        written += map(str, star_files.write_star_per_class(request.source, request.out, labels).values())
    if request.embed is not None and predictions.features is not None:
        write_embedding(request.embed, predictions.particle_ids, predictions.features, labels)
        written.append(str(request.embed))
    counts = labels.counts()
    column = star_files.NUMBER if request.out.suffix.lower() == ".star" else "class"
    for number, name in enumerate(labels.classes, start=1):
        say(f"  {column} {number} = {name}: {counts[name]}")
    if request.reject_below is not None:
        say(f"  {column} 0 = {REJECTED}, probability below {request.reject_below:g}: {counts.get(REJECTED, 0)}")
    for path in written:
        say(path)
