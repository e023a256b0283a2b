"""Pictures of a study, each as PNG and SVG: confusion matrix, learning curves, accuracy against cost.

Colours are those of Okabe and Ito (Color Universal Design, 2008), which people with any kind of colour vision can tell
apart, less the yellow, too pale on white; arms beyond the seventh also differ in line style and marker. Only
matplotlib's figure objects are used, no state that threads would share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from studytool.files import whole_file
from studytool.report.compare import ArmSummary, confirm_runs, headline_metric
from studytool.results import EpochResult, TrialRecord
from studytool.spec import StudySpec

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D")
_DOTS_PER_INCH = 150
_BOTH = ("png", "svg")
CostKind = Literal["device_seconds", "flops", "energy_joules"]
_COST_LABELS = {"device_seconds": "device time, s,", "flops": "operations, TFLOP,", "energy_joules": "energy, kJ,"}


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
    side = len(classes)
    cell = 0.62 if side <= 20 else 0.3
    figure = Figure(figsize=(3.2 + cell * side, 2.2 + cell * side), layout="constrained")
    axes = figure.add_subplot()
    image = draw_confusion(axes, confusion, classes)
    axes.set_title(literal(title), fontsize=9, wrap=True)
    figure.colorbar(image, ax=axes, label="share of the true class, %", shrink=0.8)
    return save_figure(figure, stem, endings)


def draw_confusion(axes: Axes, confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Any:
    """The matrix of `confusion_picture` into axes; the image, for a colour bar."""
    counts = np.asarray(confusion)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(100.0 * counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = len(classes)
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
    names = [literal(f"{name} ({total})") for name, total in zip(classes, totals[:, 0], strict=True)]
    axes.set_xticks(range(side), list(map(literal, classes)), rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(side), names)
    axes.set_xlabel("labelled as" if side > 20 else "labelled as: % of the row, (number of volumes)")
    axes.set_ylabel("true class (number of volumes)")
    return image


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
    axes.set_ylabel(metric_in_words(spec.metric.name))
    if not spec.metric.name.endswith("loss"):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(f"{spec.name}: mean over the confirm runs, band from the lowest to the highest seed", fontsize=10)
    axes.grid(alpha=0.25)
    _legend(figure, axes)
    return save_figure(figure, stem)


def accuracy_against_cost(
    spec: StudySpec,
    summaries: Sequence[ArmSummary],
    stem: Path,
    *,
    against: CostKind = "device_seconds",
) -> tuple[Path, ...]:
    """Each arm's test score (mean and 95% interval over the seeds) against the cost of one training.

    A line joins the Pareto front: the arms that no other one beats in both score and cost.
    """
    name = headline_metric(spec)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    points = {s.arm: (cost, s.test[name].mean) for s in summaries if (cost := cost_of(s, against)) and name in s.test}
    front = pareto_front(points)
    axes.plot(
        [points[arm][0] for arm in front],
        [points[arm][1] for arm in front],
        color="0.55",
        linewidth=1,
        linestyle=(0, (4, 2)),
        drawstyle="steps-post",
        label="Pareto front: none is both better and cheaper" if len(front) > 1 else None,
    )
    for index, summary in enumerate(summaries):
        if summary.arm not in points:
            continue
        score = summary.test[name]
        spread = (
            None if score.low is None or score.high is None else [[score.mean - score.low], [score.high - score.mean]]
        )
        style = style_of(index)
        axes.errorbar(
            [points[summary.arm][0]],
            [score.mean],
            yerr=spread,
            color=style["color"],
            marker=style["marker"],
            markersize=11 if summary.is_winner else 7,
            capsize=4,
            linestyle="none",
            label=f"{summary.arm} (best)" if summary.is_winner else summary.arm,
        )
    _round_numbers(axes, [cost for cost, _ in points.values()])
    shared = max((s.side_by_side for s in summaries), default=1)
    caution = f"; {shared} trials side by side: indicative only" if shared > 1 and against != "flops" else ""
    axes.set_xlabel(f"{_COST_LABELS[against]} of one training (mean of the confirm runs{caution})")
    axes.set_ylabel(f"test {metric_in_words(name)}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(f"{spec.name}: mean over seeds with its 95% interval", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    _legend(figure, axes)
    return save_figure(figure, stem)


def cost_of(summary: ArmSummary, kind: CostKind) -> float | None:
    """What one training of an arm costs, in device-seconds, TFLOP or kilojoules; None where it is not known."""
    cost = summary.mean_confirm_cost
    if cost is None:
        return None
    if kind == "flops":
        return cost.flops / 1e12
    if kind == "energy_joules":
        return None if cost.energy_joules is None else cost.energy_joules / 1e3
    return cost.device_seconds


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the {name: (cost, score)} that no other point beats in both, from the cheapest to the dearest."""
    front: list[str] = []
    best = float("-inf")
    for name in sorted(points, key=lambda n: (points[n][0], -points[n][1])):
        if points[name][1] > best:
            front.append(name)
            best = points[name][1]
    return front


def style_of(index: int) -> dict[str, Any]:
    """Colour, line style and marker of the arm with this number in the study file: the same in all pictures."""
    turn = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _LINES[turn % len(_LINES)],
        "marker": _MARKERS[turn % len(_MARKERS)],
    }


def metric_in_words(metric: str) -> str:
    """`validation balanced accuracy` for `val/balanced_accuracy`."""
    return metric.replace("val/", "validation ").replace("_", " ")


def literal(name: str) -> str:
    """A user's name as matplotlib draws it unchanged: two dollars would make what is between them a formula."""
    return name.replace("$", r"\$")


def save_figure(figure: Figure, stem: Path, endings: Sequence[str] = _BOTH) -> tuple[Path, ...]:
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


def _draw_band(
    axes: Axes, spec: StudySpec, arm: str, curves: Sequence[Sequence[EpochResult]], index: int, against: str
) -> None:
    epochs = min(len(curve) for curve in curves)
    values = np.array([[e.val.metric(spec.metric.name) for e in curve[:epochs]] for curve in curves])
    if against == "epochs":
        position = np.array([e.epoch for e in curves[0][:epochs]])
    else:
        position = np.mean([[e.cost.device_seconds for e in curve[:epochs]] for curve in curves], axis=0)
    style = style_of(index)
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
