"""The report of a study: one HTML page that needs no network, its figures, and its tables."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from studytool.errors import StudytoolError
from studytool.files import write_text
from studytool.report import sections, winnersections, words
from studytool.report.answer import Answer, answer
from studytool.report.compare import headline_metric
from studytool.report.export import write_tables
from studytool.report.sections import Section, StudyResults

REPORT = "report.html"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What was written: the page, the CSV tables, and the answer in words."""

    page: Path
    tables: tuple[Path, ...]
    answer: Answer


def write_report(results: StudyResults, *, embed: bool = True) -> Report:
    """Write `report.html`, `figures/` and `trials.csv`, `arms.csv`, `curves.csv` into the study's folder.

    Works on a study in any state. With `embed` the winner's features are computed, which takes a while on a CPU.
    """
    figures = results.folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    tables = write_tables(results.spec, results.records, results.summaries, results.comparisons, results.folder)
    said = answer(results.spec, results.summaries, results.comparisons, results.gaps)
    points: list[tuple[str, Callable[[], Section]]] = [
        ("arms", lambda: sections.arms(results)),
        ("claims", lambda: sections.claims(results, figures)),
        ("cost", lambda: sections.accuracy_and_cost(results, figures)),
        ("curves", lambda: sections.curves(results, figures)),
        ("search", lambda: sections.what_mattered(results, figures)),
        ("mistakes", lambda: winnersections.right_and_wrong(results, figures)),
        ("features", lambda: winnersections.before_and_after(results, figures, embed=embed)),
        ("time", lambda: sections.where_time_went(results, figures)),
        ("made", lambda: winnersections.how_it_was_made(results)),
    ]
    made = [_made(key, make) for key, make in points]
    page = results.folder / REPORT
    write_text(page, _html(results, said, made))
    return Report(page, tables, said)


def _made(key: str, make: Callable[[], Section]) -> Section:
    """A point whose files are damaged or missing says so; the others are shown all the same, whatever broke in it."""
    try:
        return make()
    except Exception as error:
        why = str(error) if isinstance(error, StudytoolError) else f"{type(error).__name__}: {error}"
        _log.warning("%s: cannot be shown in the report (%s)", key, why)
        _log.debug("%s", key, exc_info=True)
        return Section(key, key.capitalize(), "", missing=f"This cannot be shown: {why}.")


def _html(results: StudyResults, said: Answer, points: list[Section]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("studytool.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inline_svg": _inline_svg, "breakable": _breakable, "in_two": _in_two}
    spec = results.spec
    return environment.get_template("report.html.j2").render(
        name=spec.name,
        answer=said,
        cards=_cards(results),
        points=points,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        metric=words.METRIC_WORDS[headline_metric(spec)],
        target=spec.metric.target,
        target_metric=spec.metric.name,
    )


def _cards(results: StudyResults) -> list[tuple[str, str, str]]:
    """The numbers to take home: (what, number, interval or remark)."""
    winner, spec = results.winner, results.spec
    if winner is None:
        return []
    cards = []
    score = winner.test.get(headline_metric(spec))
    if score is not None:
        cards.append((f"test {words.METRIC_WORDS[headline_metric(spec)]}", *_in_two(words.percent(score), "%")))
    comparison = next((c for c in results.comparisons if c.arm == winner.arm), None)
    if comparison is not None and comparison.difference is not None:
        number, ends = _in_two(words.percent(comparison.difference.interval, signed=True))
        cards.append(("points against random start", number, ends or "one pair of runs"))
    if comparison is not None and comparison.cost_ratio is not None and comparison.cost_verdict != "shared device":
        number, ends = _in_two(words.ratio(comparison.cost_ratio))
        cards.append(("cost to target, times that of random start", number, ends))
    if winner.mean_confirm_cost is not None:
        price = words.money(spec, winner.mean_confirm_cost)
        cards.append(("device time of one training", words.device_time(winner.mean_confirm_cost), price))
    if score is not None:
        cards.append(("seeds", str(winner.confirmed), "repetitions"))
    return cards


def _inline_svg(paths: tuple[Path, ...]) -> Any:
    """The SVG of a figure as a part of the page, without the lines that only a file of its own has."""
    from markupsafe import Markup

    svg = next(path for path in paths if path.suffix == ".svg").read_text(encoding="utf-8")
    drawing = svg[svg.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    width = re.search(r'width="([0-9.]+)pt"', drawing)
    style = f'style="max-width:{float(width[1]) * 4 / 3:.0f}px" ' if width else ""
    drawing = re.sub(r'\b(width|height)="[0-9.]+pt" ?', "", drawing, count=2)
    return Markup(drawing.replace("<svg ", f'<svg {style}role="img" ', 1))  # made by matplotlib, which escapes texts


def _breakable(text: str) -> Any:
    """A name that may be broken after its dots and underscores, with all else escaped."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([._])(?=\w)", r"\1<wbr>", str(escape(text))))


def _in_two(text: str, unit: str = "") -> tuple[str, str]:
    """A number and, apart from it, its interval or remark: `("91.2", "[89.9, 92.4]")`."""
    match = re.fullmatch(r"(.*?)\s*([\[(].*[\])])", text)
    return (match[1] + unit, match[2]) if match and match[1] else (text + unit, "")
