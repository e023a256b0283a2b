"""The pages in docs/places: one for each place, each with an answer to every question, and what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from studytool.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/places").glob("*.md"))
LOST = ("When a machine is lost.", "When a node is lost.", "If the machine goes down.")
QUESTIONS = ("Start.", "Run.", "Look.", "Stop.", "What it costs", LOST)


def test_there_is_a_page_for_every_place():
    assert [page.stem for page in PAGES] == ["aws", "gcp", "kubernetes", "slurm", "ssh", "workstation"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_answers_every_question_in_this_order(page):
    parts = re.split(r"^\*\*(.+?)\*\*", page.read_text(), flags=re.MULTILINE)[1:]
    answers = dict(zip(parts[::2], parts[1::2], strict=True))
    asked = [next((place for place, heading in enumerate(answers) if heading.startswith(q)), None) for q in QUESTIONS]
    assert asked == list(range(len(QUESTIONS))), list(answers)
    assert all(len(answer.strip()) > 20 for answer in answers.values())
    costs = next(answer for heading, answer in answers.items() if heading.startswith("What it costs"))
    assert re.search(r"an hour|hours|kWh", "".join([*answers, costs]), flags=re.IGNORECASE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    commands = set(re.findall(r"\bstudytool ([a-z]+)\b(?=[ `])", text))
    assert commands
    assert commands <= {*get_command(app).commands}
    for path in re.findall(r"(?<![\w/.])(?:cluster|search_spaces|tests)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
