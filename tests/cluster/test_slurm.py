"""cluster/slurm.sbatch: its decisions with stand-ins for SLURM and Ray, and once with real ones."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_machine

ROOT = Path(__file__).parents[2]

STAND_INS = {
    "bin/srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "bin/getent": "echo 10.0.0.1 STREAM $2",
    "bin/scontrol": 'if [ "$1" = requeue ]; then echo "$2" >> requeued; else printf "%s\\n" ${3//,/ }; fi',
    "project/.venv/bin/ray": """
        if [ "$1" = start ]; then echo "$@" >> rays; echo $$ >> ray_pids; exec sleep 1000; fi
        [ -f ray_is_broken ] || sed 's/.*/ 1 node_x/' rays""",
    # A study that answers the signal as the real one does, and says how it was called.
    "project/.venv/bin/studytool": """
        trap 'echo written > checkpoint; exit 75' USR1
        trap 'exit 143' TERM
        echo "$@" >> studies; cp "$RAY_AUTH_TOKEN_PATH" token
        [ "$(cat study_does)" = wait ] || exit "$(cat study_does)"
        while true; do sleep 0.1; done""",
}


class Job:
    """One start of the script, in a folder whose SLURM and Ray are stand-ins."""

    def __init__(self, folder: Path, study_does: str = "wait", **environment: str) -> None:
        self.folder = folder / "project"
        for name, text in STAND_INS.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/usr/bin/env bash\n{text}\n")
            path.chmod(0o755)
        (self.folder / "cluster").mkdir(exist_ok=True)
        for name in ("slurm.sbatch", "environment.sh"):
            shutil.copy(ROOT / "cluster" / name, self.folder / "cluster")
        (self.folder / "study_does").write_text(study_does)
        self.home = folder / "home"
        self.home.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            ["bash", self.folder / "cluster/slurm.sbatch", "study.yaml", "--set", "seed=3"],
            env={
                "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
                "HOME": str(self.home),
                "SLURM_JOB_ID": "17",
                "SLURM_SUBMIT_DIR": str(self.folder),
                "SLURM_JOB_NODELIST": "n1,n2",
                "STUDYTOOL_POLL_SECONDS": "0.1",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def await_file(self, name: str) -> str:
        for _ in range(200):
            if (self.folder / name).exists() and (self.folder / name).read_text():
                return (self.folder / name).read_text()
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"no {name}: {self.process.communicate()[0]}")

    def end(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=30)[0]
        return self.process.returncode, said

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []


def test_at_the_time_limit_it_saves_and_comes_back_until_the_study_is_done(tmp_path):
    job = Job(tmp_path)
    job.await_file("studies")
    assert re.fullmatch("[0-9a-f]{64}", job.await_file("token"))
    job.process.send_signal(signal.SIGUSR1)
    code, said = job.end()
    assert code == 75
    assert (job.folder / "checkpoint").read_text() == "written\n"
    assert job.requeued == ["17"], said
    for pid in job.await_file("ray_pids").split():
        assert not Path(f"/proc/{pid}").exists()
    assert list((job.home / ".studytool").iterdir()) == []

    again = Job(tmp_path, study_does="0", SLURM_RESTART_COUNT="1")
    code, said = again.end()
    assert code == 0
    assert "the study is done" in said
    assert again.requeued == ["17"]
    assert (job.folder / "studies").read_text() == "run study.yaml --set seed=3 --address 10.0.0.1:20170\n" * 2


def test_ray_runs_on_every_node_with_ports_of_the_job(tmp_path):
    job = Job(tmp_path, study_does="0", SLURM_GPUS_ON_NODE="2", SLURM_CPUS_PER_TASK="4")
    assert job.end()[0] == 0
    head, others = sorted((job.folder / "rays").read_text().splitlines(), key=lambda line: "--head" not in line)
    assert "--head --node-ip-address=10.0.0.1 --port=20170" in head
    assert "--address=10.0.0.1:20170" in others
    for line in (head, others):
        assert "--num-cpus=4 --num-gpus=2" in line


def test_a_real_failure_ends_it(tmp_path):
    job = Job(tmp_path, study_does="1")
    code, said = job.end()
    assert code == 1
    assert job.requeued == []
    assert "failed with exit code 1" in said


def test_it_comes_back_only_so_many_times(tmp_path):
    job = Job(tmp_path, study_does="75", SLURM_RESTART_COUNT="3", STUDYTOOL_MOST_RESTARTS="3")
    code, said = job.end()
    assert code == 1
    assert job.requeued == []
    assert "started 4 times" in said


def test_cancelled_is_not_queued_again(tmp_path):
    job = Job(tmp_path)
    job.await_file("studies")
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == 143
    assert job.requeued == []


def test_a_time_limit_while_ray_comes_up_loses_nothing(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project/ray_is_broken").touch()
    job = Job(tmp_path)
    job.await_file("rays")
    time.sleep(0.3)
    job.process.send_signal(signal.SIGUSR1)
    assert job.end()[0] == 75
    assert job.requeued == ["17"]
    assert not (job.folder / "studies").exists()


A_STUDY = """
import pathlib, signal, sys, time, ray
ray.init(address=sys.argv[sys.argv.index("--address") + 1], log_to_driver=False)
print("STARTED with", ray.cluster_resources().get("CPU"), "cores", flush=True)
epochs = pathlib.Path("epochs")
def stop(*_):
    print("STOPPED after", epochs.read_text().split()[-1], flush=True)
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
done = len(epochs.read_text().split()) if epochs.exists() else 0
for epoch in range(done, 50):
    time.sleep(1)
    with epochs.open("a") as file:
        file.write(f"{epoch}\\n")
"""


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.skipif(slurm_machine.why_not() is not None, reason=str(slurm_machine.why_not()))
def test_a_real_slurm_reaches_the_time_limit_and_finishes_in_a_second_start(tmp_path):
    project = tmp_path / "project"
    (project / ".venv/bin").mkdir(parents=True)
    shutil.copytree(ROOT / "cluster", project / "cluster")
    (project / ".venv/bin/ray").symlink_to(Path(sys.executable).parent / "ray")
    (project / "study.py").write_text(A_STUDY)
    studytool = project / ".venv/bin/studytool"
    studytool.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} study.py "$@"\n')
    studytool.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    with slurm_machine.slurm(tmp_path) as environment:
        environment |= {"HOME": str(home), "STUDYTOOL_POLL_SECONDS": "1"}
        options = ["--nodes=1", "--time=2", "--signal=B:USR1@60", "--mem=0", "--cpus-per-task=1", "--gpus-per-node=0"]
        sent = subprocess.run(
            ["sbatch", "--parsable", *options, "cluster/slurm.sbatch", "study.yaml"],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert sent.returncode == 0, sent.stderr
        job = sent.stdout.strip()
        log = project / f"studytool-{job}.log"
        deadline = time.monotonic() + 360
        while time.monotonic() < deadline:
            said = log.read_text() if log.exists() else ""
            if "the study is done" in said or "not queued again" in said or "did not come up" in said:
                break
            time.sleep(1)
        folder = Path(f"/tmp/st-{job}")
        while folder.exists() and time.monotonic() < deadline:
            time.sleep(0.5)
    assert "queued again" in said, said
    assert "the study is done" in said, said
    assert said.count("STARTED with 1.0 cores") == said.count("STOPPED after") + 1 >= 2
    epochs = [int(line) for line in (project / "epochs").read_text().split()]
    assert epochs == list(range(50))
    assert list((home / ".studytool").iterdir()) == []
    assert not folder.exists()
