"""A SLURM of the tests' own on this machine: a controller and two nodes, on free ports, in a temporary folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "srun", "scontrol", "scancel", "sinfo")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


def why_not() -> str | None:
    """Why there can be no SLURM here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    return f"no {', '.join(missing)} here; install slurmctld, slurmd and slurm-client" if missing else None


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start it, yield the environment that makes `sbatch` and the others speak to it, and end it."""
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    settings = folder / "slurm.conf"
    settings.write_text(
        "\n".join(
            [
                "ClusterName=studytool",
                f"SlurmctldHost={host}(127.0.0.1)",
                f"SlurmUser={user}",
                f"SlurmdUser={user}",
                "AuthType=auth/none",
                "CredType=cred/none",
                "AuthInfo=cred_expire=5",  # a job that is queued again waits so long at least
                f"SlurmctldPort={_free_port()}",
                f"FirstJobId={_free_port()}",  # a job's number names its folder in /tmp
                f"SlurmctldPidFile={folder}/controller.pid",
                f"SlurmdPidFile={folder}/%n.pid",
                f"StateSaveLocation={folder}",
                f"SlurmdSpoolDir={folder}/%n",
                "ProctrackType=proctrack/linuxproc",
                "TaskPlugin=task/none",
                "SwitchType=switch/none",
                "MpiDefault=none",
                "SelectType=select/cons_tres",
                "SelectTypeParameters=CR_CPU",
                "SchedulerType=sched/builtin",
                "JobAcctGatherType=jobacct_gather/none",
                "KillWait=5",
                *(
                    f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} CPUs={os.cpu_count()}"
                    for name in ("n1", "n2")
                ),
                "PartitionName=gpu Nodes=n1,n2 Default=YES MaxTime=10 State=UP",
            ]
        )
        + "\n"
    )
    environment = {**os.environ, "SLURM_CONF": str(settings), "PATH": _PATH}
    running = []
    try:
        for program, *options in (("slurmctld",), ("slurmd", "-N", "n1"), ("slurmd", "-N", "n2")):
            with (folder / f"{'-'.join([program, *options])}.log").open("w") as log:
                command = [shutil.which(program, path=_PATH) or program, "-D", *options]
                running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)
        for _ in range(60):
            shown = subprocess.run(["sinfo", "-h", "-o", "%T %D"], env=environment, capture_output=True, text=True)
            if shown.stdout.split() == ["idle", "2"]:
                break
            time.sleep(0.5)
        else:
            raise RuntimeError(f"SLURM's nodes do not come up: {shown.stdout}{shown.stderr}")
        yield environment
    finally:
        subprocess.run(["scancel", "--full", f"--user={user}"], env=environment, capture_output=True, timeout=20)
        time.sleep(1)
        for process in reversed(running):
            process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
