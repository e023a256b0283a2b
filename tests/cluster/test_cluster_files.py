"""The files in cluster/: Ray's own checks of its cluster files, and what those let pass."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
RAY_FILES = ("gpu.yaml", "gpu-gcp.yaml", "onprem.yaml")
CLOUD_FILES = ("gpu.yaml", "gpu-gcp.yaml")
# Ray's schema lets any key of a provider pass; these are the ones that the providers read.
PROVIDER_KEYS = {
    "aws": {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "key_pair"},
    "gcp": {"type", "region", "availability_zone", "project_id", "cache_stopped_nodes", "use_internal_ips"},
    "local": {"type", "head_ip", "worker_ips", "external_head_ip"},
}
# Of EC2's RunInstances and of Compute Engine's instances.insert.
NODE_KEYS = {
    "aws": {
        *("InstanceType", "ImageId", "IamInstanceProfile", "BlockDeviceMappings", "InstanceMarketOptions"),
        *("KeyName", "MetadataOptions", "SubnetIds", "SecurityGroupIds"),
    },
    "gcp": {"machineType", "disks", "serviceAccounts", "metadata", "scheduling", "networkInterfaces"},
}
SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|aws_secret|(?i:password|secret_key|api_key)\s*[:=]|ghp_\w{20}|[0-9a-f]{32}"
)


def load(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return config


def problems(config: dict[str, Any], folder: Path) -> list[str]:
    """What Ray's validation lets pass and would only be found out by a cluster that does not come up, or costs on."""
    found = []
    kind = config["provider"]["type"]
    found += [f"provider.{key}: unknown" for key in config["provider"] if key not in PROVIDER_KEYS[kind]]
    for name, node in config.get("available_node_types", {}).items():
        found += [f"{name}.{key}: unknown" for key in node["node_config"] if key not in NODE_KEYS[kind]]
    for target, source in config["file_mounts"].items():
        path = Path(source)
        if not source.startswith("~") and not (folder / path).exists():
            found.append(f"file_mounts: {source} does not exist")
        if not target.startswith("~/"):
            found.append(f"file_mounts: {target} is not in the home folder")
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    if not any("ray start --head" in c and "--dashboard-host=127.0.0.1" in c for c in starts):
        found.append("the dashboard does not listen on loopback alone")
    if any("ray st" in command and "environment.sh" not in command for command in starts):
        found.append("Ray is started without cluster/environment.sh")
    if any("0.0.0.0" in command for command in all_commands(config)):
        found.append("something listens on every address")
    if any("ray-wheels" in command or "pip install" in command for command in all_commands(config)):
        found.append("something is installed beside the pinned environment")
    if kind in ("aws", "gcp") and config["provider"].get("cache_stopped_nodes") is not False:
        found.append("provider.cache_stopped_nodes: stopped machines go on costing")
    return found


def all_commands(config: dict[str, Any]) -> list[str]:
    return [command for key, value in config.items() if key.endswith("_commands") for command in value]


def as_ray_sees_it(name: str) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(load(name))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", RAY_FILES)
def test_ray_takes_the_file(name):
    as_ray_sees_it(name)


@pytest.mark.parametrize("name", RAY_FILES)
def test_what_ray_would_let_pass(name):
    # With Ray's defaults filled in: none of its bad ones may be left.
    assert problems(as_ray_sees_it(name), ROOT) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("provider", "regoin"), "us-east-1", "provider.regoin"),
        (("provider", "cache_stopped_nodes"), True, "stopped machines"),
        (("available_node_types", "head", "node_config", "InstanceTyp"), "m7i.xlarge", "InstanceTyp"),
        (("file_mounts", "~/x"), "no-such-file", "no-such-file"),
        (("setup_commands",), ["pip install ray"], "beside the pinned"),
        (("head_start_ray_commands",), ["ray start --head --dashboard-host=0.0.0.0"], "loopback"),
    ],
)
def test_the_checks_find_what_is_wrong(path, value, said):
    config = copy.deepcopy(load("gpu.yaml"))
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(said in line for line in problems(config, ROOT))


@pytest.mark.parametrize("name", CLOUD_FILES)
def test_gpus_come_and_go_and_the_head_has_none(name):
    config = load(name)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["head"]["max_workers"] == 0
    spot, paid = types["gpu_spot"], types["gpu_on_demand"]
    assert spot["min_workers"] == paid["min_workers"] == 0
    assert spot["max_workers"] <= config["max_workers"]
    assert spot["resources"]["GPU"] == paid["resources"]["GPU"] == 1
    assert spot["priority"] > paid.get("priority", 0)
    assert 0 < config["idle_timeout_minutes"] <= 15
    assert "spot" in json.dumps(spot["node_config"]).lower()
    assert "spot" not in json.dumps([paid["node_config"], types["head"]["node_config"]]).lower()


@pytest.mark.parametrize("name", CLOUD_FILES)
def test_worker_and_head_images_and_disks(name):
    nodes = [node["node_config"] for node in load(name)["available_node_types"].values()]
    if name == "gpu.yaml":
        assert len({node["ImageId"] for node in nodes}) == 1
        assert all(node["BlockDeviceMappings"][0]["Ebs"]["DeleteOnTermination"] for node in nodes)
        assert nodes[0]["IamInstanceProfile"] != nodes[1]["IamInstanceProfile"] == nodes[2]["IamInstanceProfile"]
    else:
        assert len({node["disks"][0]["initializeParams"]["sourceImage"] for node in nodes}) == 1
        assert all(node["disks"][0]["autoDelete"] for node in nodes)


def test_the_three_files_set_nodes_up_in_the_same_way():
    configs = [load(name) for name in RAY_FILES]
    for key in ("file_mounts", "rsync_exclude", "setup_commands", "head_setup_commands", "initialization_commands"):
        assert configs[0][key] == configs[1][key] == configs[2][key], key


def test_the_token_travels_as_a_private_file():
    for name in RAY_FILES:
        config = load(name)
        assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
        assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    assert "export RAY_AUTH_MODE=token" in (CLUSTER / "environment.sh").read_text()


@pytest.mark.parametrize("path", sorted(CLUSTER.iterdir()), ids=lambda path: path.name)
def test_no_secret_and_no_machine_of_anybody(path):
    text = path.read_text()
    assert not SECRETS.search(text)
    assert set(re.findall(r"\d+\.\d+\.\d+\.\d+", text)) <= {"127.0.0.1", "0.0.0.0", "192.168.1.10", "192.168.1.11"}
    assert "/root" not in text


def test_what_the_nodes_install_is_what_the_project_pins():
    for script in ("install.sh", "Dockerfile"):
        text = (CLUSTER / script).read_text()
        assert "uv pip install" in text
        assert ".[cluster]" in text
        assert "0.13.9" in text
    pinned = re.search(r'"ray==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned
    assert f'rayVersion: "{pinned[1]}"' in (CLUSTER / "kuberay.yaml").read_text()


SCRIPTS = [CLUSTER / name for name in ("install.sh", "environment.sh", "mlflow-server.sh", "slurm.sbatch")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_the_scripts(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here; install it")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_installation_stops_at_the_first_failure(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "project/cluster").mkdir(parents=True)
    shutil.copy(CLUSTER / "install.sh", tmp_path / "project/cluster")
    uv = tmp_path / "bin/uv"
    uv.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$1" = venv ]\n')
    uv.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", tmp_path / "project/cluster/install.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "line" in done.stderr
    assert "uv pip install" in done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    assert not (tmp_path / ".bashrc").exists()
