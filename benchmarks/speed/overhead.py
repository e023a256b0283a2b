"""What a study costs beside its trials: many trials of one second, their wall time over the sum of the trials.

    python benchmarks/speed/overhead.py            # 50 trials, two at once

A trial waits a tenth of a second in each of ten batches. The wall time is that from the first trial's start to the last
one's end, as MLflow has them; starting Python, Ray and MLflow is told beside it.
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

from studytool.study.ledger import read_records

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
    parser.add_argument("--slots", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        print(json.dumps(measure(Path(name), arguments.trials, arguments.slots), indent=1))


def measure(folder: Path, trials: int, slots: int) -> dict[str, float]:
    """Run the study in `folder`; seconds, and ratios to what its trials took."""
    (folder / "overhead.yaml").write_text(STUDY.format(trials=trials, slots=slots))
    before = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "studytool.cli", "run", "overhead.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    command_seconds = time.perf_counter() - before
    costs = [record.cost for record in read_records(folder / "studies" / "overhead")]
    assert len(costs) == trials
    busy = sum(cost.seconds for cost in costs)
    wall = wall_seconds(folder, "overhead", trials)
    return {
        "trials": trials,
        "slots": slots,
        "seconds of trials": round(busy, 2),
        "wall seconds of the trials": round(wall, 2),
        "wall over trials": round(wall * slots / busy, 3),
        "idle share of the slots": round(1 - busy / (wall * slots), 3),
        "wall seconds of the command": round(command_seconds, 2),
    }


def wall_seconds(folder: Path, study: str, trials: int) -> float:
    """From the start of a study's first trial to the end of its last one, as MLflow has them."""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == study]
    names = ("search-", "confirm-")
    runs = [
        run
        for run in client.search_runs([experiment.experiment_id], max_results=5 * trials)
        if any(name in run.data.tags.get("mlflow.runName", "") for name in names)
    ]
    assert len(runs) == trials, f"{len(runs)} runs of {trials}"
    return float(max(run.info.end_time for run in runs) - min(run.info.start_time for run in runs)) / 1000


if __name__ == "__main__":
    main()
