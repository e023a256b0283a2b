"""`ray up cluster/onprem.yaml`, run for real: two machines that are one, reached by SSH on two loopback addresses."""

from __future__ import annotations

import getpass
import json
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest
import ssh_machines
from ssh_machines import ADDRESSES, Machines, free_port

from studytool.results import Outcome
from studytool.study.records import read_records

ROOT = Path(__file__).parents[2]
STUDY = "~/studytool/search_spaces/quickstart.yaml"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def machines():
    reason = ssh_machines.why_not()
    if reason:
        pytest.skip(reason)
    with ssh_machines.two_machines() as found:
        yield found


def cluster_file(machines: Machines, dashboard_port: int) -> Path:
    """cluster/onprem.yaml with what a user changes, and with ports that two nodes on one machine can both have."""
    head, worker = ADDRESSES
    text = (ROOT / "cluster/onprem.yaml").read_text()
    for found, wanted in (
        ("cluster_name: studytool", f"cluster_name: {machines.folder.name}"),
        ("192.168.1.10 ", f"{head} "),
        ("[192.168.1.11]", f"[{worker}]"),
        ("CHANGE-ME", getpass.getuser()),
        ("~/.ssh/id_ed25519", str(machines.key)),
        ("6379", str(free_port())),
        ("--dashboard-port=8265", f"--dashboard-port={dashboard_port} --ray-client-server-port={free_port()}"),
    ):
        assert found in text
        text = text.replace(found, wanted)
    text = re.sub(
        "--object-manager-port=8076",
        lambda _: f"--object-manager-port={free_port()} --dashboard-agent-listen-port={free_port()} --num-cpus=1",
        text,
    )
    path = machines.folder / "onprem.yaml"
    path.write_text(text)
    return path


def ray(machines: Machines, *arguments: str | Path, seconds: float = 250) -> str:
    """Ray's launcher as a person gives it, in the copy of the repository; what it says."""
    done = subprocess.run(
        ["ray", *arguments],
        cwd=ROOT,
        env=machines.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


ASK_EVERY_NODE = """
import json, os, subprocess, sys, time, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init(address="auto", log_to_driver=False)
for _ in range(120):
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 2:
        break
    time.sleep(1)
@ray.remote(num_cpus=1)
def home():
    return os.environ["HOME"]
asked = {node["NodeManagerAddress"]: home.options(scheduling_strategy=On(node["NodeID"], soft=False)) for node in nodes}
print("HOMES " + json.dumps({address: ray.get(task.remote(), timeout=60) for address, task in asked.items()}))
stranger = "import sys, ray; ray.init(address=sys.argv[1])"
address = ray.get_runtime_context().gcs_address
ray.shutdown()
done = subprocess.run([sys.executable, "-c", stranger, address], env={**os.environ, "RAY_AUTH_MODE": "disabled"},
                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
print("STRANGER", done.returncode, "AuthenticationError" in done.stdout or "Unauthenticated" in done.stdout.title())
"""


def test_a_cluster_comes_up_works_and_goes(machines):
    head, _ = ADDRESSES
    ray(machines, "get-auth-token", "--generate")
    dashboard_port = free_port()
    config = cluster_file(machines, dashboard_port)
    ray(machines, "up", "--yes", config)
    (machines.home(head) / "ask.py").write_text(ASK_EVERY_NODE)

    said = ray(machines, "exec", config, "~/studytool/.venv/bin/python ~/ask.py")

    assert json.loads(re.search(r"HOMES (.*)", said)[1]) == {
        address: str(machines.home(address)) for address in ADDRESSES
    }
    assert "STRANGER 1 True" in said, said[-3000:]
    said = ray(machines, "exec", config, f"~/studytool/.venv/bin/studytool doctor {STUDY} --address auto || true")
    assert re.search(r"ok +python .*all 2 nodes", said), said[-3000:]
    assert re.search(r"ok +versions +the same \d+ packages on 2 nodes", said)
    assert re.search(r"fail +data .*relative path", said)

    shared = machines.folder / "shared"  # both machines see it under the same name
    small = [f"data.path={shared}/data", f"output={shared}/studies", f"tracking.uri=sqlite:///{shared}/mlflow.db"]
    small += ["data.simulate.classes=3", "data.simulate.volumes_per_class=16", "'arms.init=[random]'"]
    small += ["search.trials_per_arm=2", "confirm.seeds=2", "train.max_epochs=1", "train.batch_size=4"]
    command = f"~/studytool/.venv/bin/studytool run {STUDY} --address auto --no-plan --set {' --set '.join(small)}"
    said = ray(machines, "exec", config, command, seconds=400)
    assert "table and figures" in said
    assert [record.outcome for record in read_records(shared / "studies/quickstart")] == [Outcome.COMPLETE] * 4

    for port in (dashboard_port, machines.mlflow_port):
        await_answer("127.0.0.1", port)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((head, port), timeout=5)

    for address in ADDRESSES:
        home = machines.home(address)
        assert "--editable .[cluster]" in (home / "installed").read_text()
        assert (home / "studytool/search_spaces/quickstart.yaml").is_file()
        assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600

    ray(machines, "down", "--yes", config)
    # Ray stops the head; a worker that finds no head any more ends by itself.
    deadline = time.monotonic() + 100
    while (left := ray_processes(machines)) and time.monotonic() < deadline:
        time.sleep(1)
    assert left == []


def await_answer(address: str, port: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on {address}:{port}"
            time.sleep(1)


def ray_processes(machines: Machines) -> list[str]:
    return [
        command
        for _, mark, command in ssh_machines.marked_processes()
        if mark.startswith(str(machines.folder)) and ("raylet" in command or "gcs_server" in command)
    ]
