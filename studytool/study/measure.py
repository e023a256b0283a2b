"""What training costs on this machine: a few steps of it on noise, in a process of its own, kept for the next time.

The child runs the training loop itself, from random weights, so that what it measures is what a trial will do: read,
augment, train, evaluate, write checkpoints. Its second epoch counts; if the time is up before that ends, its first.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from studytool.data.cachefolder import cache_folder
from studytool.files import write_json
from studytool.results import Cost
from studytool.spec import TrialSpec
from studytool.study.slots import gpu_names

STEPS, STEPS_COMPILED = 2, 4
"""Steps of an epoch that are measured; of a compiled network the first one runs uncompiled."""
_FORMAT = 2


@dataclass(frozen=True)
class Measurement:
    """Seconds of the parts of an epoch, the peak memory of the trial, and the bytes of its checkpoints.

    `settled` is False where only the first epoch was seen, whose steps are slower. `first_epoch_seconds` is what its
    training took, with reading the data, building the network and compiling it.
    """

    seconds_per_step: float
    seconds_per_evaluated_volume: float
    checkpoint_seconds: float
    peak_memory_gib: float
    weights_bytes: int
    state_bytes: int
    settled: bool
    first_epoch_seconds: float


@dataclass(frozen=True)
class Workload:
    """What the time and memory of a training step depend on: equal for trials that differ in other things."""

    trial: TrialSpec
    volume_shape_dhw: tuple[int, int, int]
    voxel_size_angstrom: float
    dtype: str
    num_classes: int
    cpu: int

    def as_json(self) -> str:
        """A text that is the same for equal workloads."""
        return json.dumps({**asdict(self), "trial": self.trial.model_dump(mode="json")}, sort_keys=True)


def workload(
    trial: TrialSpec,
    volume_shape_dhw: tuple[int, int, int],
    voxel_size_angstrom: float,
    dtype: str,
    num_classes: int,
    *,
    batch_size: int,
    cpu: int,
) -> Workload:
    """The workload of a trial on such volumes, with `batch_size` of them in a step and `cpu` cores.

    Gradual freezing is taken as it is in the end, when all is trained.
    """
    model = {
        "init": "random",
        "freeze": "none" if trial.model.freeze == "gradual" else trial.model.freeze,
        "gradual_epochs": 2,
        "layer_decay": 0.75,
        "stem": "sum",
    }
    train = {
        "max_epochs": 3,
        "batch_size": batch_size,
        "batch_factor": 1,
        "compile": trial.train.compile if trial.train.is_compiled else "off",
        "accumulate": min(trial.train.accumulate, batch_size),
        "learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "momentum": 0.9,
        "schedule": "constant",
        "warmup_epochs": 0.0,
        "label_smoothing": 0.0,
        "class_weights": "none",
        "checkpoints": "each_epoch",
    }
    plain = {
        "study": "measurement",
        "arm": "all",
        "phase": "search",
        "number": 0,
        "source": None,
        "seed": 0,
        "data_path": "",
        "data_split": "stored",
        "data_leave_out": (),
        "model": trial.model.model_copy(update=model),
        "input": trial.input.model_copy(update={"labels_per_class": None, "label_fraction": 1.0}),
        "train": trial.train.model_copy(update=train),
        "metric": trial.metric.model_copy(update={"target": None}),
    }
    return Workload(trial.model_copy(update=plain), volume_shape_dhw, voxel_size_angstrom, dtype, num_classes, cpu)


def kept_measurement(wanted: Workload) -> Measurement | None:
    """What an earlier call measured on this machine with this torch; None if there is nothing, or it is damaged."""
    try:
        return Measurement(**json.loads(_file(wanted).read_text(encoding="utf-8"))["measurement"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def measure(wanted: Workload, *, seconds: float) -> Measurement | str:
    """Measure a workload within about so many seconds and keep the result; one line of why not if that fails."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="studytool-measure-") as scratch:
        child = subprocess.Popen(
            [sys.executable, "-m", "studytool.study.measure", scratch],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # What a frozen backbone makes of noise is of no use to anybody.
            env={**os.environ, "STUDYTOOL_CACHE": str(Path(scratch) / "cache")},
        )
        try:
            output, errors = child.communicate(wanted.as_json(), timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            output, errors = child.communicate()
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
    lines = output.splitlines()
    if not lines:
        if time.monotonic() - begun >= seconds:
            return f"two epochs of {_steps(wanted.trial)} steps take longer than {seconds:.0f} s"
        return (errors.strip().splitlines() or [f"the process ended with {child.returncode}"])[-1].strip()
    measured = Measurement(**json.loads(lines[-1]))
    write_json(
        _file(wanted),
        {"machine": _machine(), "workload": json.loads(wanted.as_json()), "measurement": asdict(measured)},
    )
    return measured


def _file(wanted: Workload) -> Path:
    text = json.dumps([_FORMAT, _machine(), wanted.as_json()], sort_keys=True)
    return cache_folder("measurements") / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _machine() -> Mapping[str, Any]:
    return {
        "host": platform.node(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpus": list(gpu_names()),
        "torch": version("torch"),
    }


def _measured_epochs(content: dict[str, Any], scratch: Path) -> Iterator[Measurement]:
    """In the child: train two epochs on noise, and say after each what it cost."""
    import torch

    from studytool.data.shards import write_dataset
    from studytool.training.loop import train_trial

    torch.set_num_threads(content["cpu"])
    trial = TrialSpec.model_validate_json(json.dumps(content["trial"]))
    trial = trial.model_copy(update={"data_path": str(scratch / "data")})
    counts = {
        "train": max(_steps(trial) * trial.train.batch_size, content["num_classes"]),
        "val": max(trial.train.batch_size, 2),
    }
    write_dataset(
        _noise(counts, content), scratch / "data", dtype=content["dtype"], provenance={}, volumes_per_shard=4096
    )
    steps = -(-counts["train"] // trial.train.batch_size)
    before, first_epoch_seconds = Cost(), 0.0
    folder = scratch / "trial"
    folder.mkdir()
    weights_bytes = 0
    for result in train_trial(trial, folder):
        cost = result.cost.since(before)
        first_epoch_seconds = first_epoch_seconds or cost.train_seconds + cost.data_seconds
        weights_bytes = weights_bytes or _weights_bytes(trial, content)
        yield Measurement(
            # Opening the dataset and building the network are in the first epoch's share.
            seconds_per_step=(cost.train_seconds + (cost.data_seconds if result.epoch > 1 else 0.0)) / steps,
            seconds_per_evaluated_volume=cost.evaluate_seconds / counts["val"],
            checkpoint_seconds=cost.checkpoint_seconds,
            peak_memory_gib=cost.peak_memory_gib,
            weights_bytes=weights_bytes,
            state_bytes=_bytes(folder / "last.pt"),
            settled=result.epoch > 1,
            first_epoch_seconds=first_epoch_seconds,
        )
        if result.epoch > 1:
            return
        before = result.cost


def _weights_bytes(trial: TrialSpec, content: Mapping[str, Any]) -> int:
    from studytool.models.build import build_model

    shape, classes = content["volume_shape_dhw"], content["num_classes"]
    model = build_model(trial.model, num_classes=classes, volume_shape_dhw=tuple(shape), seed=trial.seed)
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _steps(trial: TrialSpec) -> int:
    return STEPS_COMPILED if trial.train.is_compiled else STEPS


def _noise(counts: Mapping[str, int], content: Mapping[str, Any]) -> Iterator[Any]:
    import numpy as np

    from studytool.data.particles import Particle

    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for i in range(count):
            volume_DHW = rng.standard_normal(content["volume_shape_dhw"], dtype=np.float32)
            if content["dtype"] == "uint8":
                volume_DHW = np.clip(np.round(volume_DHW * 40 + 128), 0, 255)
            label = f"class-{i % content['num_classes']}"
            yield Particle(f"{split}-{i}", label, split, split, volume_DHW, content["voxel_size_angstrom"])


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _child() -> None:
    content = json.loads(sys.stdin.read())
    try:
        for measured in _measured_epochs(content, Path(sys.argv[1])):
            print(json.dumps(asdict(measured)), flush=True)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}")


if __name__ == "__main__":
    _child()
