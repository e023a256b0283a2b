"""What a study costs beside its trials: many trials of one second, their wall time over the sum of the trials.

    python benchmarks/speed/overhead.py                        # 50 trials, two at once
    python benchmarks/speed/overhead.py --slots 1 --slots 2

A trial waits a tenth of a second in each of ten batches. The wall time is that from the first trial's start to the last
one's end, as MLflow has them. A trial starts when a worker is ready for it: starting Python, Ray, its workers and
MLflow is told beside it, as the seconds before the first trial. A gap is from the end of a trial's last batch to the
beginning of the next one's first in the same worker: writing the trial's last epoch down is in it, and all that makes
the next.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlflow
import numpy as np
from speed_nets import PASSES

from studytool.study.records import read_records

TRAINING_PASSES = 6
"""Of a trial: three batches in each of two epochs."""
STUDY = """
name: overhead
data:
  path: data
  simulate: {{classes: 3, volumes_per_class: 14, side: 8, voxel_size_angstrom: 36.0, snr: 2.0, tomograms: [8, 4, 2]}}
arms: {{backbone: ["speed_nets:waiting"]}}
search:
  learning_rate: {{log_uniform: [1e-3, 1e-1]}}
  trials_per_arm: {trials}
  scheduler: none
  sampler: random
confirm: {{seeds: 0}}
train: {{max_epochs: 2, batch_size: 8}}
input: {{augment: []}}
resources: {{trials_at_once: {slots}, cpu: 1}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--slots", type=int, action="append", help="how many at once; may be given several times")
    arguments = parser.parse_args()
    for slots in arguments.slots or [2]:
        with tempfile.TemporaryDirectory(prefix="overhead-") as name:
            print(json.dumps(measure(Path(name), arguments.trials, slots), indent=1), flush=True)


def measure(folder: Path, trials: int, slots: int) -> dict[str, float]:
    """Run the study in `folder`; seconds, and ratios to what its trials took."""
    (folder / "overhead.yaml").write_text(STUDY.format(trials=trials, slots=slots))
    passes = folder / "passes"
    passes.mkdir()
    before = time.time()
    subprocess.run(
        [sys.executable, "-m", "studytool.cli", "run", "--no-plan", "overhead.yaml"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
            PASSES: str(passes),
        },
        check=True,
        stdout=subprocess.DEVNULL,
    )
    command_seconds = time.time() - before
    costs = [record.cost for record in read_records(folder / "studies" / "overhead")]
    assert len(costs) == trials
    busy = sum(cost.seconds for cost in costs)
    begun, ended = start_and_end(folder, "overhead", trials)
    wall = ended - begun
    gaps = [gap for path in passes.glob("*.txt") for gap in gaps_seconds(path)]
    assert len(gaps) == trials - slots, f"{len(gaps)} gaps: a worker was started anew"
    return {
        "trials": trials,
        "slots": slots,
        "seconds of trials": round(busy, 2),
        "wall seconds of the trials": round(wall, 2),
        "wall over trials": round(wall * slots / busy, 3),
        "idle share of the slots": round(1 - busy / (wall * slots), 3),
        "gap between trials, median seconds": round(float(np.median(gaps)), 3),
        "gap between trials, 90th percentile": round(float(np.percentile(gaps, 90)), 3),
        "seconds before the first trial": round(begun - before, 2),
        "wall seconds of the command": round(command_seconds, 2),
    }


def gaps_seconds(path: Path) -> list[float]:
    """From the last pass of each trial of a process, which is of the validation split, to the next one's first."""
    passes = [tuple(map(float, line.split())) for line in path.read_text().splitlines()]
    training = [number for number, (_, _, trains) in enumerate(passes) if trains]
    return [passes[first][0] - passes[first - 1][1] for first in training[TRAINING_PASSES::TRAINING_PASSES]]


def wall_seconds(folder: Path, study: str, trials: int) -> float:
    """From the start of a study's first trial to the end of its last one, as MLflow has them."""
    begun, ended = start_and_end(folder, study, trials)
    return ended - begun


def start_and_end(folder: Path, study: str, trials: int) -> tuple[float, float]:
    """When a study's first trial started and its last one ended, as MLflow has them, in seconds since 1970."""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == study]
    names = ("search-", "confirm-")
    runs = [
        run
        for run in client.search_runs([experiment.experiment_id], max_results=5 * trials)
        if any(name in run.data.tags.get("mlflow.runName", "") for name in names)
    ]
    assert len(runs) == trials, f"{len(runs)} runs of {trials}"
    return min(run.info.start_time for run in runs) / 1000, max(run.info.end_time for run in runs) / 1000


if __name__ == "__main__":
    main()
