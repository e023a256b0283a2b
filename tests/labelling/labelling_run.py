"""`studytool predict` without its command line, for the tests of what it writes and of what it refuses."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

from studytool.labelling.label import label_source
from studytool.labelling.request import Request


def run(trial: Path, source: Path, out: Path, **options):
    """Label; the lines that were said."""
    said: list[str] = []
    counted: list[tuple[int, int]] = []

    @contextmanager
    def progress(_what):
        yield lambda done, total: counted.append((done, total))

    labels = label_source(trial, Request(source, out, device="cpu", **options), say=said.append, progress=progress)
    assert counted[-1] == (len(labels.numbers), len(labels.numbers))
    return labels, said
