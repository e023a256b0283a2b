"""What is remembered of nodes; tests/cluster asks real ones."""

from __future__ import annotations

import pytest

from studytool.settings import ResourceSettings
from studytool.study import nodewatch
from studytool.study.clustercheck import Needs
from studytool.study.nodewatch import NodeWatch
from studytool.study.slots import Slots


@pytest.fixture
def nodes(monkeypatch) -> NodeWatch:
    monkeypatch.setattr(nodewatch, "address_of", lambda node_id: f"10.0.0.{node_id}")  # there is no cluster here
    return NodeWatch(ResourceSettings(), Slots(count=2, cpu=1, gpu=0.0), Needs("d", (), 0, "p", "u", (), {}))


def test_a_node_is_refused_for_a_while(nodes, monkeypatch):
    assert nodes.refused == ()
    line = nodes.refuse("7", "versions: torch 9.9 instead of 2.15; install it")
    assert line == "the node 10.0.0.7 gets no trials for 5 minutes: versions: torch 9.9 instead of 2.15; install it"
    assert nodes.refused == ("7",)
    monkeypatch.setattr(nodewatch, "REFUSED_SECONDS", -1.0)
    assert nodes.refused == ()


def test_memory_ran_out_where_the_node_has_killed_more_than_before(nodes):
    assert not nodes.memory_ran_out("7", 3), "it may have been somebody else's, before"
    assert not nodes.memory_ran_out("7", 3)
    assert not nodes.memory_ran_out("8", 0)
    assert nodes.memory_ran_out("7", 4)
    assert not nodes.memory_ran_out("7", 4)
