"""The further pictures of a report, as PNG and SVG; colours and files as in `studytool.report.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studytool.data.dataset import Dataset
from studytool.data.voxels import widened
from studytool.report.claims import Comparison
from studytool.report.features import FeatureMap, FeatureMaps
from studytool.report.importance import SearchPoint
from studytool.report.plots import COLOURS, literal, metric_in_words, save_figure, style_of
from studytool.report.tables import PHASES
from studytool.report.winner import GroupScore, Mistake
from studytool.results import Cost, Outcome
from studytool.spec import StudySpec

_WIDTH = 8.0
_SLICES = ("z", "y", "x")
_MOST_FACTORS = 6


def difference_lines(comparisons: Sequence[Comparison], stem: Path) -> tuple[Path, ...]:
    """How many points each arm is above random weights: mean and 95% interval, hollow where it may be chance."""
    shown = [c for c in comparisons if c.difference is not None]
    figure, axes = _bars(len(shown))
    axes.axvline(0, color="black", linewidth=0.8)
    for place, comparison in enumerate(shown):
        assert comparison.difference is not None
        interval = comparison.difference.interval
        colour = COLOURS[0] if interval.mean >= 0 else COLOURS[1]
        if interval.low is not None and interval.high is not None:
            axes.plot([100 * interval.low, 100 * interval.high], [place, place], color=colour, linewidth=2)
        filled = colour if comparison.verdict != "open" else "white"
        axes.plot(100 * interval.mean, place, marker="o", color=colour, markerfacecolor=filled, markersize=8)
    axes.set_yticks(range(len(shown)), [c.arm for c in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("points above random initialization (hollow: may be chance)")
    return save_figure(figure, stem)


def time_bars(costs: Mapping[str, Cost], stem: Path) -> tuple[Path, ...]:
    """Where the time of every arm went: seconds by phase, of all its trials."""
    figure, axes = _bars(len(costs))
    left = np.zeros(len(costs))
    for index, phase in enumerate(PHASES):
        seconds = np.array([getattr(cost, f"{phase}_seconds") for cost in costs.values()])
        hatch = "///" if phase == "idle" else None
        colour = "white" if phase == "idle" else COLOURS[index]
        label = f"{phase} (no cost)" if phase == "idle" else phase
        look: dict[str, Any] = {"color": colour, "edgecolor": "0.3", "linewidth": 0.5, "hatch": hatch}
        axes.barh(range(len(costs)), seconds, left=left, label=label, **look)
        left += seconds
    axes.set_yticks(range(len(costs)), list(costs), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("wall time of all trials of the arm, s")
    figure.legend(loc="outside upper center", ncols=len(PHASES), fontsize=8, frameon=False)
    return save_figure(figure, stem)


def importance_bars(shares: Mapping[str, float], stem: Path) -> tuple[Path, ...]:
    """The share of the scatter of the search's results that each factor explains."""
    figure, axes = _bars(len(shares))
    axes.barh(range(len(shares)), [100 * share for share in shares.values()], color=COLOURS[0], height=0.6)
    axes.set_yticks(range(len(shares)), [name.replace("_", " ") for name in shares], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("share of the variance between search trials, %")
    return save_figure(figure, stem)


def search_slices(spec: StudySpec, points: Sequence[SearchPoint], stem: Path) -> tuple[Path, ...]:
    """The best validation value of every ended search trial against each tuned factor; pruned trials are hollow."""
    names = list(spec.search.space)[:_MOST_FACTORS]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(_WIDTH if columns > 1 else 6.0, 3.2 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for ax in grid.flat[len(names) :]:
        ax.set_visible(False)
    for name, ax in zip(names, grid.flat, strict=False):
        _slice(ax, spec, points, name)
    for ax in grid[:, 0]:
        ax.set_ylabel(f"best {metric_in_words(spec.metric.name)}", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return save_figure(figure, stem)


def group_bars(scores: Sequence[GroupScore], stem: Path, *, label: str) -> tuple[Path, ...]:
    """Test accuracy of parts of the test split, with 95% intervals over the seeds."""
    figure, axes = _bars(len(scores))
    means = [100 * s.accuracy.mean for s in scores]
    axes.barh(range(len(scores)), means, color=COLOURS[5], height=0.6)
    for place, score in enumerate(scores):
        low, high = score.accuracy.low, score.accuracy.high
        if low is not None and high is not None:
            axes.plot([100 * low, 100 * high], [place, place], color="black", linewidth=1)
    axes.set_yticks(range(len(scores)), [literal(f"{s.name} ({s.count})") for s in scores], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("test accuracy, % (mean and 95% interval over seeds)")
    axes.set_ylabel(f"{label} (volumes)", fontsize=9)
    return save_figure(figure, stem)


def feature_pictures(maps: FeatureMaps, classes: Sequence[str], stem: Path) -> tuple[Path, ...]:
    """The volumes in 2D (t-SNE) by their features before and after training, in the colours of their classes."""
    figure = Figure(figsize=(_WIDTH, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, described, title in ((left, maps.before, "before training"), (right, maps.after, "after training")):
        _map(ax, described, maps.labels, classes)
        ax.set_title(title, fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False, markerscale=1.4)
    return save_figure(figure, stem)


def mistake_slices(mistakes: Sequence[Mistake], dataset: Dataset, stem: Path) -> tuple[Path, ...]:
    """The middle slices across z, y and x of wrongly labelled volumes, grey from the 1st to the 99th percentile."""
    columns = 3
    rows = -(-len(mistakes) // columns)
    figure = Figure(figsize=(_WIDTH + 1.2, 1.42 * rows + 0.2))
    volumes = np.zeros((len(mistakes), *dataset.manifest.shape_dhw), dataset.manifest.dtype)
    dataset.gather(np.array([m.row for m in mistakes]), volumes)
    cells: Any = figure.add_gridspec(
        rows, columns, wspace=0.08, hspace=0.5, left=0.01, right=0.99, top=0.93, bottom=0.01
    )
    for number, (mistake, volume) in enumerate(zip(mistakes, widened(volumes), strict=True)):
        low, high = np.percentile(volume, (1, 99))
        inner = cells[number // columns, number % columns].subgridspec(1, 3, wspace=0.03)
        for axis, letter in enumerate(_SLICES):
            ax = figure.add_subplot(inner[axis])
            ax.imshow(volume.take(volume.shape[axis] // 2, axis=axis), cmap="gray", vmin=low, vmax=high)
            ax.set_xticks([])
            ax.set_yticks([])
            if number < columns:
                ax.text(0.04, 0.04, letter, color="white", fontsize=6, transform=ax.transAxes)
            if axis == 1:
                said = literal(f"{mistake.truth} → {mistake.labelled} ({100 * mistake.probability:.0f}%)")
                ax.set_title(said, fontsize=7.5, pad=3)
    return save_figure(figure, stem)


def _bars(count: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, 1.3 + 0.34 * count), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25, axis="x")
    axes.set_axisbelow(True)
    return figure, axes


def _slice(ax: Axes, spec: StudySpec, points: Sequence[SearchPoint], name: str) -> None:
    distribution = spec.search.space[name]
    is_choice = distribution.kind == "choice"
    ended = [p for p in points if p.outcome in (Outcome.COMPLETE, Outcome.PRUNED)]
    for index, arm in enumerate(spec.list_arms()):
        own = [p for p in ended if p.arm == arm.name]
        style = style_of(index)
        for finished in (True, False):
            some = [p for p in own if (p.outcome is Outcome.COMPLETE) == finished]
            values = [p.parameters[name] for p in some]
            x = [distribution.ends.index(value) for value in values] if is_choice else values
            filled = style["color"] if finished else "none"
            label = arm.name if finished else None
            y = [p.value for p in some]
            ax.scatter(x, y, s=26, marker=style["marker"], edgecolors=style["color"], facecolors=filled, label=label)
    if is_choice:
        ax.set_xticks(range(len(distribution.ends)), list(map(str, distribution.ends)))
    elif distribution.kind.startswith("log") and ended:
        ax.set_xscale("log")
    ax.set_xlabel(name.replace("_", " "), fontsize=9)
    ax.grid(alpha=0.25)


def _map(ax: Axes, described: FeatureMap, labels: np.ndarray[Any, np.dtype[np.int64]], classes: Sequence[str]) -> None:
    for label, name in enumerate(classes):
        members = labels == label
        if members.any():
            style = style_of(label)
            look: dict[str, Any] = {"marker": style["marker"], "color": style["color"], "linewidths": 0, "alpha": 0.85}
            x, y = described.places[members].T
            ax.scatter(x, y, s=16, label=literal(name), **look)
    ax.set_xticks([])
    ax.set_yticks([])
    scores = (
        f"silhouette {described.silhouette:.2f}, neighbours right {100 * described.neighbour_accuracy:.0f}%, "
        f"Rand index {described.rand_index:.2f}"
    )
    ax.set_xlabel(scores, fontsize=8)
