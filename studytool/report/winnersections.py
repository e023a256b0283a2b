"""The points of a report that look closer at the winner (6 and 7), and how the study was made (9)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from studytool.data.dataset import Dataset
from studytool.errors import StudytoolError
from studytool.report import figures, words
from studytool.report.features import NEIGHBOURS, feature_maps
from studytool.report.plots import confusion_picture
from studytool.report.sections import NOT_CONFIRMED, Picture, Section, StudyResults, confirm_folders
from studytool.report.statistics import Interval
from studytool.report.tables import Table
from studytool.report.winner import (
    GroupScore,
    Mistake,
    class_scores,
    confident_mistakes,
    kept_predictions,
    scores_by_snr,
    scores_by_tomogram,
    summed_confusion,
)
from studytool.results import Outcome, TrialRecord
from studytool.training.predictions import read_test_predictions
from studytool.training.trained import read_best

NO_DATASET = "The dataset is not on this machine (any more), so its volumes cannot be shown."
_MOST_TOMOGRAMS = 24
_VERSION = "version."


def right_and_wrong(results: StudyResults, folder: Path) -> Section:
    """6: confusion matrix, classes, SNRs, tomograms and the most confident mistakes of the winner."""
    title = "What the best arm gets right and wrong"
    lead = "All on the test split, which nothing was chosen by. Hardest classes first."
    winner = results.winner
    classes = _classes(results)
    confusion = summed_confusion(results.spec, results.records, winner.arm) if winner else None
    if winner is None or confusion is None or classes is None or len(classes) != len(confusion):
        return Section("mistakes", title, lead, missing=NOT_CONFIRMED)
    pictures = [
        Picture(
            confusion_picture(confusion.tolist(), classes, folder / "confusion", title=f"{winner.arm}: all seeds"),
            "Rows: what a volume is. Columns: what it was labelled as. The diagonal is right. All seeds added.",
        )
    ]
    rows = tuple(
        (c.name, str(c.count), words.percent(c.recall), _share(c.precision), c.mostly_taken_for)
        for c in class_scores(results.spec, results.records, winner.arm, classes)
    )
    columns = ("class", "volumes", "recall, %", "precision, %", "mostly taken for")
    notes = ("Recall: how many of the class were found. Precision: how many labelled so are of the class.",)
    tables = (Table("By class", columns, rows, notes=notes),)
    missing, mistakes = _closer_look(results, classes, pictures, folder)
    listed = "\n".join(
        f"{m.particle_id}  tomogram {m.tomogram or '–'}  {m.truth} → {m.labelled}  {m.probability:.3f}"
        for m in mistakes
    )
    folded = (("Which particles these are", listed),) if mistakes else ()
    return Section("mistakes", title, lead, tables, tuple(pictures), missing, folded)


def before_and_after(results: StudyResults, folder: Path, *, embed: bool = True) -> Section:
    """7: the winner's features before and after training, in 2D."""
    title = "What the best network learned to see"
    lead = (
        "Each dot is a volume of the validation split, placed by t-SNE so that volumes which look alike to the network "
        "lie together; the axes have no meaning. Training has worked where colours that were mixed come apart."
    )
    winner, dataset, classes = results.winner, results.dataset, _classes(results)

    def without(why: str) -> Section:
        return Section("features", title, lead, missing=why)

    if not embed:
        return without("Left out on request.")
    if winner is None or winner.best_trial is None or classes is None:
        return without("No trial has finished an epoch yet.")
    if dataset is None:
        return without(NO_DATASET)
    try:
        maps = feature_maps(results.trial_folder(winner.best_trial), dataset)
    except (StudytoolError, ValueError) as error:
        return without(f"The features could not be computed: {error}.")
    picture = Picture(
        figures.feature_pictures(maps, classes, folder / "features"),
        f"Features of {len(maps.labels)} volumes before and after the training of {winner.best_trial}.",
    )
    columns = ("", "silhouette (−1 to 1)", f"right by {NEIGHBOURS} nearest neighbours", "adjusted Rand index (0 to 1)")
    rows = tuple(
        (name, words.decimal(m.silhouette), f"{100 * m.neighbour_accuracy:.1f}%", words.decimal(m.rand_index))
        for name, m in (("before training", maps.before), ("after training", maps.after))
    )
    notes = (
        "How well the features keep the true classes apart; larger is better in all three. Silhouette: closeness "
        "within a class against that to the next one. Rand index: agreement of k-means clusters with the classes.",
    )
    table = Table("How well the classes come apart", columns, rows, notes=notes)
    return Section("features", title, lead, (table,), (picture,))


