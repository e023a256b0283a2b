"""The Ray that trials run on, our own or a cluster, and its nodes; see also study.tuning, worker and autoscaling."""

from __future__ import annotations

import gc
import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from studytool.study import rayenvironment  # noqa: F401 - first of all, since Ray reads it as it is imported

# isort: split
import ray
from ray._private.state import state as _state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from studytool.errors import StudytoolError
from studytool.settings import ResourceSettings
from studytool.study.autoscaling import nodes_that_may_come
from studytool.study.guardian import end_helpers, guarded_folder, mark
from studytool.study.signals import sheltered
from studytool.study.slots import Node, Slots, count_slots

PATIENCE_SECONDS = 120.0
"""A node's first answer takes as long as Python, torch and the project need to load there."""
_NOTICED_WITHIN_SECONDS = 10.0
"""A cluster may notice that a node is lost so much later than that its workers are silent."""
_SILENCE_NOTICED_WITHIN_SECONDS = 40.0
"""Ray gives up a node that has not answered five times, every three seconds; later where the head is busy."""


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
    with joined(address):
        return _ask((node for node in ray.nodes() if node["Alive"]), question, arguments)


def ask_node(node_id: str, question: Callable[..., Any], *arguments: Any) -> NodeAnswer:
    """The same for one node of the cluster that this process has joined."""
    (answer,) = _ask((node for node in ray.nodes() if node["NodeID"] == node_id), question, arguments)
    return answer


def _ask(
    nodes: Iterable[Mapping[str, Any]], question: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[NodeAnswer, ...]:
    in_order = sorted(nodes, key=lambda node: str(node["NodeManagerAddress"]))
    begin = time.time()
    calls = {
        node["NodeID"]: ray.remote(_answer)
        .options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        .remote(question, arguments)
        for node in in_order
    }
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=PATIENCE_SECONDS)
    return tuple(_read(str(node["NodeManagerAddress"]), calls[node["NodeID"]], begin) for node in in_order)


@contextmanager
def ray_session(address: str | None = None) -> Iterator[Path]:
    """A Ray of our own on this machine, or the running cluster at `address`, and a folder for what Ray Tune writes.

    Of our own nothing stays behind; a cluster that was joined runs on.

    Raises:
        StudytoolError: there is no cluster at the address, or it does not let us in; or our own does not start.
    """
    if address is not None:
        with TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as name, joined(address):
            yield Path(name)
        return
    with guarded_folder() as folder:
        try:
            _start_ray(folder)
            yield folder
        finally:
            # Ray asks each of its processes to end and waits a second for it; these have nothing to put in order.
            end_helpers(folder, but=("raylet", "gcs_server"))
            _leave_ray()


def _start_ray(folder: Path) -> None:
    """Start a Ray of our own; a busy machine gets three chances, as Ray waits for its processes for 30 s only."""
    for chances in (2, 1, 0):
        try:
            with mark(folder), sheltered():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    _temp_dir=str(folder),
                )
            return
        except Exception as error:  # Ray has no class for it
            _leave_ray()
            end_helpers(folder, but=())
            if not chances:
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise StudytoolError(
                    f"Ray does not start on this machine ({line[:200]}); where it is only busy, give the same command "
                    "again later, it goes on where the study stopped"
                ) from error


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Be a driver of the running cluster at `address`; it runs on afterwards.

    Raises:
        StudytoolError: there is no cluster, or it does not let us in.
    """
    refuse_silence(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **_on_loopback(address))
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, ray.exceptions.RayError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _no_cluster(address, line) from None
    try:
        yield
    finally:
        _leave_ray()


def _leave_ray() -> None:
    """Shut Ray down while no thread collects garbage.

    Whatever thread then drops a last reference to an object of Ray's, the whole process ends there and then: exit code
    1, nothing closed (Ray 2.60).
    """
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


@contextmanager
def job_client(address: str) -> Iterator[Any]:
    """Ray's client for the jobs of the cluster whose dashboard is at http://HOST:PORT; what goes wrong is one line.

    Raises:
        StudytoolError: nothing answers there, or the cluster does not do what it was asked.
    """
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
    if not address.startswith(("http://", "https://")):
        raise StudytoolError(
            f"--address {address}: jobs go to the cluster's dashboard; give http://HOST:8265, to which "
            "`ray dashboard CLUSTER.yaml` makes a tunnel"
        )
    try:
        yield JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StudytoolError(
            f"--address {address}: {line}; is the tunnel open (`ray dashboard CLUSTER.yaml`), and is "
            "~/.ray/auth_token the cluster's?"
        ) from None


def nodes_there(but: Collection[str] = ()) -> tuple[Node, ...]:
    """What the nodes of the cluster have that this process has joined, and what its autoscaler may bring.

    Those whose ids are in `but` do not count.
    """
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in but]
    there = tuple(Node(int(has.get("CPU", 0)), float(has.get("GPU", 0))) for has in alive)
    # The autoscaler starts nodes when trials wait for them: a cluster may begin with its head alone.
    return max(there, nodes_that_may_come(ray.get_runtime_context().gcs_address), key=_size)


def slots_on_cluster(resources: ResourceSettings, slots: Slots, but: Collection[str] = ()) -> Slots:
    """How many trials such as `slots` says the cluster runs now, but on the nodes `but`: nodes come and go."""
    return count_slots(resources, nodes_there(but), cpu=slots.cpu, gpu=slots.gpu)


def this_node() -> str:
    """The id of the node that this process runs on; a node that joins again has a new one."""
    return str(ray.get_runtime_context().get_node_id())


def address_of(node_id: str) -> str:
    """The address of a node of the cluster."""
    return next((str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == node_id), node_id)


def node_of(error: Exception | None) -> str | None:
    """The id of the node on which the worker ran that ended with this error, if it is one of Ray's about a worker."""
    actor = getattr(error, "actor_id", None)
    table = _state.actor_table(actor) if isinstance(actor, str) else None
    found = (table or {}).get("Address", {}).get("NodeID")
    return found if any(node["NodeID"] == found for node in ray.nodes()) else None


def is_lost(node_id: str, error: Exception | None) -> bool:
    """Whether the cluster has lost a node, on which a worker ended with `error`.

    It may notice it later than that the worker does not answer, above all where nobody has seen the worker die.
    """
    silent = isinstance(error, ray.exceptions.ActorUnavailableError)
    deadline = time.monotonic() + (_SILENCE_NOTICED_WITHIN_SECONDS if silent else _NOTICED_WITHIN_SECONDS)
    while True:
        if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def _size(nodes: tuple[Node, ...]) -> tuple[float, float]:
    return sum(node.gpus * node.count for node in nodes), sum(node.cores * node.count for node in nodes)


def _on_loopback(address: str) -> dict[str, str]:
    """A cluster on loopback has no node under this machine's other address, by which Ray would look for ours."""
    head = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host = head.rpartition(":")[0]
    return {"_node_ip_address": host} if host.startswith("127.") else {}


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
