"""The comparison's other side: the same trials as Ray's tutorial writes them, and as a loop of Optuna's in one process.

A function trainable, a torch Dataset over one MRC file per particle, a DataLoader, torchvision's network with a new
head, Adam, MLflow by Ray's callback. Nothing is cached; every trial reads its files anew. The network is the one that
studytool trains: its stem takes the one grey channel, which is less work than repeating it three times, and frozen
batch normalization keeps its means. Called by `study.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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
    """The MRC files of one split of what `studytool data export` wrote, each normalized."""

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
        return ((volume - volume.mean()) / volume.std())[None], label


def train(config: dict[str, Any]) -> float:
    """One trial; the best validation accuracy of its epochs."""
    began = time.time()
    torch.manual_seed(config["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    root = Path(config["root"])
    options = {"batch_size": config["batch_size"], "num_workers": config["loaders"]}
    batches = DataLoader(Particles(root, "train"), shuffle=True, **options)
    validation = DataLoader(Particles(root, "val"), **options)
    model = getattr(torchvision.models.video, config["backbone"])(weights=None)
    model.load_state_dict(torch.load(config["weights"], weights_only=True))
    coloured = model.stem[0]
    shape = (coloured.out_channels, coloured.kernel_size, coloured.stride, coloured.padding)
    model.stem[0] = nn.Conv3d(1, *shape, bias=False)
    model.stem[0].weight.data = coloured.weight.data.sum(1, keepdim=True)
    model.fc = nn.Linear(model.fc.in_features, len(batches.dataset.classes))  # type: ignore[attr-defined]
    model.to(device)
    frozen = [getattr(model, stage) for stage in STAGES[: FROZEN[config["freeze"]]]]
    for part in frozen:
        part.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config["learning_rate"])
    best = 0.0
    for _epoch in range(config["max_epochs"]):
        model.train()
        for part in frozen:
            part.eval()
        for volumes, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(volumes.to(device)), labels.to(device)).backward()
            optimizer.step()
        model.eval()
        right = 0
        with torch.no_grad():
            for volumes, labels in validation:
                right += int((model(volumes.to(device)).argmax(1).cpu() == labels).sum())
        best = max(best, right / len(validation.dataset))  # type: ignore[arg-type]
        if config.get("report"):
            from ray import tune

            tune.report({"accuracy": best, "began": began, "ended": time.time()})
    return best


def with_ray(configs: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """As in Ray's tutorial: `tune.Tuner` with a function and the MLflow callback.

    Seconds from the first trial's beginning, in a worker that is up, to the last report; each later trial has a worker
    started for it, which is in them.
    """
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    threads = int(os.environ["OMP_NUM_THREADS"])
    has_gpu = torch.cuda.is_available()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=threads, num_gpus=int(has_gpu))
    space = {"chosen": tune.grid_search([{**config, "report": True} for config in configs])}

    def trainable(config: dict[str, Any]) -> None:
        import torch
        import tutorial  # what is defined in a script itself would have to be pickled

        torch.set_num_threads(threads)
        tutorial.train(config["chosen"])

    callback = MLflowLoggerCallback(tracking_uri=f"sqlite:///{folder / 'tutorial.db'}", experiment_name="tutorial")
    results = tune.Tuner(
        tune.with_resources(trainable, {"cpu": threads, "gpu": int(has_gpu)}),
        param_space=space,
        run_config=tune.RunConfig(storage_path=str(folder / "ray"), callbacks=[callback]),
    ).fit()
    assert not results.errors, results.errors
    ends = [result.metrics for result in results]
    ray.shutdown()
    seconds = max(end["ended"] for end in ends) - min(end["began"] for end in ends)
    return {"seconds": seconds, "accuracy": statistics.mean(end["accuracy"] for end in ends)}


def with_optuna(configs: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """A loop in one process, from the first trial's beginning to the last one's end."""
    import optuna

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    study = optuna.create_study(storage=f"sqlite:///{folder / 'optuna.db'}", direction="maximize")
    for index in range(len(configs)):
        study.enqueue_trial({"index": index})
    before = time.time()
    study.optimize(lambda trial: train(configs[trial.suggest_int("index", 0, len(configs) - 1)]), n_trials=len(configs))
    seconds = time.time() - before
    return {"seconds": seconds, "accuracy": statistics.mean(trial.value or 0.0 for trial in study.trials)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=["ray", "optuna"])
    parser.add_argument("configs", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    configs = json.loads(arguments.configs.read_text())
    found = {"ray": with_ray, "optuna": with_optuna}[arguments.how](configs, arguments.folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
