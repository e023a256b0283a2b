"""The long part: `python -m tests.reliability --work FOLDER` puts every promise to the test and writes a page.

What has been done already in FOLDER is not done again, so that the command can be given again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from reliability import damage, disk, kills, writes  # noqa: E402
from studytool.files import write_json, write_text  # noqa: E402

Numbers = dict[str, float]


@dataclass(frozen=True)
class Row:
    """What was found about a promise."""

    promise: str
    kept: bool
    found: str
    seconds: float


def main() -> int:
    """Try every promise; the exit code is 1 if one was not kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for the studies and what was done already")
    parser.add_argument("--kills", type=int, default=100, help="of workers and of drivers, each")
    parser.add_argument("--writes", type=int, default=1000, help="writers killed, for each kind of file")
    parser.add_argument("--flips", type=int, default=1000, help="bits flipped in shards; a tenth as many truncations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only promises with this in their name")
    parser.add_argument("--out", type=Path, help="the page to write; default: WORK/RESULTS.md")
    words = parser.parse_args()
    words.work = words.work.resolve()
    words.work.mkdir(parents=True, exist_ok=True)
    page = words.out or words.work / "RESULTS.md"
    rows = []
    for name, run in _promises(words):
        if words.only not in name:
            continue
        kept_at = words.work / f"{_plain(name)}.json"
        if not kept_at.exists():
            write_json(kept_at, asdict(_tried(name, run)))
        rows.append(Row(**json.loads(kept_at.read_text(encoding="utf-8"))))
        print(
            f"{'kept' if rows[-1].kept else 'NOT KEPT':8}  {rows[-1].seconds:7.0f} s  {name}: {rows[-1].found}",
            flush=True,
        )
        write_text(page, _page(rows, words))
    return 0 if all(row.kept for row in rows) else 1


def _promises(words: argparse.Namespace) -> list[tuple[str, Callable[[], Numbers]]]:
    work, seed = words.work, words.seed
    half = words.kills // 2
    promises: list[tuple[str, Callable[[], Numbers]]] = [
        ("SIGKILL of a worker at a random moment", partial(kills.worker_kills, work, words.kills, seed)),
        ("SIGKILL of the driver, ASHA", partial(kills.driver_kills, work, words.kills - half, seed, "asha")),
        ("SIGKILL of the driver, no scheduler", partial(kills.driver_kills, work, half, seed + 1, "fifo")),
        ("damaged or deleted state file", partial(damage.state_damaged, work / "state", words.kills, seed)),
        (
            "flipped bit or truncation in a shard",
            partial(damage.shards_damaged, work / "shards", words.flips, words.flips // 10, seed),
        ),
    ]
    for kind in writes.KINDS:
        killed = partial(writes.writers_killed, kind, work / f"killed-{kind}", words.writes, seed)
        failing = partial(writes.calls_failing, kind, work / f"failing-{kind}", 100)
        promises += [(f"atomic writes: {kind}, killed", killed), (f"atomic writes: {kind}, failing calls", failing)]
    if disk.can_make_disks():
        promises.append(("disk full (small tmpfs)", partial(disk.disk_full, work)))
    return promises + [(name, partial(_tests_pass, tests)) for name, tests in _BY_TESTS.items()]


_BY_TESTS: dict[str, tuple[str, ...]] = {
    "out of memory in one trial": ("study/test_tuning.py -k memory", "training/test_memory.py"),
    "Ctrl-C, SIGTERM, SIGUSR1": ("study/test_tuning.py -k signal", "study/test_signals.py"),
    "MLflow server gone; eight first starts; one run a trial": ("study/test_tracking.py",),
    "nothing left behind": ("study/test_guardian.py",),
    "sample order": ("data/test_stream.py",),
    "hostile files": ("reliability/test_hostile.py", "models/test_initialize.py", "training/test_checkpoint.py"),
    "tampered weights": ("models/test_weights.py",),
    "100 broken study files": ("reliability/test_broken_studies.py",),
    "ledgers of every format, extending": ("study/test_ledger.py",),
}


def _tests_pass(tests: tuple[str, ...]) -> Numbers:
    passed = 0
    for words in tests:
        file, *rest = words.split()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file), *rest]
        done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
        last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
        if done.returncode:
            raise kills.BrokenPromiseError(f"{words}: {last}")
        passed += int(last.split(" passed")[0].split()[-1])
    return {"tests passed": passed}


def _tried(name: str, run: Callable[[], Numbers]) -> Row:
    begun = time.monotonic()
    try:
        found, kept = ", ".join(f"{what} {value:g}" for what, value in run().items()), True
    except Exception as error:  # every promise is tried, whatever became of the others
        found, kept = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
    return Row(name, kept, found, round(time.monotonic() - begun, 1))


def _page(rows: list[Row], words: argparse.Namespace) -> str:
    lines = [
        "# What the promises of a study that cannot be lost came to",
        "",
        f"Written by `python -m tests.reliability --kills {words.kills} --writes {words.writes} --flips {words.flips} "
        f"--seed {words.seed}` on {time.strftime('%Y-%m-%d')}, {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}.",
        "",
        "| promise | kept | found | minutes |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row.promise} | {'yes' if row.kept else '**no**'} | {row.found} | {row.seconds / 60:.1f} |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


if __name__ == "__main__":
    sys.exit(main())
