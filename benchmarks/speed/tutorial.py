"""The comparison's other side: the same trials as Ray's tutorial writes them, and as a loop of Optuna's in one process.

A function trainable, a torch Dataset over one MRC file per particle, a DataLoader, torchvision's network with a new
head, Adam, MLflow by Ray's callback. Nothing is cached; every trial reads its files anew. Called by `study.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import starfile
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
FROZEN = {"none": 0, "stage3": 4, "backbone": 5}


class Particles(Dataset[tuple[torch.Tensor, int]]):
    """The MRC files of one split of what `studytool data export` wrote, each normalized, the grey channel repeated."""

    def __init__(self, root: Path, split: str) -> None:
        table = starfile.read(root / "particles.star")
        self.classes = sorted(set(table["studytoolLabel"]))
        chosen = table[table["studytoolSplit"] == split]
        self.files = [
            (root / name, self.classes.index(label))
            for name, label in zip(chosen["rlnImageName"], chosen["studytoolLabel"], strict=True)
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[index]
        volume = torch.from_numpy(mrcfile.read(path).astype(np.float32))
        volume = (volume - volume.mean()) / volume.std()
        return volume.expand(3, -1, -1, -1), label


def train(config: dict[str, Any]) -> list[float]:
    """One trial; validation accuracy after every epoch."""
    torch.manual_seed(config["seed"])
    root = Path(config["root"])
    batches = DataLoader(Particles(root, "train"), batch_size=config["batch_size"], shuffle=True)
    validation = DataLoader(Particles(root, "val"), batch_size=config["batch_size"])
    model = getattr(torchvision.models.video, config["backbone"])(weights=None)
    model.fc = nn.Linear(model.fc.in_features, len(batches.dataset.classes))  # type: ignore[attr-defined]
    for stage in STAGES[: FROZEN[config["freeze"]]]:
        getattr(model, stage).requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config["learning_rate"])
    accuracies = []
    for _epoch in range(config["max_epochs"]):
        model.train()
        for volumes, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(volumes), labels).backward()
            optimizer.step()
        model.eval()
        right = 0
        with torch.no_grad():
            for volumes, labels in validation:
                right += int((model(volumes).argmax(1) == labels).sum())
        accuracies.append(right / len(validation.dataset))  # type: ignore[arg-type]
        if config.get("report"):
            from ray import tune

            tune.report({"accuracy": accuracies[-1]})
    return accuracies


def with_ray(configs: list[dict[str, Any]], folder: Path) -> float:
    """As in Ray's tutorial: `tune.Tuner` with a function and the MLflow callback. Seconds after Ray's start."""
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=1)
    space = {"chosen": tune.grid_search([{**config, "report": True} for config in configs])}

    def trainable(config: dict[str, Any]) -> None:
        import torch
        import tutorial  # what is defined in a script itself would have to be pickled

        torch.set_num_threads(1)
        tutorial.train(config["chosen"])

    callback = MLflowLoggerCallback(tracking_uri=f"sqlite:///{folder / 'tutorial.db'}", experiment_name="tutorial")
    before = time.perf_counter()
    results = tune.Tuner(
        trainable, param_space=space, run_config=tune.RunConfig(storage_path=str(folder / "ray"), callbacks=[callback])
    ).fit()
    seconds = time.perf_counter() - before
    assert not results.errors
    ray.shutdown()
    return seconds


def with_optuna(configs: list[dict[str, Any]], folder: Path) -> float:
    """A loop in one process; its seconds."""
    import optuna

    torch.set_num_threads(1)
    study = optuna.create_study(storage=f"sqlite:///{folder / 'optuna.db'}", direction="maximize")
    for index in range(len(configs)):
        study.enqueue_trial({"index": index})
    before = time.perf_counter()
    study.optimize(
        lambda trial: train(configs[trial.suggest_int("index", 0, len(configs) - 1)])[-1], n_trials=len(configs)
    )
    return time.perf_counter() - before


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=["ray", "optuna"])
    parser.add_argument("configs", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    configs = json.loads(arguments.configs.read_text())
    seconds = {"ray": with_ray, "optuna": with_optuna}[arguments.how](configs, arguments.folder)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
