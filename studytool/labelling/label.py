"""`studytool predict`: which network, which volumes, what is done to them, what is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np

from studytool.data.export import ID_COLUMN
from studytool.data.importing import recognize
from studytool.data.preparation import Contrast, Preparation, preparation_of, prepare
from studytool.data.readers.shardset import ShardSet
from studytool.data.readers.source import Entry, Source
from studytool.data.readers.star import StarSource
from studytool.data.readers.startable import read_star_table
from studytool.data.shards import Dataset, open_dataset
from studytool.errors import DataError, StudytoolError
from studytool.labelling import star as star_files
from studytool.labelling.labels import REJECTED, Labels, label
from studytool.labelling.request import Request, check_outputs, digest_of_table, require_same_table
from studytool.labelling.tables import check_embedding_name, origins_of, write_csv, write_dynamo, write_embedding
from studytool.predict import OnProgress, Predictions, Predictor, fits, rows_of
from studytool.training.calibration import Calibration, with_temperature
from studytool.training.metrics import score

Progress = Callable[[str], AbstractContextManager[OnProgress]]
Say = Callable[[str], None]


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
    table_sha256 = digest_of_table(request)
    source = recognize(request.source, request.options)
    if request.split is not None and not isinstance(source, ShardSet) and not _entries_of(source, request.split):
        raise DataError(f"{request.source}: no particle is in the split {request.split!r}; leave --split away")
    with Predictor(trial_folder, device=request.device) as predictor:
        check_outputs(request, source, predictor.classes)
        say(f"network: {predictor.trial.model.backbone} of {trial_folder}")
        dataset = _dataset(predictor, request, source)
        if dataset is not None:
            _compare_normalization(predictor, dataset, say)
        calibration = _calibration(predictor, request, say)
        if dataset is not None and _is_taken_as_it_is(predictor, request, dataset):
            predictions, origins = _of_dataset(predictor, dataset, request, say, progress)
        else:
            predictions, origins = _of_source(predictor, source, dataset, request, say, progress)
        _compare_contrast(calibration, predictions.contrast, say)
    raw = predictions.probabilities
    temperature = calibration.temperature if calibration else 1.0
    labels = label(
        with_temperature(raw, temperature),
        predictions.classes,
        most_probable=raw.argmax(axis=1),
        reject_below=request.reject_below,
    )
    require_same_table(request, table_sha256)
    _write(request, source, predictions, origins, labels, say)
    return labels


def _entries_of(source: Source, split: str) -> list[Entry]:
    return [entry for entry in source.entries if entry.split == split]


def _dataset(predictor: Predictor, request: Request, source: Source) -> Dataset | None:
    """The dataset to label, with the split that the trial's own parts are of; None where the source is none.

    Raises:
        DataError: it lacks the split, or its contrast was treated unlike that of the training volumes.
    """
    if not isinstance(source, ShardSet):
        return None
    dataset = open_dataset(request.source, predictor.data_split_for(request.split, None))
    rows_of(dataset, request.split)
    here, wanted = _preparations(predictor, dataset)
    if request.invert is None and here.inverted != wanted.inverted:
        did, training_did = ("did not", "did") if wanted.inverted else ("did", "did not")
        raise DataError(
            f"{request.source}: its import {did} invert the contrast, that of the training volumes {training_did}; "
            "give --invert, or --no-invert if these particles are as bright or dark as those of the training"
        )
    return dataset


def _preparations(predictor: Predictor, dataset: Dataset) -> tuple[Preparation, Preparation]:
    """What was done to the volumes of a dataset, and to those of the training; what is not known is as in these."""
    here, wanted = preparation_of(dataset.manifest), predictor.preparation()
    return (here if here.origin == wanted.origin == "import" else wanted), wanted


def _compare_normalization(predictor: Predictor, dataset: Dataset, say: Say) -> None:
    """Say it if the scale that the network goes by was taken out of these volumes at their import."""
    here, wanted = _preparations(predictor, dataset)
    if here.normalize == "standard" != wanted.normalize and predictor.trial.input.normalize == "none":
        say(
            f"warning: {dataset.folder} was normalized at its import, the training volumes never; the labels may be "
            "worth nothing: import it with --normalize none"
        )


def _is_taken_as_it_is(predictor: Predictor, request: Request, dataset: Dataset) -> bool:
    """Whether nothing has to be done to the volumes of a dataset, by their own form or the user's word."""
    here, wanted = _preparations(predictor, dataset)
    to_normalize = wanted.normalize == "standard" != here.normalize
    asked = (request.invert, request.transpose, request.options.voxel_size_angstrom)
    return fits(predictor.record, dataset) and not to_normalize and all(option is None for option in asked)


def _of_dataset(
    predictor: Predictor, dataset: Dataset, request: Request, say: Say, progress: Progress
) -> tuple[Predictions, list[str]]:
    rows = rows_of(dataset, request.split)
    say(f"volumes: {len(rows)} of {request.source}, of the box and voxel size of the training volumes")
    with progress("labelling") as on_progress:
        predictions = predictor.label_rows(dataset, rows, features=request.embed is not None, on_progress=on_progress)
    _say_scores(predictor, dataset, rows, predictions, request.split, say)
    return predictions, [f"{request.source}, particle {name}" for name in dataset.particle_ids[rows].tolist()]


def _of_source(
    predictor: Predictor, source: Source, dataset: Dataset | None, request: Request, say: Say, progress: Progress
) -> tuple[Predictions, list[str]]:
    wanted = predictor.preparation()
    is_raw = not _is_of_studytool(request, source)
    inverted = wanted.inverted and not is_raw
    if dataset is not None:
        inverted = _preparations(predictor, dataset)[0].inverted
    preparer = prepare(
        source,
        wanted,
        raw=is_raw,
        inverted=inverted,
        voxel_size_angstrom=request.options.voxel_size_angstrom,
        invert=request.invert,
        transpose=request.transpose,
    )
    if dataset is not None:  # an entry's place is its row
        preparer = replace(preparer, entries=[source.entries[row] for row in rows_of(dataset, request.split)])
    elif request.split is not None:
        preparer = replace(preparer, entries=_entries_of(source, request.split))
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
    return isinstance(source, ShardSet)


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
    if split is None and predictor.was_trained_on(dataset):
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
    source: Source,
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
