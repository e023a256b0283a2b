"""Asking every node of a running Ray cluster something: beside study.tuning the only module that imports Ray."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Read by Ray when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from studytool.errors import StudytoolError

PATIENCE_SECONDS = 120.0
"""A node's first answer takes as long as Python, torch and the project need to load there."""


@dataclass(frozen=True)
class NodeAnswer:
    """What a node said, or why it said nothing, and how far its clock is from ours at least, in seconds."""

    node: str
    value: Any = None
    problem: str | None = None
    clock_ahead_seconds: float = 0.0


def ask_every_node(address: str, question: Callable[..., Any], *arguments: Any) -> tuple[NodeAnswer, ...]:
    """Call `question(*arguments)` once on every node of the cluster at `address`, all at the same time.

    Args:
        address: HOST:PORT of the head, or "auto" on a node of the cluster.
        question: a function of a module that the nodes have; what it returns travels back.

    Raises:
        StudytoolError: there is no cluster, or it does not let us in.
    """
    refuse_silence(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, ray.exceptions.RayError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _no_cluster(address, line) from None
    try:
        nodes = sorted(
            (node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeManagerAddress"])
        )
        begin = time.time()
        calls = {
            node["NodeID"]: ray.remote(_answer)
            .options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote(question, arguments)
            for node in nodes
        }
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=PATIENCE_SECONDS)
        return tuple(_read(str(node["NodeManagerAddress"]), calls[node["NodeID"]], begin) for node in nodes)
    finally:
        ray.shutdown()


def refuse_silence(address: str) -> None:
    """Raise StudytoolError if nothing listens at HOST:PORT; Ray itself would try for minutes. Other forms pass."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdigit() and "/" not in host):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from None


def _no_cluster(address: str, reason: str) -> StudytoolError:
    return StudytoolError(
        f"--address {address}: no Ray cluster answers there ({reason}); is it up (`ray status`), is this machine in "
        "its network, and is ~/.ray/auth_token the cluster's?"
    )


def _answer(question: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[float, Any]:
    return time.time(), question(*arguments)


def _read(node: str, call: Any, begin: float) -> NodeAnswer:
    try:
        there, value = ray.get(call, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return NodeAnswer(node, problem=f"no answer in {PATIENCE_SECONDS:.0f} s")
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return NodeAnswer(node, problem=lines[-1].strip())
    # Asked and answered between `begin` and now: only what is outside is the clock's fault.
    late, early = there - time.time(), there - begin
    return NodeAnswer(node, value, clock_ahead_seconds=late if late > 0 else min(early, 0.0))
