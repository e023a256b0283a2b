"""Pictures of a study, each as PNG and SVG: confusion matrix, learning curves, accuracy against cost.

Colours are those of Okabe and Ito (Color Universal Design, 2008), which people with any kind of colour vision can tell
apart, less the yellow, too pale on white; arms beyond the seventh also differ in line style and marker. Only
matplotlib's figure objects are used, no state that threads would share.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from studytool.files import whole_file
from studytool.report.compare import ArmSummary, confirm_runs, headline_metric
from studytool.results import EpochResult, TrialRecord
from studytool.spec import StudySpec

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D")
_DOTS_PER_INCH = 150
_BOTH = ("png", "svg")


def confusion_picture(
    confusion: Sequence[Sequence[int]],
    classes: Sequence[str],
    stem: Path,
    *,
    title: str,
    endings: Sequence[str] = _BOTH,
) -> tuple[Path, ...]:
    """Which true class (rows) was labelled as which (columns): shares of the row in %, counts where there is room.

    Args:
        confusion: counts [true class, labelled class], as `Scores.confusion`.
        classes: their names, in the same order.
        stem: the path of the pictures without its ending.
        title: what stands above.
        endings: "png", "svg" or both.
    """
    counts = np.asarray(confusion)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(100.0 * counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = len(classes)
    cell = 0.62 if side <= 20 else 0.3
    figure = Figure(figsize=(3.2 + cell * side, 2.2 + cell * side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap=_pale_to_blue(), vmin=0, vmax=100)
    if side <= 20:
        for row, column in np.ndindex(counts.shape):
            if counts[row, column]:
                axes.text(
                    column,
                    row,
                    f"{shares[row, column]:.0f}\n({counts[row, column]})",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if shares[row, column] > 55 else "black",
                )
    names = [f"{name} ({total})" for name, total in zip(classes, totals[:, 0], strict=True)]
    axes.set_xticks(range(side), list(classes), rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(side), names)
    axes.set_xlabel("labelled as" if side > 20 else "labelled as: % of the row, (number of volumes)")
    axes.set_ylabel("true class (number of volumes)")
    axes.set_title(title, fontsize=9, wrap=True)
    figure.colorbar(image, ax=axes, label="share of the true class, %", shrink=0.8)
    return _save(figure, stem, endings)


def learning_curves(
    spec: StudySpec,
    records: Sequence[TrialRecord],
    stem: Path,
    *,
    against: Literal["epochs", "device_seconds"] = "epochs",
) -> tuple[Path, ...]:
    """The validation metric over the confirm runs: per arm the mean of the seeds, with a band from lowest to highest.

    Against device-seconds a mean stands at the mean time its epoch ended. The epochs shown are those that all of the
    arm's finished runs have.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, arm in enumerate(spec.list_arms()):
        curves = [r.epochs for r in confirm_runs(spec, records, arm.name)]
        if curves:
            _draw_band(axes, spec, arm.name, curves, index, against)
    if spec.metric.target is not None:
        axes.axhline(spec.metric.target, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
        at = (0.005, spec.metric.target)
        axes.annotate(f"target {at[1]:g}", at, xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    axes.set_xlabel("epoch" if against == "epochs" else "device time, s")
    axes.xaxis.set_major_locator(MaxNLocator(integer=against == "epochs"))
    axes.set_ylabel(_in_words(spec.metric.name))
    axes.set_title(f"{spec.name}: mean over the confirm runs, band from the lowest to the highest seed", fontsize=10)
    axes.grid(alpha=0.25)
    _legend(figure, axes)
    return _save(figure, stem, _BOTH)


def accuracy_against_cost(spec: StudySpec, summaries: Sequence[ArmSummary], stem: Path) -> tuple[Path, ...]:
    """Each arm's test score (mean and 95% interval over the seeds) against the device time of one training."""
    name = headline_metric(spec)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, summary in enumerate(summaries):
        score, cost = summary.test.get(name), summary.mean_confirm_cost
        if score is None or cost is None:
            continue
        spread = (
            None if score.low is None or score.high is None else [[score.mean - score.low], [score.high - score.mean]]
        )
        style = _style(index)
        axes.errorbar(
            [cost.device_seconds],
            [score.mean],
            yerr=spread,
            color=style["color"],
            marker=style["marker"],
            markersize=11 if summary.is_winner else 7,
            capsize=4,
            linestyle="none",
            label=f"{summary.arm} (best)" if summary.is_winner else summary.arm,
        )
    _round_numbers(axes, [s.mean_confirm_cost.device_seconds for s in summaries if s.test and s.mean_confirm_cost])
    shared = max((s.side_by_side for s in summaries), default=1)
    caution = f"; {shared} trials side by side: indicative only" if shared > 1 else ""
    axes.set_xlabel(f"device time of one training, s (mean of the confirm runs{caution})")
    axes.set_ylabel(f"test {_in_words(name)}")
    axes.set_title(f"{spec.name}: mean over seeds with its 95% interval", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    _legend(figure, axes)
    return _save(figure, stem, _BOTH)


def _draw_band(
    axes: Axes, spec: StudySpec, arm: str, curves: Sequence[Sequence[EpochResult]], index: int, against: str
) -> None:
    epochs = min(len(curve) for curve in curves)
    values = np.array([[e.val.metric(spec.metric.name) for e in curve[:epochs]] for curve in curves])
    if against == "epochs":
        position = np.array([e.epoch for e in curves[0][:epochs]])
    else:
        position = np.mean([[e.cost.device_seconds for e in curve[:epochs]] for curve in curves], axis=0)
    style = _style(index)
    seeds = f"{len(curves)} seed{'' if len(curves) == 1 else 's'}"
    axes.plot(position, values.mean(axis=0), **style, markersize=4, linewidth=1.8, label=f"{arm} ({seeds})")
    axes.fill_between(position, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)


def _round_numbers(axes: Axes, positions: Sequence[float]) -> None:
    """A horizontal axis from zero or, where costs lie far apart, a logarithmic one, with numbers such as 20 and 50."""
    if positions and max(positions) > 10 * min(positions):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, 1.1 * max(positions, default=1.0))


def _style(index: int) -> dict[str, Any]:
    turn = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _LINES[turn % len(_LINES)],
        "marker": _MARKERS[turn % len(_MARKERS)],
    }


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    else:
        axes.text(0.5, 0.5, "no finished confirm runs", ha="center", va="center", transform=axes.transAxes)


def _pale_to_blue() -> ListedColormap:
    """From white to one blue, evenly in lightness: readable without any sense of colour."""
    blue = np.array([0.0, 0.27, 0.48])
    return ListedColormap(1.0 - np.linspace(0.0, 1.0, 256)[:, None] * (1.0 - blue))


def _in_words(metric: str) -> str:
    """`validation balanced accuracy` for `val/balanced_accuracy`."""
    return metric.replace("val/", "validation ").replace("_", " ")


def _save(figure: Figure, stem: Path, endings: Sequence[str]) -> tuple[Path, ...]:
    """Write pictures, whole; an SVG holds no date and no random ids, so that equal pictures are equal files."""
    paths = []
    for ending in endings:
        path = stem.with_name(f"{stem.name}.{ending}")
        metadata = {"Date": None} if ending == "svg" else None
        with matplotlib.rc_context({"svg.hashsalt": "studytool"}), whole_file(path) as temporary:
            figure.savefig(temporary, format=ending, dpi=_DOTS_PER_INCH, metadata=metadata)
        figure.set_layout_engine("none")  # the layout is found; it need not be found again
        paths.append(path)
    return tuple(paths)
