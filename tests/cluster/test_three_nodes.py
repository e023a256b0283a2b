"""Studies on a running Ray cluster of three nodes: one is lost, another joins, the answer stays the same."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from ray_nodes import RayNodes, ray_nodes
from s3_server import KEYS, s3_client, s3_server
from whole_study import STEPS_PER_EPOCH, TINY, TRIALS, Study

from studytool.data.particles import Particle
from studytool.data.shards import open_dataset, write_dataset
from studytool.remote import open_remote
from studytool.results import Outcome
from studytool.study.records import read_records

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end, pytest.mark.timeout(1200)]

# What is proposed, and what is stopped, must not depend on which trial is faster.
STUDY = (
    TINY.replace("{asha: {grace_epochs: 1, reduction_factor: 2}}", "none\n  sampler: random").replace(
        "resources: {trials_at_once: 1}", "resources: {trials_at_once: 3}"
    )
    + "output: FOLDER/studies\ntracking: {uri: sqlite:///FOLDER/mlflow.db}\n"
)
TESTS = str(Path(__file__).parents[1])
"""Where the user's own network is, on every node."""


def study_in(folder: Path, data: Path) -> Study:
    folder.mkdir()
    (folder / "count-steps").touch()
    return Study(folder, STUDY.replace("path: data", f"path: {data}").replace("FOLDER", str(folder)))


