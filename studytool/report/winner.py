"""What the winner gets right and wrong: by class, by signal-to-noise ratio, by tomogram, and its worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from studytool.data.shards import Dataset
from studytool.report.compare import confirm_runs
from studytool.report.statistics import Interval, mean_interval
from studytool.results import TrialRecord
from studytool.spec import StudySpec
from studytool.training.predictions import TestPredictions, read_test_predictions

MISTAKES = 12
"""How many mistakes are shown."""
_MOST_GROUPS = 8


@dataclass(frozen=True)
class ClassScores:
    """One class on the test split: recall over the seeds, precision and the class most often taken for it."""

    name: str
    count: int
    recall: Interval
    precision: float | None
    mostly_taken_for: str


@dataclass(frozen=True)
class GroupScore:
    """Accuracy over the seeds of a part of the test split that has `count` volumes."""

    name: str
    count: int
    accuracy: Interval


@dataclass(frozen=True)
class Mistake:
    """A volume of the test split (row number in the dataset) that was labelled wrongly, and how confidently."""

    row: int
    particle_id: str
    tomogram: str
    truth: str
    labelled: str
    probability: float


@dataclass(frozen=True)
class KeptPredictions:
    """What each confirm run of one arm said about the test split; all have the same rows."""

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    probabilities: tuple[NDArray[np.float32], ...]

    @property
    def hits(self) -> NDArray[np.bool_]:
        """Whether a run was right about a volume: [runs, N]."""
        return np.array([p.argmax(axis=1) == self.labels for p in self.probabilities])


def summed_confusion(spec: StudySpec, records: Sequence[TrialRecord], arm: str) -> NDArray[np.int64] | None:
    """The confusion matrices of an arm's confirm runs on the test split, added up: [true class, labelled class]."""
    matrices = _confusions(spec, records, arm)
    return None if not matrices else np.sum(matrices, axis=0)


def class_scores(
    spec: StudySpec, records: Sequence[TrialRecord], arm: str, classes: Sequence[str]
) -> tuple[ClassScores, ...]:
    """Every class that occurs in the test split, the hardest first."""
    matrices = _confusions(spec, records, arm)
    if not matrices:
        return ()
    total = np.sum(matrices, axis=0)
    found = []
    for i, name in enumerate(classes):
        if not total[i].sum():
            continue
        recalls = [float(m[i, i] / m[i].sum()) for m in matrices if m[i].sum()]
        wrong = total[i].copy()
        wrong[i] = 0
        taken = int(wrong.argmax())
        mostly = f"{classes[taken]} ({100 * wrong[taken] / total[i].sum():.0f}%)" if wrong[taken] else "–"
        labelled = int(total[:, i].sum())
        found.append(
            ClassScores(
                name,
                int(matrices[0][i].sum()),
                mean_interval(recalls, lowest=0.0, highest=1.0),
                float(total[i, i] / labelled) if labelled else None,
                mostly,
            )
        )
    return tuple(sorted(found, key=lambda scores: scores.recall.mean))


def kept_predictions(folders: Sequence[Path], dataset: Dataset) -> KeptPredictions | None:
    """What the runs in these folders have kept; None where none has, or it is of other data than `dataset`."""
    kept = [p for p in map(read_test_predictions, folders) if p is not None]
    if not kept or not all(_same_rows(p, kept[0]) for p in kept):
        return None
    first = kept[0]
    if first.rows.max(initial=-1) >= len(dataset) or not np.array_equal(dataset.labels[first.rows], first.labels):
        return None
    return KeptPredictions(first.rows, first.labels, tuple(p.probabilities for p in kept))


def scores_by_tomogram(kept: KeptPredictions, dataset: Dataset) -> tuple[GroupScore, ...]:
    """Accuracy in each tomogram of the test split, the worst first; empty where the dataset names none."""
    names = dataset.tomograms[kept.rows]
    groups = [(str(name), names == name) for name in np.unique(names) if str(name)]
    return tuple(sorted((_group(kept, *g) for g in groups), key=lambda score: score.accuracy.mean))


def scores_by_snr(kept: KeptPredictions, dataset: Dataset) -> tuple[GroupScore, ...]:
    """Accuracy by signal-to-noise ratio, the lowest first: of each value, or of eight equally large groups of values.

    Empty where the dataset does not know it.
    """
    snr = dataset.snr[kept.rows]
    known = snr[np.isfinite(snr)]
    if not known.size:
        return ()
    values = np.unique(known)
    if len(values) <= _MOST_GROUPS:
        return tuple(_group(kept, f"{value:g}", snr == value) for value in values)
    edges = np.unique(np.quantile(known, np.linspace(0, 1, _MOST_GROUPS + 1)))
    place = np.clip(np.searchsorted(edges, snr, side="right") - 1, 0, len(edges) - 2)
    return tuple(
        _group(kept, f"{edges[i]:.2g} to {edges[i + 1]:.2g}", (place == i) & np.isfinite(snr))
        for i in range(len(edges) - 1)
        if ((place == i) & np.isfinite(snr)).any()
    )


def confident_mistakes(
    run: TestPredictions, dataset: Dataset, classes: Sequence[str], *, most: int = MISTAKES
) -> tuple[Mistake, ...]:
    """The volumes that a run labelled wrongly with the highest probability, the most confident first."""
    labelled = run.probabilities.argmax(axis=1)
    wrong = np.flatnonzero(labelled != run.labels)
    confidence = run.probabilities[wrong, labelled[wrong]]
    return tuple(
        Mistake(
            row=int(run.rows[i]),
            particle_id=str(dataset.particle_ids[run.rows[i]]),
            tomogram=str(dataset.tomograms[run.rows[i]]),
            truth=classes[run.labels[i]],
            labelled=classes[labelled[i]],
            probability=float(run.probabilities[i, labelled[i]]),
        )
        for i in wrong[np.argsort(-confidence, kind="stable")[:most]]
    )


def _confusions(spec: StudySpec, records: Sequence[TrialRecord], arm: str) -> list[NDArray[np.int64]]:
    return [np.array(r.test.confusion) for r in confirm_runs(spec, records, arm) if r.test is not None]


def _same_rows(one: TestPredictions, other: TestPredictions) -> bool:
    return np.array_equal(one.rows, other.rows) and one.probabilities.shape == other.probabilities.shape


def _group(kept: KeptPredictions, name: str, members: NDArray[np.bool_]) -> GroupScore:
    shares = kept.hits[:, members].mean(axis=1).tolist()
    return GroupScore(name, int(members.sum()), mean_interval(shares, lowest=0.0, highest=1.0))
