"""The nodes of a cluster while a study runs there: which of them trials may run on, and what became of a worker."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from studytool.data.remote_copy import local_copy
from studytool.doctor.finding import Finding
from studytool.errors import StudytoolError
from studytool.settings import ResourceSettings
from studytool.study.clustercheck import Needs, look_from_node, problems_in
from studytool.study.events import Cause
from studytool.study.nodes import address_of, ask_node, is_lost, node_of, slots_on_cluster
from studytool.study.slots import Slots
from studytool.training.memory import processes_killed_for_memory

_LOOK_SECONDS = 1.0
REFUSED_SECONDS = 300.0
"""Then a node is tried again: it may have been mended, or a server may have been down."""
_LOST = "its node was lost"


class NodeWatch:
    """Knows the nodes that are no good for the study now.

    Every worker first looks at its node. What is wrong there is not the trial's fault, which is tried again elsewhere,
    and the node gets no more trials for `REFUSED_SECONDS`.

    Args:
        resources: the study's.
        slots: what a trial holds.
        needs: what a node has to have.
    """

    def __init__(self, resources: ResourceSettings, slots: Slots, needs: Needs) -> None:
        self._resources = resources
        self._slots = slots
        self._needs = needs
        self._refused: dict[str, float] = {}
        self._killed_for_memory: dict[str, int] = {}
        self._looked = time.monotonic()

    @property
    def needs(self) -> dict[str, Any]:
        """For `what_node_lacks`, in a worker."""
        return asdict(self._needs)

    @property
    def refused(self) -> tuple[str, ...]:
        """The ids of the nodes that no trial may run on."""
        now = time.monotonic()
        return tuple(sorted(node for node, since in self._refused.items() if now < since + REFUSED_SECONDS))

    def slots(self) -> Slots:
        """How many trials run side by side now; nodes come and go."""
        if time.monotonic() > self._looked + _LOOK_SECONDS:
            self._slots, self._looked = slots_on_cluster(self._resources, self._slots, self.refused), time.monotonic()
        return self._slots

    def refuse(self, node_id: str, problems: str) -> str:
        """Let no trials run on a node for a while; a line that says why, and what to do."""
        self._refused[node_id], self._looked = time.monotonic(), 0.0
        return f"the node {address_of(node_id)} gets no trials for {REFUSED_SECONDS / 60:.0f} minutes: {problems}"

    def memory_ran_out(self, node_id: str, killed: int) -> bool:
        """Take down that a node has `killed` so many processes for want of memory; whether they are more than before.

        The first word from a node tells nothing.
        """
        before = self._killed_for_memory.get(node_id, killed)
        self._killed_for_memory[node_id] = killed
        return killed > before

    def explain(self, error: Exception | None, node_id: str | None, *, came_up: bool) -> tuple[Cause, str] | None:
        """Why a worker ended, if that was its node's doing.

        Args:
            error: as Ray has it.
            node_id: the node from which the worker was last heard.
            came_up: false if it broke before it could look at its node.
        """
        node_id = node_id or node_of(error)
        if node_id is None:
            return None
        if came_up and is_lost(node_id, error):
            return Cause.NODE, _LOST
        if came_up:
            count = ask_node(node_id, processes_killed_for_memory)
            if count.problem is None and self.memory_ran_out(node_id, count.value):
                return Cause.MEMORY, "its process was killed by the system"
            return None
        answer = ask_node(node_id, look_from_node, self._needs)
        problems = problems_in(answer)
        if answer.problem is not None and is_lost(node_id, error):
            return Cause.NODE, _LOST
        return (Cause.NODE, self.refuse(node_id, _in_words(problems))) if problems else None


def what_node_lacks(needs: Mapping[str, Any]) -> str:
    """What this node lacks of what a study `needs`, in a line; empty if nothing. Data at an address are copied here."""
    wanted = Needs(**needs)
    problems = look_from_node(wanted)
    if not problems:
        try:
            local_copy(wanted.data, leave_out=wanted.leave_out)
        except StudytoolError as error:
            return f"data: {error}"
    return _in_words(problems)


def _in_words(problems: Sequence[Finding]) -> str:
    return ", and ".join(f"{problem.what}: {problem.found}; {problem.mend}" for problem in problems)