def how_it_was_made(results: StudyResults) -> Section:
    """9: study file, data, versions, machine, command, and what did not go smoothly."""
    lead = "All that is needed to repeat the study, and what has to be known of how it went."
    spec, records = results.spec, results.records
    ended = Counter(str(r.outcome) if r.outcome else "not ended" for r in records)
    retried = [r for r in records if r.attempts > 1]
    shared = max((r.device.trials_side_by_side for r in records if r.device), default=1)
    devices = sorted({f"{r.device.kind}: {r.device.name}" for r in records if r.device})
    facts = [
        ("trials", ", ".join(f"{count} {name.lower()}" for name, count in sorted(ended.items())) or "none"),
        ("taken up again or retried", ", ".join(r.trial_id for r in retried) or "none"),
        ("device", "; ".join(devices) or "not known yet"),
        ("trials side by side on a device", f"up to {shared}: times are indicative only" if shared > 1 else "1: clean"),
        ("chosen by", f"{spec.metric.name}, {spec.metric.select} epoch; the test split is read once per confirm run"),
        *_data_facts(results),
        *sorted((name, value) for name, value in results.environment.items() if not name.startswith(_VERSION)),
        ("versions", _versions(results.environment)),
    ]
    tables = [Table("Circumstances", ("what", "value"), tuple(facts))]
    odd = [r for r in records if r.outcome in (Outcome.PRUNED, Outcome.FAILED) or r.attempts > 1]
    if odd:
        columns = ("trial", "outcome", "epochs", "attempts", "message")
        rows = tuple(
            (r.trial_id, str(r.outcome or "not ended"), str(len(r.epochs)), str(r.attempts), r.message) for r in odd
        )
        notes = ("A pruned trial was stopped early because others of its arm did better; its cost is counted.",)
        tables.append(Table("Trials that were pruned, failed or begun again", columns, rows, notes=notes))
    folded = [("Study file, as it was run", _kept(results.folder / "study.yaml"))]
    if results.dataset is not None:
        manifest = results.dataset.manifest
        made = json.dumps(manifest.provenance, indent=1, ensure_ascii=False)
        folded.append(
            ("Dataset manifest: classes, counts, provenance", f"{json.dumps(manifest.counts, indent=1)}\n{made}")
        )
    missing = "" if results.environment else "Versions, machine and command were not kept with this study."
    return Section("made", "How it was made", lead, tuple(tables), (), missing, tuple((t, c) for t, c in folded if c))


def _closer_look(
    results: StudyResults, classes: Sequence[str], pictures: list[Picture], folder: Path
) -> tuple[str, tuple[Mistake, ...]]:
    """Add what needs the kept predictions and the dataset; what cannot be shown, in sentences, and the mistakes."""
    winner, dataset = results.winner, results.dataset
    assert winner is not None
    if dataset is None:
        return NO_DATASET, ()
    kept = kept_predictions(confirm_folders(results, winner.arm), dataset)
    if kept is None:
        return (
            "The trials' predictions on the test split were not kept (the runs are of an older version, or their "
            "files are gone), so there is nothing by SNR and tomogram, and no mistakes to show.",
            (),
        )
    missing = []
    for what, stem, label, scores in (
        ("signal-to-noise ratio", "snr", "SNR", scores_by_snr(kept, dataset)),
        ("tomogram", "tomograms", "tomogram", scores_by_tomogram(kept, dataset)),
    ):
        if not scores:
            missing.append(f"The dataset does not say the {what} of its volumes.")
            continue
        if len(scores) == 1:
            missing.append(f"All volumes of the test split have the same {what}, {scores[0].name}.")
            continue
        caption = f"By {what}{_cut(scores)}."
        pictures.append(Picture(figures.group_bars(scores[:_MOST_TOMOGRAMS], folder / stem, label=label), caption))
    run = read_test_predictions(results.trial_folder(winner.best_trial)) if winner.best_trial else None
    mistakes = confident_mistakes(run, dataset, classes) if run else ()
    if mistakes:
        caption = (
            f"The {len(mistakes)} most confident mistakes of {winner.best_trial}: middle slices across z, y and x; "
            "what it is → what it was taken for, and how sure the network was (before the calibration that "
            "studytool predict applies)."
        )
        pictures.append(Picture(figures.mistake_slices(mistakes, dataset, folder / "mistakes"), caption))
    else:
        missing.append("The kept run made no mistake on the test split." if run else "")
    return " ".join(filter(None, missing)), mistakes


def _cut(scores: Sequence[GroupScore]) -> str:
    return f" (the {_MOST_TOMOGRAMS} worst of {len(scores)})" if len(scores) > _MOST_TOMOGRAMS else ""


def _classes(results: StudyResults) -> tuple[str, ...] | None:
    """The names of the classes: from the dataset or, without it, from the best trial."""
    if results.dataset is not None:
        return results.dataset.manifest.classes
    if results.winner is None or results.winner.best_trial is None:
        return None
    try:
        return read_best(results.trial_folder(results.winner.best_trial)).classes
    except StudytoolError:
        return _numbered(results.records)


def _numbered(records: Sequence[TrialRecord]) -> tuple[str, ...] | None:
    sizes = [len(r.epochs[-1].val.confusion) for r in records if r.epochs]
    return tuple(f"class {i}" for i in range(sizes[0])) if sizes else None


def _versions(environment: Mapping[str, str]) -> str:
    named = {name.removeprefix(_VERSION): v for name, v in environment.items() if name.startswith(_VERSION)}
    return ", ".join(f"{name} {version}" for name, version in sorted(named.items())) or "not kept"


def _data_facts(results: StudyResults) -> list[tuple[str, str]]:
    facts = [("dataset", f"{results.spec.data.path}, split {results.spec.data.split}")]
    dataset: Dataset | None = results.dataset
    if dataset is not None:
        m = dataset.manifest
        shape = "×".join(map(str, m.shape_dhw))
        facts.append(
            ("volumes", f"{m.num_volumes} of {shape} voxels, {m.voxel_size_angstrom:g} Å, {len(m.classes)} classes")
        )
        splits = Counter(dataset.splits.tolist())
        facts.append(("in the splits", ", ".join(f"{name or 'none'} {count}" for name, count in splits.items())))
        facts.append(("fingerprint of the data", dataset.fingerprint[:16]))
    return facts


def _share(value: float | None) -> str:
    return "–" if value is None else words.percent(Interval(value, None, None, None, 1))


def _kept(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
