"""The same 24 trials four ways: studytool, studytool without its cache, as Ray's tutorial has it, and Optuna's loop.

    python benchmarks/speed/study.py                       # R3D-18 and R(2+1)D-18; half an hour and more on a slow core
    python benchmarks/speed/study.py --freeze stage3       # only these arms

Two networks x {none, stage3, backbone} x two learning rates x two seeds, from random weights, on 16^3 phantoms without
augmentation, the same number of epochs, one trial at a time on one core. Each arm of networks and freezing is run by
itself by all four, one after the other, so that the ratios of a row come from the same minutes. Seconds are those from
the start of the first trial to the end of the last; starting the program and Ray is left out, starting workers is not
for the other three: studytool's first trial starts when its worker is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from overhead import wall_seconds

HERE = Path(__file__).parent
BACKBONES, FREEZES = ("r3d_18", "r2plus1d_18"), ("none", "stage3", "backbone")
RATES, SEEDS = (1e-3, 3e-4), 2
STUDY = """
name: {name}
data: {{path: data}}
arms: {{backbone: [{backbone}], freeze: [{freeze}], learning_rate: [1.0e-3, 3.0e-4]}}
confirm: {{seeds: {seeds}}}
train: {{max_epochs: {epochs}, batch_size: {batch}, weight_decay: 0.0}}
input: {{augment: []}}
resources: {{trials_at_once: 1, cpu: 1}}
"""
SIMULATION = """
name: data
data:
  path: data
  simulate: {{classes: 4, volumes_per_class: {per_class}, side: 16, voxel_size_angstrom: 18.0, snr: 1.0}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=BACKBONES)
    parser.add_argument("--freeze", nargs="+", default=FREEZES)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--per-class", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="study-") as name:
        bench = Bench(Path(name), arguments.epochs, arguments.batch)
        bench.make_data(arguments.per_class)
        for backbone in arguments.backbone:
            for freeze in arguments.freeze:
                print(json.dumps({"backbone": backbone, "freeze": freeze, **bench.arm(backbone, freeze)}), flush=True)


class Bench:
    """Runs the commands in one folder and times them."""

    def __init__(self, folder: Path, epochs: int, batch: int) -> None:
        self.folder = folder
        self.epochs = epochs
        self.batch = batch

    def make_data(self, per_class: int) -> None:
        """The dataset, and the same volumes as one MRC file each, a folder per split and class."""
        (self.folder / "data.yaml").write_text(SIMULATION.format(per_class=per_class))
        self.studytool("data", "simulate", "data.yaml")
        self.studytool("data", "export", "data", "--out", "mrc")

    def arm(self, backbone: str, freeze: str) -> dict[str, float]:
        """Seconds of the trials of one arm, and how many times those of studytool the others take."""
        seconds = {
            "studytool": self.study(backbone, freeze, "auto"),
            "studytool, cache: off": self.study(backbone, freeze, "off"),
            "Ray's tutorial": self.script("ray", backbone, freeze),
            "Optuna's loop": self.script("optuna", backbone, freeze),
        }
        rounded = {name: round(value, 1) for name, value in seconds.items()}
        ratios = {f"{name} / studytool": round(value / seconds["studytool"], 2) for name, value in seconds.items()}
        return rounded | {name: ratio for name, ratio in ratios.items() if name != "studytool / studytool"}

    def study(self, backbone: str, freeze: str, cache: str) -> float:
        """Seconds of a study's trials, its cache empty at first."""
        name = f"{backbone}-{freeze}-{cache}"
        text = STUDY.format(
            name=name, backbone=backbone, freeze=freeze, seeds=SEEDS, epochs=self.epochs, batch=self.batch
        )
        (self.folder / f"{name}.yaml").write_text(f"{text}cache: {cache}\n")
        self.studytool("run", f"{name}.yaml", "--no-plan")
        return wall_seconds(self.folder, name, len(RATES) * SEEDS)

    def script(self, how: str, backbone: str, freeze: str) -> float:
        """Seconds of the same trials in `tutorial.py`."""
        configs = [
            {
                "root": str(self.folder / "mrc"),
                "backbone": backbone,
                "freeze": freeze,
                "learning_rate": rate,
                "seed": seed,
                "batch_size": self.batch,
                "max_epochs": self.epochs,
            }
            for rate in RATES
            for seed in range(SEEDS)
        ]
        return self.tutorial(how, configs)

    def tutorial(self, how: str, configs: list[dict[str, Any]]) -> float:
        """What the script says its trials took."""
        path = self.folder / "configs.json"
        path.write_text(json.dumps(configs))
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            command = [sys.executable, str(HERE / "tutorial.py"), how, str(path), scratch]
            done = subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True, env=self.env())
        return float(json.loads(done.stdout.splitlines()[-1])["seconds"])

    def studytool(self, *words: str) -> None:
        """Run a command."""
        command = [sys.executable, "-m", "studytool.cli", *words]
        subprocess.run(command, cwd=self.folder, check=True, stdout=subprocess.DEVNULL, env=self.env())

    def env(self) -> dict[str, str]:
        """One core for torch, a cache of one's own, and the same modules as here."""
        own = {"OMP_NUM_THREADS": "1", "STUDYTOOL_CACHE": str(self.folder / "cache")}
        return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(sys.path)}


if __name__ == "__main__":
    main()
