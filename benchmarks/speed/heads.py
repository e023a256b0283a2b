"""K heads on one frozen network, together in one pass and one by one, in one run: CPU seconds and their ratio.

    python benchmarks/speed/heads.py                        # r2plus1d_tiny, 8 heads, one core
    python benchmarks/speed/heads.py --backbone r3d_18 --heads 16

The cache of the frozen part is filled before, so that both only train, evaluate and write their files. Each repetition
does both, one after the other; the ratio is the median of theirs. CPU seconds are those of the process, with what torch
computes and what is written; `train` is the ratio of the seconds that the trials spent in their steps alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from studytool.data.particles import Particle
from studytool.data.shards import write_dataset
from studytool.settings import InputSettings, MetricSettings, ModelSettings, TrainSettings
from studytool.spec import TrialSpec
from studytool.training.loop import train_trial
from studytool.training.together import train_together

SIDE, CLASSES = 16, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["r2plus1d_tiny"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--per-class", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="heads-") as name:
        folder = Path(name)
        os.environ["STUDYTOOL_CACHE"] = str(folder / "cache")
        write_dataset(
            particles(arguments.per_class), folder / "data", dtype="float16", provenance={}, volumes_per_shard=4096
        )
        for backbone in arguments.backbone:
            trials = [head(folder / "data", backbone, arguments.epochs, i) for i in range(arguments.heads)]
            for _ in train_trial(trials[0], folder / backbone / "fill"):
                pass
            rows = [measured(trials, folder / backbone / str(i)) for i in range(arguments.repeats)]
            medians = {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}
            print(json.dumps({"backbone": backbone, "heads": arguments.heads, **medians}), flush=True)


def particles(per_class: int) -> Iterator[Particle]:
    """Noise, brighter in one octant for every class; a quarter of it to choose by."""
    rng = np.random.default_rng(0)
    for split, count in (("train", per_class), ("val", per_class // 3)):
        for label in range(CLASSES):
            for i in range(count):
                volume = rng.standard_normal((SIDE, SIDE, SIDE)).astype(np.float32)
                volume[: SIDE // 2, (label % 2) * SIDE // 2 :, (label // 2) * SIDE // 2 :] += 0.3
                yield Particle(f"{split}-{label}-{i}", str(label), f"tomogram-{split}", split, volume, 10.0, None)


def head(data: Path, backbone: str, epochs: int, number: int) -> TrialSpec:
    return TrialSpec(
        study="heads",
        arm=backbone,
        phase="search",
        number=number,
        seed=0,
        data_path=str(data),
        cache="auto",
        model=ModelSettings(backbone=backbone, freeze="backbone"),
        input=InputSettings(augment=()),
        train=TrainSettings(max_epochs=epochs, batch_size=16, learning_rate=1e-3 * 1.5**number),
        metric=MetricSettings(),
    )


def measured(trials: Sequence[TrialSpec], folder: Path) -> dict[str, float]:
    begun = time.process_time()
    alone = [list(train_trial(trial, folder / "alone" / trial.trial_id))[-1].cost for trial in trials]
    between = time.process_time()
    *_, last = train_together(trials, [folder / "together" / trial.trial_id for trial in trials])
    end = time.process_time()
    beside = [result.cost for result in last.values() if not isinstance(result, Exception)]
    return {
        "cpu_seconds_one_by_one": between - begun,
        "cpu_seconds_together": end - between,
        "ratio": (between - begun) / (end - between),
        "ratio_train": sum(cost.train_seconds for cost in alone) / sum(cost.train_seconds for cost in beside),
        "checkpoint_share_together": sum(c.checkpoint_seconds for c in beside) / sum(c.seconds for c in beside),
    }


if __name__ == "__main__":
    main()
