"""What nodes a cluster's autoscaler may bring: it brings them only once trials wait for them.

Ray does not tell its drivers (2.60 has a place for it that nothing fills), so the autoscaler's own configuration is
read: on the head of a cluster that `ray up` made it is the file that Ray's monitor was started with, in a pod of
KubeRay the RayCluster. Elsewhere, only the nodes that are there count.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import yaml

from studytool.study.slots import Node

_OPTION = "--autoscaling-config="
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_log = logging.getLogger(__name__)


@cache
def nodes_that_may_come(gcs_address: str) -> tuple[Node, ...]:
    """The most nodes that the autoscaler of the cluster with this head may bring; none where it is not known."""
    try:
        config = _of_monitor(gcs_address) or _of_pod()
        return _kinds(config) if config else ()
    except Exception as error:  # a file, a server or a class of Ray's that is not as we know it
        _log.warning("what the autoscaler may bring cannot be read, so only nodes that are up count: %s", error)
        return ()


def _of_monitor(gcs_address: str) -> Mapping[str, Any] | None:
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        paths = [word.removeprefix(_OPTION) for word in words if word.startswith(_OPTION)]
        if paths and f"--gcs-address={gcs_address}" in words:
            config: Mapping[str, Any] = yaml.safe_load(Path(paths[0]).expanduser().read_text(encoding="utf-8"))
            return config
    return None


def _of_pod() -> Mapping[str, Any] | None:
    name = os.environ.get("RAY_CLUSTER_NAME")
    if not name or not _NAMESPACE.exists():
        return None
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    config: Mapping[str, Any] = AutoscalingConfigProducer(name, _NAMESPACE.read_text(encoding="utf-8").strip())()
    return config


def _kinds(config: Mapping[str, Any]) -> tuple[Node, ...]:
    """The nodes of each kind, the largest first, in all no more than the cluster may have; Ray has filled in both."""
    left, most = int(config["max_workers"]), []
    for name, kind in config["available_node_types"].items():
        if name != config.get("head_node_type"):
            has = kind.get("resources") or {}
            count = int(kind["max_workers"])
            most.append(Node(int(has.get("CPU", 0)), float(has.get("GPU", 0)), count))
    nodes = []
    for node in sorted(most, key=lambda node: (node.gpus, node.cores), reverse=True):
        count = min(node.count, left)
        left -= count
        nodes += [Node(node.cores, node.gpus, count)] * (count > 0)
    return tuple(nodes)
