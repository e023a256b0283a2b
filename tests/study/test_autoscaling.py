"""What may come to a cluster, read from the files of this project with which clusters are made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from studytool.settings import ResourceSettings
from studytool.study import autoscaling
from studytool.study.autoscaling import nodes_that_may_come
from studytool.study.slots import Node, share_out_over

CLUSTER = Path(__file__).parents[2] / "cluster"
HEAD = Node(0, 0.0)


@pytest.fixture(autouse=True)
def _asked_anew():
    nodes_that_may_come.cache_clear()
    yield
    nodes_that_may_come.cache_clear()


@pytest.fixture
def monitor(tmp_path):
    """Something that runs with the words of the monitor that Ray starts on the head of a cluster of `ray up`."""
    started = []

    def start(config: Path, gcs: str) -> None:
        waits = "import sys; print(flush=True); sys.stdin.read()"
        words = [sys.executable, "-c", waits, f"--gcs-address={gcs}", f"--autoscaling-config={config}"]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()
        started.append(process)

    yield start
    for process in started:
        process.communicate(timeout=30)


def test_a_cluster_that_begins_with_its_head_alone_has_the_slots_of_all_that_may_come(monitor, tmp_path):
    config = yaml.safe_load((CLUSTER / "gpu.yaml").read_text())
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(config))  # as `ray up` writes it
    monitor(tmp_path / "ray_bootstrap_config.yaml", "10.0.0.1:6379")
    # Of spot and bought machines together no more than the cluster may have.
    assert nodes_that_may_come("10.0.0.1:6379") == (Node(4, 1.0, 8),)
    assert nodes_that_may_come("10.0.0.2:6379") == ()
    slots = share_out_over(ResourceSettings(), [HEAD, *nodes_that_may_come("10.0.0.1:6379")], place="the largest node")
    assert (slots.count, slots.cpu, slots.gpu) == (8, 4, 1.0)


def test_a_configuration_that_cannot_be_read_costs_no_study(monitor, tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("max_workers: [")
    monitor(tmp_path / "config.yaml", "10.0.0.3:6379")
    assert nodes_that_may_come("10.0.0.3:6379") == ()
    assert "only nodes that are up count" in caplog.text


def test_in_a_pod_the_raycluster_tells(monkeypatch, tmp_path):
    """Ray's own translation of a RayCluster, from this project's file; only Kubernetes' server is not there."""
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    documents = [d for d in yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text()) if d]
    (job,) = (d for d in documents if d["kind"] == "RayJob")
    cluster = {"metadata": {"name": "studytool", "namespace": "lab"}, "spec": job["spec"]["rayClusterSpec"]}
    asked = []

    def get(self: object, path: str) -> dict[str, object]:
        asked.append(path)
        return cluster

    monkeypatch.setattr(KubernetesHttpApiClient, "__init__", lambda self, namespace: asked.append(namespace))
    monkeypatch.setattr(KubernetesHttpApiClient, "get", get)
    (tmp_path / "namespace").write_text("lab\n")
    monkeypatch.setattr(autoscaling, "_NAMESPACE", tmp_path / "namespace")
    assert nodes_that_may_come("10.0.0.4:6379") == ()
    nodes_that_may_come.cache_clear()
    monkeypatch.setenv("RAY_CLUSTER_NAME", "studytool")
    assert nodes_that_may_come("10.0.0.4:6379") == (Node(4, 1.0, 8), Node(4, 1.0, 2))
    assert asked == ["lab", "rayclusters/studytool"]
