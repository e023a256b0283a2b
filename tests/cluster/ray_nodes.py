"""A Ray cluster of several nodes on this machine, on loopback, for tests: nodes can be lost and can join."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest


class RayNodes:
    """A head that runs no trials, and workers with one core each; all work in the folder they were started in."""

    def __init__(self, folder: Path, dashboard_port: int | None = None) -> None:
        from ray.cluster_utils import Cluster

        Path("/tmp/ray").mkdir(exist_ok=True)  # Ray writes the address of the last cluster there
        dashboard = {} if dashboard_port is None else {"include_dashboard": True, "dashboard_port": dashboard_port}
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "temp_dir": str(folder), **_loopback(), **dashboard},
        )
        self.workers: list[Any] = []
        self.folder = folder
        self._joined = 0

    @property
    def address(self) -> str:
        """HOST:PORT of the head."""
        return str(self._cluster.address)

    def join(self, **environment: str) -> None:
        """Another worker node, with something else in its environment than this process has."""
        self._joined += 1
        # What is kept on a machine is that machine's own.
        own = {"STUDYTOOL_CACHE": str(self.folder / f"cache-{self._joined}"), **environment}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in own.items():
                patch.setenv(name, value)
            self.workers.append(self._cluster.add_node(num_cpus=1, **_loopback()))

    def lose(self, node: Any) -> None:
        """SIGKILL to all of a node's processes, as when its machine loses power."""
        raylet = node.all_processes["raylet"][0].process
        own = [raylet.pid, *(child.pid for child in psutil.Process(raylet.pid).children(recursive=True))]
        for pid in own:
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()
        raylet.wait()
        self._cluster.remove_node(node, allow_graceful=False)
        self.workers.remove(node)

    def stop(self) -> None:
        """End them all."""
        self._cluster.shutdown()


def _loopback() -> dict[str, Any]:
    """Every node an agent's port of its own: other clusters on this machine have some, too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port = probe.getsockname()[1]
    return {
        "node_ip_address": "127.0.0.2",  # Ray takes 127.0.0.1 for the machine's other address
        "object_store_memory": 80_000_000,
        "include_dashboard": False,
        "dashboard_agent_listen_port": port,
    }


@contextmanager
def ray_nodes(count: int, dashboard_port: int | None = None) -> Iterator[RayNodes]:
    """`count` nodes in the current folder, one of them the head."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    # Ray allows the paths of sockets 107 characters.
    with tempfile.TemporaryDirectory(prefix="rn-", ignore_cleanup_errors=True) as folder:
        nodes = RayNodes(Path(folder), dashboard_port)
        try:
            for _ in range(count - 1):
                nodes.join()
            yield nodes
        finally:
            nodes.stop()
