"""Two machines that are one: an SSH server of the tests' own on two loopback addresses, each with a home folder.

The accounts' `uv` makes an environment of the one that the tests run in, instead of downloading one, and their
`ray stop` ends only what was started over that address: on one machine Ray's own would end every Ray there is.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = ("127.0.0.2", "127.0.0.3")  # Ray takes 127.0.0.1 for "whatever address I have"
MARK = "STUDYTOOL_TEST_MACHINE"
_RAY = ("site-packages/ray/", "ray::", "/ray start")


@dataclass(frozen=True)
class Machines:
    """The folder that holds everything, the port of both machines' SSH servers, and that of the head's MLflow."""

    folder: Path
    port: int
    mlflow_port: int

    @property
    def key(self) -> Path:
        """The private key that opens both accounts."""
        return self.folder / "key"

    def home(self, address: str) -> Path:
        """The home folder of the account on the machine with this address."""
        return self.folder / address

    def environment(self) -> dict[str, str]:
        """What a person's own machine has, from which the others are reached."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SSH_"))},
            "HOME": str(self.folder / "laptop"),
            "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_TMPDIR": str(self.folder),
            "TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def processes(self) -> list[int]:
        """Every process that was started over SSH on either machine."""
        return [pid for pid, mark, _ in marked_processes() if mark.startswith(f"{self.folder}@")]


def why_not() -> str | None:
    """Why there can be no such machines here, or None."""
    missing = [name for name in ("ssh", "ssh-keygen", "rsync") if shutil.which(name) is None]
    if _sshd() is None:
        missing.append("sshd")
    if missing:
        return f"no {', '.join(missing)} here; install openssh-server, openssh-client and rsync"
    for address in ADDRESSES:
        with socket.socket() as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                return f"{address} is no address of this machine"
    return None


@contextlib.contextmanager
def two_machines() -> Iterator[Machines]:
    """Start the SSH server; at the end it and everything that was started through it is gone."""
    folder = Path(tempfile.mkdtemp(prefix="st-", dir="/tmp"))  # Ray's sockets want a short path
    machines = Machines(folder, free_port(), free_port())
    server = None
    try:
        _prepare(machines)
        server = subprocess.Popen([_sshd() or "", "-D", "-e", "-f", folder / "sshd_config"], stderr=_log(folder))
        _await_port(machines.port, server)
        yield machines
    finally:
        if server is not None:
            server.terminate()
            server.wait(10)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in machines.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + 10
            while machines.processes() and time.monotonic() < deadline:
                time.sleep(0.2)
        shutil.rmtree(folder, ignore_errors=True)
        # Ray's launcher keeps the sockets of its connections to a cluster there.
        user, cluster = (hashlib.sha256(name.encode()).hexdigest()[:10] for name in (getpass.getuser(), folder.name))
        shutil.rmtree(Path("/tmp") / f"ray_ssh_{user}" / cluster, ignore_errors=True)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        return int(probe.getsockname()[1])


def marked_processes() -> Iterator[tuple[int, str, str]]:
    """(id, FOLDER@ADDRESS, command) of all processes that came from such a machine."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for item in (entry / "environ").read_bytes().split(b"\0"):
                name, _, value = item.decode(errors="replace").partition("=")
                if name == MARK:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    yield int(entry.name), value, command


def stop_ray(mark: str) -> None:
    """What `ray stop` does on a machine, and nothing to other machines' processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(50):
            found = [
                pid
                for pid, machine, command in marked_processes()
                if machine == mark and pid != os.getpid() and any(part in command for part in _RAY)
            ]
            if not found:
                return
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.2)


def _prepare(machines: Machines) -> None:
    folder = machines.folder
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # the server wants it when it runs as root
    settings = [
        f"Port {machines.port}",
        *(f"ListenAddress {address}" for address in ADDRESSES),
        f"HostKey {folder / 'host_key'}",
        f"AuthorizedKeysFile {folder / 'key.pub'}",
        "PidFile none",
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        f"AllowUsers {getpass.getuser()}",
    ]
    for address in ADDRESSES:
        environment = {
            "HOME": machines.home(address),
            "RAY_TMPDIR": folder,
            MARK: f"{folder}@{address}",
            "STUDYTOOL_MLFLOW_PORT": machines.mlflow_port,
            # What is logged in would be taken for a child of `uv run pytest`, and Ray would ship its folder.
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }
        # Only one SetEnv counts.
        settings += [f"Match LocalAddress {address}", "SetEnv " + " ".join(f"{k}={v}" for k, v in environment.items())]
        _make_home(machines, address)
    (folder / "sshd_config").write_text("\n".join(settings) + "\n")
    # ssh takes the ~ of a key's path from the account, which is the tests' own, where the shell takes it from HOME.
    _script(
        folder / "bin/ssh",
        'arguments=() last=; for item in "$@"; do [ "$last" != -i ] || item="${item/#\\~/$HOME}"',
        'arguments+=("$item"); last="$item"; done',
        f'exec {shutil.which("ssh")} -p {machines.port} "${{arguments[@]}}"',
    )
    (folder / "laptop").mkdir()


def _make_home(machines: Machines, address: str) -> None:
    """A home folder whose `uv` builds on the tests' environment, and whose `ssh` finds the other machine."""
    home, here = machines.home(address), Path(sys.prefix)
    stop = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import ssh_machines as m; "
    stop += f"m.stop_ray({f'{machines.folder}@{address}'!r})"
    _script(
        home / "environment/bin/ray",
        f'[ "$1" = stop ] || exec {here}/bin/ray "$@"',
        f"exec {here}/bin/python -c {shlex.quote(stop)}",
    )
    for program in (here / "bin").iterdir():
        if program.name != "ray":
            (home / "environment/bin" / program.name).symlink_to(program)
    (home / "environment/lib").symlink_to(here / "lib")
    shutil.copy(here / "pyvenv.cfg", home / "environment")
    _script(
        home / "bin/uv",
        f'case "$1 $2" in "venv "*) ln -sfn {home}/environment .venv;;',
        '"pip install") [ -f pyproject.toml ] && echo "$@" >> ~/installed ;;',
        '"pip freeze") grep -h ^Version .venv/lib/*/site-packages/*.dist-info/METADATA;;',
        "*) exit 2;; esac",
    )
    (home / ".bashrc").write_text(f'export PATH="{home}/bin:{machines.folder}/bin:$PATH"\n')


def _script(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/usr/bin/env bash", *lines)) + "\n")
    path.chmod(0o755)


def _sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _log(folder: Path) -> int:
    return os.open(folder / "sshd.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _await_port(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection((ADDRESSES[-1], port), timeout=1):
            return
        if server.poll() is not None:
            raise RuntimeError("the SSH server ended at once")
        time.sleep(0.1)
    raise RuntimeError(f"the SSH server does not listen on port {port}")
