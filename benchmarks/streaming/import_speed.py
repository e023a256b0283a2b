"""How fast `studytool data import` is, against reading the same MRC files and doing nothing with them.

    python benchmarks/streaming/import_speed.py                          # 8,000 volumes of 32^3, 3 passes
    python benchmarks/streaming/import_speed.py --volumes 20000 --workers 2

Every pass reads all files with `mrcfile.read`, then with our own checked reader, and then imports them (normalized,
float16, checksums, fsync; planning and the start of processes are counted in), with a warm page cache. The ratio of a
pass is the speed of the import / the speed of reading; the median over the passes is printed, with the spread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np

from studytool.data.importing import import_dataset, recognize
from studytool.data.readers.mrc import read_mrc
from studytool.data.readers.source import ReadOptions
from studytool.settings import ImportSettings

GOAL = 0.5


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source = Path(name) / "source"
        paths = make_files(source, arguments.volumes, arguments.side)
        for path in paths:
            path.read_bytes()  # into the page cache
        passes = [one_pass(source, paths, Path(name) / f"out{number}", arguments) for number in range(arguments.passes)]
    for seconds in passes:
        rates = {what: arguments.volumes / value for what, value in seconds.items()}
        print("  ".join(f"{what}: {rate:,.0f}/s" for what, rate in rates.items()))
    report = {
        "volumes": arguments.volumes,
        "side": arguments.side,
        "workers": arguments.workers,
        "against_mrcfile": summary([seconds["mrcfile"] / seconds["import"] for seconds in passes]),
        "against_read_mrc": summary([seconds["read_mrc"] / seconds["import"] for seconds in passes]),
        "goal": GOAL,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
    }
    if arguments.workers == 1:  # the CPU time of worker processes is not this one's to know
        of_cpu = [seconds["mrcfile CPU"] / seconds["import CPU"] for seconds in passes]
        report["cpu_seconds_against_mrcfile"] = summary(of_cpu)
    print(json.dumps(report, indent=1))


def one_pass(source: Path, paths: list[Path], out: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of each way, in turn."""

    def read_plainly() -> None:
        for path in paths:
            mrcfile.read(path)

    def read_checked() -> None:
        for path in paths:
            read_mrc(path)

    def import_all() -> None:
        import_dataset(recognize(source, ReadOptions()), out, ImportSettings(), workers=arguments.workers)

    ways: dict[str, Callable[[], None]] = {"mrcfile": read_plainly, "read_mrc": read_checked, "import": import_all}
    seconds = {}
    for what, way in ways.items():
        seconds[what], seconds[f"{what} CPU"] = timed(way)
    return seconds


def timed(way: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock, and of this process's CPU time, which other work on the machine changes less."""
    begun, cpu = time.perf_counter(), time.process_time()
    way()
    return time.perf_counter() - begun, time.process_time() - cpu


def summary(ratios: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(ratios), 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3)}


def make_files(folder: Path, count: int, side: int) -> list[Path]:
    """Volumes of noise in four classes."""
    paths = []
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % 4}" / f"p{number:06d}.mrc"
        path.parent.mkdir(parents=True, exist_ok=True)
        with mrcfile.new(path) as mrc:
            mrc.set_data(rng.standard_normal((side, side, side), dtype=np.float32))
            mrc.voxel_size = 10.0
        paths.append(path)
    return paths


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=8000)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--workers", type=int, default=None, help="of the import [default: as the command decides]")
    parser.add_argument("--folder", type=Path, default=None, help="where the files are made [default: the system's]")
    return parser.parse_args()


if __name__ == "__main__":
    main()
