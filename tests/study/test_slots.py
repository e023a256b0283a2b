from __future__ import annotations

import pytest

from studytool.errors import StudytoolError
from studytool.settings import ResourceSettings
from studytool.study.slots import Node, Slots, count_slots, share_out, share_out_over

HEAD = Node(cores=0, gpus=0)


def on_cluster(*nodes: Node, **resources: object) -> Slots:
    return share_out_over(ResourceSettings(**resources), nodes, place="the largest node")


def test_a_machine_alone():
    assert share_out(ResourceSettings(), 8, 2) == Slots(count=2, cpu=4, gpu=1, on_one_node=2)
    assert share_out(ResourceSettings(), 3, 0) == Slots(count=3, cpu=1, gpu=0, on_one_node=3)
    assert share_out(ResourceSettings(gpu=0.5), 8, 1) == Slots(count=2, cpu=4, gpu=0.5, on_one_node=2)


def test_trials_that_share_a_gpu():
    shared = share_out(ResourceSettings(trials_per_gpu=4), 8, 2)
    assert shared == Slots(count=8, cpu=1, gpu=0.25, on_one_node=8)
    assert shared.side_by_side > 1, "no claims on cost are made of them"
    assert share_out(ResourceSettings(trials_per_gpu=4), 3, 0) == share_out(ResourceSettings(), 3, 0)
    assert share_out(ResourceSettings(trials_per_gpu="auto"), 8, 2).gpu == 1, "until it is measured"
    with pytest.raises(ValueError, match=r"gpu \(0.5\) and trials_per_gpu \(2\) both share out GPUs"):
        ResourceSettings(gpu=0.5, trials_per_gpu=2)


def test_a_cluster_whose_head_runs_no_trials():
    slots = on_cluster(HEAD, Node(8, 1, count=3), Node(16, 4))
    # The cores of the node that has the fewest for each GPU.
    assert slots == Slots(count=7, cpu=4, gpu=1, on_one_node=4)
    assert slots.side_by_side == 1


def test_cores_of_one_node_are_shared_but_not_those_of_others():
    slots = on_cluster(HEAD, Node(2, 0), Node(4, 0))
    assert (slots.count, slots.side_by_side) == (6, 4)


def test_no_trial_spans_two_nodes():
    assert on_cluster(Node(3, 0), Node(3, 0), cpu=2).count == 2
    with pytest.raises(StudytoolError, match=r"resources.cpu: a trial asks for 4 cores, the largest node has 3"):
        on_cluster(Node(3, 0), Node(3, 0), cpu=4)
    with pytest.raises(StudytoolError, match=r"resources.gpu: a trial asks for 2 GPUs, the largest node has 1"):
        on_cluster(Node(8, 1), Node(8, 1), gpu=2)
    with pytest.raises(StudytoolError, match=r"resources.cpu: a trial asks for 1 cores, the largest node has 0"):
        on_cluster(HEAD)


def test_nodes_come_and_go():
    settings = ResourceSettings(trials_at_once=3)
    assert [count_slots(settings, [Node(1, 0)] * n, cpu=1, gpu=0).count for n in range(5)] == [0, 1, 2, 3, 3]