@pytest.fixture(scope="module")
def on_one_node(tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("one")
    study = study_in(folder / "study", folder / "data")
    study.run()
    return study


@pytest.fixture
def study(tmp_path, on_one_node, monkeypatch):
    study = study_in(tmp_path / "study", on_one_node.folder.parent / "data")
    (study.folder / "slow").write_text("0.2")
    monkeypatch.chdir(study.folder)  # the nodes' processes work there, too
    monkeypatch.setenv("PYTHONPATH", TESTS)
    yield study
    study.kill_what_runs()


def wait_until_running(study: Study, process, *, trials: int) -> None:
    while sum(r.outcome is None for r in study.records.values()) < trials:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def lose_one_and_join(nodes: RayNodes, study: Study, process) -> None:
    """At a random moment at which both worker nodes have a trial."""
    wait_until_running(study, process, trials=2)
    seed = random.randrange(10**6)
    print(f"seed of the moment: {seed}")
    rng = random.Random(seed)
    time.sleep(rng.uniform(0, 6))
    wait_until_running(study, process, trials=2)
    nodes.lose(rng.choice(nodes.workers))
    time.sleep(rng.uniform(0, 3))
    nodes.join()


def check_lost(study: Study) -> None:
    """What the trial on the lost node ended with was noted as the node's loss, which uses up no retry."""
    logs = [path.read_text() for path in study.folder.glob("**/studies/**/tiny/trials/*/trial.log")]
    broke = re.findall(r"attempt \d+ broke.*", "".join(logs))
    assert broke == ["attempt 1 broke, to be tried again: its node was lost"]
    assert sorted(record.attempts for record in study.records.values()) == [1] * (TRIALS - 1) + [2]


def check_same(study: Study, expected: Study) -> None:
    assert study.what_was_found() == expected.what_was_found()
    assert len(study.records) == TRIALS
    assert sum(record.attempts for record in study.records.values()) <= TRIALS + 1
    # One trial ran on the node that was lost; it repeats at most the epoch that it was in.
    assert expected.steps() <= study.steps() <= expected.steps() + STEPS_PER_EPOCH
    # A trial may end before MLflow, on a busy machine, has told the id of its run to the ledger.
    assert study.problems_in_mlflow() == []


def test_a_node_is_lost_another_joins_and_the_answer_is_that_of_one_node(study, on_one_node):
    with ray_nodes(3) as nodes:
        process = study.start("--address", nodes.address)
        lose_one_and_join(nodes, study, process)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err

        # The cluster is not ours: it runs on, and another study can use it.
        again = study.start("--address", nodes.address)
        assert again.wait(timeout=120) == 0
    check_same(study, on_one_node)
    check_lost(study)


def test_a_node_that_joins_without_what_the_study_needs_gets_no_trials(study, on_one_node, tmp_path):
    other = tmp_path / "other/torch-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    none = tmp_path / "none/studytool"
    none.mkdir(parents=True)
    (none / "__init__.py").write_text("raise ImportError('no studytool on this node')")
    with ray_nodes(2) as nodes:
        process = study.start("--address", nodes.address)
        wait_until_running(study, process, trials=1)
        nodes.join(PYTHONPATH=f"{other.parent}:{TESTS}")
        nodes.join(PYTHONPATH=f"{none.parent}:{TESTS}")
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
    refusals = [line for line in out.splitlines() if "gets no trials" in line]
    # Told with the remedy, and not over and over.
    assert any("torch 9.9 instead of" in line and "cluster/install.sh" in line for line in refusals), out
    assert any("no studytool on this node" in line for line in refusals), out
    assert len(refusals) <= 4
    assert study.what_was_found() == on_one_node.what_was_found()
    assert study.steps() == on_one_node.steps()
    assert study.problems_in_mlflow() == []


class StudyAtAddress(Study):
    """Its results are at an address; what is looked at meanwhile is the driver's working copy."""

    @property
    def records(self):
        return {r.trial_id: r for copy in (self.folder / "cache/studies").glob("*/tiny") for r in read_records(copy)}


@contextmanager
def study_at_address(folder: Path, data: Path, monkeypatch) -> Iterator[tuple[StudyAtAddress, subprocess.Popen[bytes]]]:
    """The study with its data and results on an S3 server, and the server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    study_in(folder / "study", data)
    text = (folder / "study/a.yaml").read_text()
    text = re.sub(r"output: .*", "output: s3://bucket/studies", re.sub(r"path: .*", "path: s3://bucket/data", text))
    study = StudyAtAddress(folder / "study", text)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("STUDYTOOL_CACHE", str(study.folder / "cache"))
    monkeypatch.setenv("PYTHONPATH", TESTS)
    monkeypatch.chdir(study.folder)
    with s3_server(port, folder / "s3.log") as server:
        s3_client(port).create_dir("bucket")
        for path in data.rglob("*"):
            if path.is_file():
                open_remote("s3://bucket/data").put(path, path.relative_to(data).as_posix())
        yield study, server


def test_every_node_leaves_out_the_same_damaged_shard(tmp_path, monkeypatch):
    data, rng = tmp_path / "data", np.random.default_rng(0)
    splits = ("train", "train", "train", "val", "test")
    particles = [
        Particle(f"p{i}", "abc"[i % 3], "", splits[i % 5], rng.normal(size=(16, 16, 16)).astype(np.float32), 18.0)
        for i in range(60)
    ]
    write_dataset(particles, data, dtype="float32", provenance={}, volumes_per_shard=20)
    content = bytearray((data / "part-00001.parquet").read_bytes())
    content[500] ^= 1
    (data / "part-00001.parquet").write_bytes(content)
    with study_at_address(tmp_path, data, monkeypatch) as (study, _):
        try:
            with ray_nodes(3) as nodes:
                few = ["data.on_damage=skip", "search.trials_per_arm=1", "train.max_epochs=1"]
                process = study.start("--address", nodes.address, *(f"--set={text}" for text in few))
                out, err = process.communicate(timeout=400)
                assert process.returncode == 0, err
                copies = nodes.folder.glob("cache-*/datasets/*/without-*/manifest.json")
                opened = [open_dataset(manifest.parent) for manifest in copies]
        finally:
            study.kill_what_runs()
        assert "left out as damaged: 1 of 3 shards of s3://bucket/data" in out
        records = study.records.values()
        assert {(record.outcome, record.attempts) for record in records} == {(Outcome.COMPLETE, 1)}
        assert len(records) == 6
        # Both nodes read the same 40 volumes, each in a copy of its own.
        assert [len(dataset) for dataset in opened] == [40, 40]
        assert len({dataset.fingerprint for dataset in opened}) == 1


def test_the_same_with_data_and_results_at_an_address(tmp_path, on_one_node, monkeypatch):
    with study_at_address(tmp_path, on_one_node.folder.parent / "data", monkeypatch) as (study, server):
        (study.folder / "slow").write_text("0.2")
        try:
            with ray_nodes(3) as nodes:
                process = study.start("--address", nodes.address)
                lose_one_and_join(nodes, study, process)
                # An outage: the server does not answer, and then goes on.
                os.kill(server.pid, signal.SIGSTOP)
                time.sleep(5)
                os.kill(server.pid, signal.SIGCONT)
                _, err = process.communicate(timeout=400)
                assert process.returncode == 0, err
        finally:
            study.kill_what_runs()
        check_same(study, on_one_node)
        check_lost(study)

        # Everything is at the address: another machine knows as much, and has nothing left to do.
        shutil.rmtree(study.folder / "cache")
        again = study.start()
        out, err = again.communicate(timeout=120)
        assert again.returncode == 0, err
        assert "COMPLETE" not in out
        check_same(study, on_one_node)
        at_address = open_remote("s3://bucket/studies/tiny").files()
        assert {"study.json", "study.yaml", "table.txt", "report.html"} <= {*at_address}
        assert not [name for name in at_address if "last.pt" in name or "lease" in name]
        for record in study.records.values():
            assert (f"trials/{record.trial_id}/best.safetensors" in at_address) >= (record.test is not None)


def test_what_a_node_lacks_is_said_before_the_first_trial(study, tmp_path):
    with ray_nodes(2) as nodes:
        relative = study.start("--address", nodes.address, "--set", "output=studies")
        _, err = relative.communicate(timeout=120)
        assert relative.returncode == 1
        assert "output: 'studies' is a relative path" in err
        assert err.count("\n") == 1

        client = study.start("--address", "ray://127.0.0.1:10001")
        _, err = client.communicate(timeout=120)
        assert client.returncode == 1
        assert "studytool submit" in err
    assert not study.records
