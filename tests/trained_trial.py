"""A small network that a test has trained on bright balls and rods: for what is done with a finished trial."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from studytool.data.particles import Particle
from studytool.data.shards import write_dataset
from studytool.settings import InputSettings, MetricSettings, ModelSettings, TrainSettings
from studytool.spec import TrialSpec
from studytool.training.loop import train_trial

SIDE = 16
CLASSES = ("ball", "long rod")
COUNTS = {"train": 16, "val": 8, "test": 10}


def particles(seed: int = 0) -> Iterator[Particle]:
    """Balls and rods about the middle, mean 0 and deviation 1 as an import leaves them; a tomogram a split."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.arange(SIDE) - SIDE // 2] * 3, indexing="ij")
    shapes = {"ball": np.exp(-(x**2 + y**2 + z**2) / 12), "long rod": np.exp(-(x**2 + y**2) / 4 - z**2 / 60)}
    for split, count in COUNTS.items():
        for number in range(count):
            for label in CLASSES:
                volume = shapes[label] + 0.7 * rng.standard_normal(shapes[label].shape)
                volume = (volume - volume.mean()) / volume.std()
                yield Particle(
                    particle_id=f"{split}-{label.replace(' ', '-')}-{number}",
                    label=label,
                    tomogram=f"tomogram-{split}",
                    split=split,
                    volume_DHW=volume.astype(np.float32),
                    voxel_size_angstrom=10.0,
                )


def train_small_trial(
    folder: Path,
    *,
    phase: str = "confirm",
    inverted: bool = False,
    data_split: str = "stored",
    precision: str = "auto",
    **input_: Any,
) -> Path:
    """Write `folder`/data, train five epochs on it, and give the folder of the trial."""
    data = folder / "data"
    if not data.exists():
        settings = {"invert": inverted, "normalize": "standard"}
        provenance = {"kind": "import", "source": {"kind": "for a test"}, "settings": settings}
        write_dataset(particles(), data, dtype="float16", provenance=provenance, volumes_per_shard=64)
    trial = TrialSpec(
        study="s",
        arm="a",
        phase=phase,
        number=0,
        seed=1,
        data_path=str(data),
        data_split=data_split,
        model=ModelSettings(backbone="tiny_backbone:tiny"),
        input=InputSettings(**input_),
        train=TrainSettings(max_epochs=5, batch_size=8, learning_rate=0.02, precision=precision),
        metric=MetricSettings(),
    )
    target = folder / "studies" / "trials" / trial.trial_id
    list(train_trial(trial, target, device="cpu"))
    return target
