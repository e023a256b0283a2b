"""A picture of one trial: its curve, what it takes for what, and particles with their labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from studytool.data.dataset import Dataset
from studytool.data.montage import draw_slices, without_ticks
from studytool.data.voxels import widened
from studytool.errors import DataError
from studytool.files import whole_file
from studytool.predict import Predictor
from studytool.report.plots import COLOURS, draw_confusion
from studytool.results import TrialRecord
from studytool.seeds import derive_seed
from studytool.training.predictions import read_test_predictions

_COLUMNS = 3  # particles side by side
_RIGHT, _WRONG = COLOURS[2], COLOURS[1]


def write_trial_picture(folder: Path, out: Path, *, count: int = 12, seed: int = 0) -> list[str]:
    """Draw the network of a trial's folder as a PNG; the lines to show.

    Above stand the curve of the trial and its confusion matrix; below `count` particles of the split that matrix is of,
    drawn by `seed`: the middle slices across z, y and x, the true class and the one the network gives them. It is the
    test split where the trial has read it (in the confirm phase), else the validation split.

    Raises:
        WeightsError: the folder holds no trained network.
        DataError: the trial's dataset is not there any more, or was changed.
    """
    from matplotlib.figure import Figure

    with Predictor(folder, device="cpu") as predictor:
        dataset = predictor.own_dataset()
        if dataset is None:
            raise DataError(f"{predictor.trial.data_path}: the dataset of {folder} is not there or was changed")
        kept = read_test_predictions(folder)
        split = "val" if kept is None else "test"
        rows = dataset.rows("val") if kept is None else kept.rows
        rng = np.random.default_rng(derive_seed(seed, "show"))
        places = np.sort(rng.permutation(len(rows))[:count])
        if kept is None:
            probabilities: Any = predictor.label_rows(dataset, rows).probabilities[places]
        else:
            probabilities = kept.probabilities[places]
        record, trial = predictor.record, predictor.trial
        summary = _summary(predictor)
    scores = record.result.test if split == "test" and record.result.test else record.result.val
    lines = -(-len(places) // _COLUMNS)
    figure = Figure(figsize=(13, 5.4 + 1.75 * lines), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[5.4, 1.75 * lines])
    upper, lower = parts
    left, right = upper.subplots(1, 2)
    _draw_curve(left, _record_of(folder), trial.metric.name, record.result.epoch)
    draw_confusion(right, scores.confusion, record.classes)
    upper.suptitle(
        f"{trial.trial_id}: {split} accuracy {scores.accuracy:.3f}, balanced {scores.balanced_accuracy:.3f}, "
        f"epoch {record.result.epoch}; {trial.model.backbone} from {trial.model.init}, freeze {trial.model.freeze}",
        fontsize=10,
    )
    _draw_particles(lower.subplots(lines, 3 * _COLUMNS, squeeze=False), dataset, rows[places], probabilities)
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return [summary, f"{out}: {len(places)} of {len(rows)} particles of the {split} split"]


def _draw_particles(axes: Any, dataset: Dataset, rows: Any, probabilities: Any) -> None:
    classes = dataset.manifest.classes
    volumes = np.zeros((len(rows), *dataset.manifest.shape_dhw), dataset.manifest.dtype)
    dataset.gather(rows, volumes)
    for line in axes:
        without_ticks(line)
    for ax in axes.ravel()[3 * len(rows) :]:
        ax.set_axis_off()
    for number, volume in enumerate(widened(volumes)):
        line, column = divmod(number, _COLUMNS)
        three = axes[line, 3 * column : 3 * column + 3]
        draw_slices(three, volume)
        true, given = int(dataset.labels[rows[number]]), int(probabilities[number].argmax())
        colour = _RIGHT if true == given else _WRONG
        words = classes[true] if true == given else f"{classes[true]} → {classes[given]}"
        three[1].set_title(f"{words}  {probabilities[number, given]:.0%}", fontsize=8, color=colour)
        for ax in three:
            for side in ax.spines.values():
                side.set_color(colour)
                side.set_linewidth(1.5)


def _draw_curve(ax: Any, record: TrialRecord | None, metric: str, selected: int) -> None:
    from matplotlib.ticker import MaxNLocator

    if record is None or not record.epochs:
        ax.set_axis_off()
        return
    epochs = [epoch.epoch for epoch in record.epochs]
    ax.plot(epochs, [epoch.val.metric(metric) for epoch in record.epochs], color=COLOURS[0], marker="o", markersize=3)
    ax.axvline(selected, color="black", linewidth=0.8, linestyle=":")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch (dotted: the one whose weights were kept)")
    ax.set_ylabel(metric, color=COLOURS[0])
    other = ax.twinx()
    other.plot(epochs, [epoch.train_loss for epoch in record.epochs], color=COLOURS[1], linestyle="--")
    other.set_ylabel("training loss", color=COLOURS[1])
    ax.grid(alpha=0.25)


def _summary(predictor: Predictor) -> str:
    """The network in a line."""
    model, record = predictor.model, predictor.record
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sides = " x ".join(map(str, record.volume_shape_dhw))
    return (
        f"{predictor.trial.model.backbone}: {', '.join(model.stages)}; {parameters:,} parameters, {model.num_features} "
        f"features; takes {sides} voxels of {record.voxel_size_angstrom:g} Å, knows {', '.join(record.classes)}"
    )


def _record_of(folder: Path) -> TrialRecord | None:
    """The trial's record, where it is one of a study."""
    from studytool.study.records import read_records

    records = read_records(folder.absolute().parents[1])
    return next((record for record in records if record.trial_id == folder.absolute().name), None)
