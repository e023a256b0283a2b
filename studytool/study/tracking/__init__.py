"""A study in MLflow; the only package that imports MLflow (inside functions, for it takes seconds).

tracker.py   what the driver calls: everything goes through a queue
writer.py    what the queue's thread does: study run -> arm runs -> trial runs
logged.py    under which names records stand in MLflow
outbox.py    the queue
store.py     addresses, the SQLite file, the client
"""

from __future__ import annotations

from studytool.study.tracking.tracker import Tracker

__all__ = ["Tracker"]
