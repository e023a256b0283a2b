"""Measure studytool's stream against the machine's limit and against the peers. See README.md.

    python benchmarks/streaming/run.py --out FOLDER --python main=ENVS/main/bin/python --python mds=ENVS/mds/bin/python
    python benchmarks/streaming/run.py --out FOLDER --report     # only the tables of what has been measured so far

Run it with the Python that has studytool. Results are kept in OUT/results.jsonl; a further call adds to them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from candidates import CANDIDATES, FORMATS
from common import BATCH, Data, drop_from_cache
from report import read_results, tables

HERE = Path(__file__).resolve().parent
S3_FORMAT = "studytool-float16"
STEPS = ("warm", "cold", "s3")
TIMEOUT_SECONDS = 1200
_ONLY = f"one or several of {', '.join(STEPS)} or of the candidates: {'; '.join(CANDIDATES)}"


def main() -> None:
    arguments = _arguments()
    data = Data(arguments.out.resolve(), arguments.volumes)
    if not arguments.report:
        pythons = {"studytool": sys.executable, **dict(pair.split("=", 1) for pair in arguments.python)}
        data.make()
        for number in range(arguments.rounds):
            names = list(FORMATS)
            start = 3 * number % len(names)  # another order in each round
            for name in names[start:] + names[:start]:
                measure_format(Runs(data, arguments), name, pythons)
    print("\n".join(tables(read_results(data.root / "results.jsonl"))))


def measure_format(runs: Runs, name: str, pythons: dict[str, str]) -> None:
    """Write a format, measure all that reads it, and delete it."""
    steps = [step for step in _steps(name) if not runs.only or {step[0], step[1]} & runs.only]
    python = pythons.get(FORMATS[name].environment)
    if not steps:
        return
    if python is None:
        print(f"{name}: left out, as there is no --python {FORMATS[name].environment}=...", file=sys.stderr)
        return
    folder = runs.data.folder(name)
    shutil.rmtree(folder, ignore_errors=True)
    if not name.startswith("studytool"):  # write_dataset wants to make it
        folder.mkdir()
    if runs.call(python, "write", name):
        for step, subject in steps:
            for _ in range(runs.passes if step == "cold" else 1):
                if step == "cold":
                    drop_from_cache(folder)  # else the files, just written, are there
                runs.call(python, step, subject)
    shutil.rmtree(folder)


def _steps(name: str) -> Iterator[tuple[str, str]]:
    """What is done with a format: (step, candidate or format)."""
    readers = [key for key, candidate in CANDIDATES.items() if candidate.format == name]
    yield from (("warm", reader) for reader in readers)
    yield from (("cold", reader) for reader in readers if CANDIDATES[reader].cold)
    if name == S3_FORMAT:
        yield "s3", name


class Runs:
    """Calls of one.py, and the file that keeps what they found."""

    def __init__(self, data: Data, arguments: argparse.Namespace) -> None:
        self.data = data
        self.passes = arguments.passes
        self.only = set(arguments.only)
        self._seconds = arguments.seconds
        self._environment = {
            **os.environ,
            "HF_HOME": str(data.root / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "DO_NOT_TRACK": "1",
        }

    def call(self, python: str, step: str, subject: str) -> bool:
        """One step; whether it went well."""
        numbers = [str(self.data.count), str(self.passes), str(self._seconds)]
        command = [python, "-W", "ignore", str(HERE / "one.py"), step, subject, str(self.data.root), *numbers]
        result: dict[str, Any] = {"step": step, "subject": subject, "volumes": self.data.count}
        environment, root = self._environment, self.data.root
        try:
            done = subprocess.run(
                command, env=environment, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
            )
            found = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            result |= json.loads(found[0]) if found else {"error": done.stderr.strip()[-2000:]}
        except subprocess.TimeoutExpired:
            result |= {"error": f"not done after {TIMEOUT_SECONDS} s"}
        with (self.data.root / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{step} {subject}: {result.get('error', 'done')}", file=sys.stderr, flush=True)
        return "error" not in result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="scratch folder and results; 3 GB")
    parser.add_argument("--python", action="append", default=[], help="ENVIRONMENT=PATH for main and mds")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[], choices=[*CANDIDATES, *STEPS], metavar="NAME", help=_ONLY)
    parser.add_argument("--volumes", type=int, default=8000)
    parser.add_argument("--passes", type=int, default=3, help="timed passes of each candidate in a round")
    parser.add_argument("--seconds", type=float, default=0.6, help="shortest pass; passes are whole epochs")
    parser.add_argument("--report", action="store_true", help="only print the tables of what there is")
    arguments = parser.parse_args()
    if arguments.volumes < BATCH:
        parser.error(f"--volumes has to be at least {BATCH}")
    return arguments


if __name__ == "__main__":
    main()
