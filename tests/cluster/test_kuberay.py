"""cluster/kuberay.yaml against the fields of KubeRay's types; neither a cluster nor kubeconform is at hand for more."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# From KubeRay 1.5's API reference (ray.io/v1), and Kubernetes' own (core/v1, networking.k8s.io/v1).
RAY_JOB = {
    *("activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector"),
    *("submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode"),
    *("entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished"),
    *("shutdownAfterJobFinishes", "suspend"),
}
RAY_CLUSTER = {
    *("headGroupSpec", "workerGroupSpecs", "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions"),
    *("headServiceAnnotations", "suspend", "managedBy", "gcsFaultToleranceOptions"),
}
AUTOSCALER = {
    *("resources", "image", "imagePullPolicy", "env", "envFrom", "volumeMounts", "securityContext"),
    *("idleTimeoutSeconds", "upscalingMode", "version"),
}
HEAD = {"serviceType", "headService", "enableIngress", "rayStartParams", "template", "resources", "labels"}
WORKERS = {
    *("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"),
    *("scaleStrategy", "suspend", "idleTimeoutSeconds", "resources", "labels"),
}
POD = {
    *("serviceAccountName", "restartPolicy", "securityContext", "containers", "initContainers", "volumes"),
    *("nodeSelector", "tolerations", "affinity", "terminationGracePeriodSeconds"),
}
CONTAINER = {"name", "image", "command", "args", "env", "resources", "volumeMounts", "ports", "securityContext"}


@pytest.fixture(scope="module")
def objects():
    return {item["kind"]: item for item in yaml.safe_load_all((ROOT / "cluster/kuberay.yaml").read_text())}


@pytest.fixture(scope="module")
def pods(objects):
    cluster = objects["RayJob"]["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_fields_are_those_of_the_types(objects, pods):
    job = objects["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    cluster = job["spec"]["rayClusterSpec"]
    assert {*job["spec"]} <= RAY_JOB
    assert {*cluster} <= RAY_CLUSTER
    assert {*cluster["autoscalerOptions"]} <= AUTOSCALER
    assert {*cluster["headGroupSpec"]} <= HEAD
    for group in cluster["workerGroupSpecs"]:
        assert {*group} <= WORKERS
    for pod in pods:
        assert {*pod} <= POD
        for container in pod["containers"]:
            assert {*container} <= CONTAINER


def test_values_that_have_to_be_text_are_text(objects, pods):
    cluster = objects["RayJob"]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for pod in pods:
        for container in pod["containers"]:
            assert all(isinstance(item["value"], str) for item in container.get("env", []))
            assert all(isinstance(item, str) for item in [*container.get("command", []), *container.get("args", [])])
            amounts = [*container["resources"]["requests"].values(), *container["resources"]["limits"].values()]
            assert all(isinstance(amount, str) for amount in amounts)


def test_every_mounted_volume_exists(pods):
    for pod in pods:
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        mounted = {mount["name"] for item in pod["containers"] for mount in item.get("volumeMounts", [])}
        assert mounted == volumes


def test_the_token_is_on_and_nothing_is_open_to_all(objects, pods):
    cluster = objects["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    policy = objects["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert all("from" in rule for rule in policy["ingress"])
    mlflow = next(item for item in pods[0]["containers"] if item["name"] == "mlflow")
    assert mlflow["command"][mlflow["command"].index("--host") + 1] == "127.0.0.1"
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods)


def test_gpus_come_and_go_and_the_head_has_none(objects, pods):
    job, cluster = objects["RayJob"]["spec"], objects["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in cluster["workerGroupSpecs"])
    gpus = [pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for pod in pods]
    assert gpus == [None, "1", "1"]
    assert pods[0]["containers"][0]["name"] == "ray-head"  # KubeRay takes the first container for Ray's
    assert pods[0]["restartPolicy"] == "Never"  # the autoscaler of version v2 asks for it
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] > 0


def test_the_study_that_it_runs_is_in_the_image(objects):
    entrypoint = objects["RayJob"]["spec"]["entrypoint"].split()
    assert entrypoint[:2] == ["studytool", "run"]
    assert (ROOT / entrypoint[2]).is_file()
    assert "COPY search_spaces search_spaces" in (ROOT / "cluster/Dockerfile").read_text()
