"""How a study grows: with the nodes it runs on, and with its trials.

    python benchmarks/speed/scale.py                       # both parts
    python benchmarks/speed/scale.py nodes                 # 48 waiting trials on 1, 2 and 4 Ray nodes of this machine
    python benchmarks/speed/scale.py driver                # the driver alone, 10,000 trials in one arm and in 100
    python benchmarks/speed/scale.py driver --trials 2000 --arms 20 --samplers random

On the nodes a trial only waits, so that the cores they share do not matter once their workers have started; goal: 95%
of linear. The driver is counted in CPU seconds per trial; goal: the last thousand trials cost what the first did.
Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import asdict
from pathlib import Path

import mlflow
from speed_nets import PASSES

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "tests/cluster"))
STUDY = """
name: scale
data:
  path: {folder}/data
  simulate: {{classes: 3, volumes_per_class: 14, side: 8, voxel_size_angstrom: 36.0, snr: 2.0, tomograms: [8, 4, 2]}}
arms: {{backbone: ["speed_nets:waiting"]}}
search:
  learning_rate: {{log_uniform: [1e-3, 1e-1]}}
  trials_per_arm: {trials}
  scheduler: none
  sampler: random
confirm: {{seeds: 0}}
train: {{max_epochs: 10, batch_size: 8}}
input: {{augment: []}}
resources: {{cpu: 1, gpu: 0}}
output: {folder}/studies
tracking: {{uri: "sqlite:///{folder}/mlflow.db"}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["nodes", "driver", "both"], default="both")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--waiting-trials", type=int, default=48, help="a multiple of the numbers of nodes")
    parser.add_argument("--trials", type=int, default=10_000, help="of the driver's study")
    parser.add_argument("--arms", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe"])
    parser.add_argument("--without-mlflow", action="store_true", help="which is most of the CPU time")
    parser.add_argument("--every", type=int, default=1000, help="trials between two looks at the driver")
    arguments = parser.parse_args()
    if arguments.part != "driver":
        show_nodes(arguments.nodes, arguments.waiting_trials)
    if arguments.part != "nodes":
        for arms in arguments.arms:
            for sampler in arguments.samplers:
                show_driver(arguments.trials, arms, sampler, arguments.every, with_mlflow=not arguments.without_mlflow)


def show_nodes(counts: list[int], trials: int) -> None:
    """A row per number of nodes: the whole, and what follows once every node has had its first trial."""
    print(f"{trials} waiting trials\n")
    print("| nodes | wall s | speedup | of linear | trials/s once all run | of linear |\n|---|---|---|---|---|---|")
    first: tuple[float, float] | None = None
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="scale-") as name, working_in(Path(name)):
            wall, rate = run_on_nodes(Path(name), count, trials)
        first = first or (wall * counts[0], rate / counts[0])
        speedup = first[0] / wall
        row = (count, f"{wall:.1f}", f"{speedup:.2f}", f"{speedup / count:.1%}", f"{rate:.3f}")
        print("| " + " | ".join(map(str, (*row, f"{rate / count / first[1]:.1%}"))) + " |", flush=True)
    print()


def run_on_nodes(folder: Path, count: int, trials: int) -> tuple[float, float]:
    """Seconds from the start of the first trial to the end of the last; trials a second after each node's first one."""
    from ray_nodes import ray_nodes

    (folder / "scale.yaml").write_text(STUDY.format(folder=folder, trials=trials))
    with ray_nodes(count + 1) as nodes:  # the head runs no trials
        command = [sys.executable, "-m", "studytool.cli", "run", "scale.yaml", "--no-plan", "--address", nodes.address]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    [experiment] = [e for e in client.search_experiments() if e.name == "scale"]
    runs = client.search_runs([experiment.experiment_id], "tags.`studytool.kind` = 'trial'", max_results=trials)
    assert len(runs) == trials, f"{len(runs)} runs of {trials}"
    ends = sorted(run.info.end_time / 1000 for run in runs)
    wall = ends[-1] - min(run.info.start_time for run in runs) / 1000
    return wall, (trials - count) / (ends[-1] - ends[count - 1])


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Nodes inherit the folder and the environment of who starts them."""
    os.environ[PASSES] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *sys.path])
    os.environ["OMP_NUM_THREADS"] = "1"
    with chdir(folder):
        yield


def show_driver(trials: int, arms: int, sampler: str, every: int, *, with_mlflow: bool) -> None:
    """Run the driver in a process of its own, for its memory, and show how its cost grows."""
    words = map(str, (trials, arms, sampler, every, int(with_mlflow)))
    done = subprocess.run([sys.executable, __file__, "one-driver", *words], check=True, stdout=subprocess.PIPE)
    growth = json.loads(done.stdout)
    print(f"{trials} search trials in {arms} arms, sampler {sampler}\n")
    print("| trials | driver, CPU ms each | Optuna | MLflow | all | RSS MiB |\n|---|---|---|---|---|---|")
    costs = []
    for before, now in zip(growth["shares"], growth["shares"][1:], strict=False):
        count = now["trials"] - before["trials"]
        cost = [1000 * (now[whose] - before[whose]) / count for whose in ("driver", "optuna", "mlflow")]
        costs.append([*cost, sum(cost)])
        print(f"| {now['trials']} | " + " | ".join(f"{c:.2f}" for c in costs[-1]) + f" | {now['rss_mib']:.0f} |")
    ratios = [last / first if first else 1.0 for last, first in zip(costs[-1], costs[0], strict=True)]
    print("| last over first | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " | |\n")
    names = [name for name in growth["resumes"][0] if name != "trials"]
    print(f"| taken up with so many trials | {' | '.join(f'{name}, CPU s' for name in names)} |")
    print("|---" * (len(names) + 1) + "|")
    for took in growth["resumes"]:
        print(f"| {took['trials']} | " + " | ".join(f"{took[name]:.2f}" for name in names) + " |")
    print("\nat the end: " + ", ".join(f"{name} {seconds:.2f} CPU s" for name, seconds in growth["end"].items()) + "\n")
    sys.stdout.flush()


def one_driver(trials: str, arms: str, sampler: str, every: str, with_mlflow: str) -> None:
    from driver_cost import measure_driver

    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        numbers = (Path(name), int(trials), int(arms), sampler, int(every))
        print(json.dumps(asdict(measure_driver(*numbers, with_mlflow=bool(int(with_mlflow))))))


if __name__ == "__main__":
    if sys.argv[1:2] == ["one-driver"]:
        one_driver(*sys.argv[2:])
    else:
        main()
