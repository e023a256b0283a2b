"""The training step: studytool's own loop against a plain fp32 one with its volumes already on the device.

    python benchmarks/speed/step.py                                  # every backbone, compiled and not
    python benchmarks/speed/step.py r3d_18 swin3d_t --batch-size 16  # some of them
    python benchmarks/speed/step.py r3d_18 --side 16 --steps 2 --rounds 2 --no-compile --out step.md    # a try

The plain loop is float32, eager and contiguous, with AdamW as torch gives it; nothing is read, normalized or augmented.
studytool's is `train_trial`: it streams shards from the disk, normalizes, augments, and runs in its own layout and
precision. Both train the same network whole. Their epochs take turns, the plain ones in a process of their own, as what
studytool does to its own would help them; the first of each is warm-up.
A compiled trial runs one step of every epoch uncompiled, to count its operations: take more `--steps` than a few.
Spread is the lowest and highest ratio of two epochs that ran one after the other. Checkpoints are written outside of
what is timed; `--work /dev/shm` keeps them off a slow disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from studytool.data.particles import Particle
from studytool.data.shards import write_dataset
from studytool.errors import TrainingError
from studytool.files import write_text
from studytool.models.backbones import BACKBONES
from studytool.models.build import build_model
from studytool.results import Cost
from studytool.settings import InputSettings, MetricSettings, ModelSettings, TrainSettings
from studytool.spec import TrialSpec
from studytool.training.device import choose_device, choose_precision, describe_device, synchronize
from studytool.training.loop import train_trial

CLASSES = 4
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")


@dataclass(frozen=True)
class Epoch:
    """One epoch of a loop: its volumes per second, and which share of its time it waited for data."""

    volumes_per_second: float
    waiting: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", metavar="BACKBONE", help="default: all of studytool's")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    parser.add_argument("--threads", type=int, help="torch's threads; default: what torch takes")
    parser.add_argument("--side", type=int, default=32, help="of a volume, in voxels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="in an epoch")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each loop that are timed")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes minutes a network"
    )
    parser.add_argument("--work", type=Path, help="where volumes and checkpoints are written; default: as TMPDIR says")
    parser.add_argument("--out", type=Path, help="a file for the table")
    options = parser.parse_args()
    unknown = [name for name in options.backbones if name not in BACKBONES and ":" not in name]
    if unknown:
        parser.error(f"no backbone {unknown[0]}; there are {', '.join(BACKBONES)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    loops = kinds_of_loop(device, compiled=not options.no_compile)
    lines = [*heading(device, options), *table_head(loops)]
    for name in options.backbones or BACKBONES:
        with tempfile.TemporaryDirectory(prefix="step-", dir=options.work) as folder:
            try:
                rounds = measure(name, loops, Path(folder), device, options)
            except Exception as error:  # one network that cannot be compiled is not to cost the table
                why = (str(error).splitlines() or [""])[0]
                lines.append(f"| {name} | not measured: {type(error).__name__}: {why} |")
            else:
                lines.append(row(name, rounds, loops))
        print(lines[-1], file=sys.stderr, flush=True)
    print(text := "\n".join(lines) + "\n")
    if options.out:
        write_text(options.out, text)


def kinds_of_loop(device: torch.device, *, compiled: bool) -> Mapping[str, Mapping[str, Any]]:
    """The loops of studytool that are measured, with their settings: as it is by default, and what may be faster."""
    loops: dict[str, dict[str, Any]] = {"studytool": {}}
    if compiled:
        loops["compiled"] = {"compile": "on"}
    if choose_precision("auto", device) == "float32" and (device.type == "cuda" or bfloat16_instructions()):
        loops["bfloat16"] = {"precision": "bfloat16"}
    return loops


def bfloat16_instructions() -> tuple[str, ...]:
    """Those that the CPU has, by the kernel's names of them; none where the kernel does not tell."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return ()
    return tuple(name for name in BFLOAT16_INSTRUCTIONS if name in words)


def heading(device: torch.device, options: argparse.Namespace) -> list[str]:
    """What was measured, and where."""
    where = f"{describe_device(device, 1).name}, torch {torch.__version__}"
    if device.type == "cpu":
        where += f", bfloat16 instructions: {', '.join(bfloat16_instructions()) or 'none'}"
    return [
        f"{where}; volumes of {options.side}^3, {options.batch_size} in a batch, medians of {options.rounds} epochs of "
        f"{options.steps} steps; ratio to the plain loop (lowest to highest).",
        "",
    ]


def table_head(loops: Mapping[str, Mapping[str, Any]]) -> list[str]:
    ratios = [f"{name}: ratio" for name in loops]
    columns = ["backbone", "plain, volumes/s", "studytool, volumes/s", "waits for data", *ratios, "fastest"]
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


def row(name: str, rounds: Sequence[Mapping[str, Epoch]], loops: Iterable[str]) -> str:
    """A line of the table: medians over the rounds; a loop that broke on the way has none."""

    def median(loop: str) -> float:
        return statistics.median(r[loop].volumes_per_second for r in rounds)

    waiting = statistics.median(r["studytool"].waiting for r in rounds)
    cells = [name, f"{median('plain'):.3g}", f"{median('studytool'):.3g}", f"{waiting:.1%}"]
    for loop in loops:
        if loop not in rounds[-1]:
            cells.append("broke")
            continue
        ratios = [r[loop].volumes_per_second / r["plain"].volumes_per_second for r in rounds]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return f"| {' | '.join([*cells, max(rounds[-1], key=median)])} |"


def measure(
    name: str,
    loops: Mapping[str, Mapping[str, Any]],
    folder: Path,
    device: torch.device,
    options: argparse.Namespace,
) -> list[dict[str, Epoch]]:
    """Epochs of every loop that took turns, after one of each as warm-up."""
    count = options.batch_size * options.steps
    splits = {"train": max(count, CLASSES), "val": CLASSES}
    write_dataset(noise(splits, options.side), folder / "data", dtype="float16", provenance={}, volumes_per_shard=4096)
    with ExitStack() as stack:
        running: dict[str, Iterator[Epoch]] = {}
        for loop, settings in {"plain": None, **loops}.items():
            if settings is None:
                epochs = epochs_elsewhere(name, device, options)
            else:
                (folder / loop).mkdir()
                epochs = own_epochs(trial_of(name, folder, settings, options), folder / loop, device)
            running[loop] = stack.enter_context(closing(epochs))
        turns = [take_turns(running) for _round in range(1 + options.rounds)]
        return turns[1:]


def take_turns(running: dict[str, Iterator[Epoch]]) -> dict[str, Epoch]:
    """An epoch of each; one of the settings that are only tried and breaks is left out from then on."""
    found = {}
    for loop, epochs in [*running.items()]:
        try:
            found[loop] = next(epochs)
        except TrainingError as error:
            if loop in ("plain", "studytool"):
                raise
            print(f"{loop}: {error}", file=sys.stderr)
            del running[loop]
    return found


def trial_of(name: str, folder: Path, settings: Mapping[str, Any], options: argparse.Namespace) -> TrialSpec:
    return TrialSpec(
        study="step",
        arm="all",
        phase="search",
        number=0,
        seed=0,
        data_path=str(folder / "data"),
        model=ModelSettings(backbone=name),
        input=InputSettings(),
        train=TrainSettings(
            max_epochs=options.rounds + 2,
            batch_size=options.batch_size,
            learning_rate=1e-5,
            schedule="constant",
            **settings,
        ),
        metric=MetricSettings(),
    )


def own_epochs(trial: TrialSpec, folder: Path, device: torch.device) -> Iterator[Epoch]:
    """Epochs of studytool: training and the wait for its data; evaluation and checkpoints are not counted."""
    before = Cost()
    with closing(train_trial(trial, folder, device=str(device))) as results:
        for result in results:
            cost = result.cost
            train, data = cost.train_seconds - before.train_seconds, cost.data_seconds - before.data_seconds
            yield Epoch((cost.samples - before.samples) / (train + data), data / (train + data))
            before = cost


def epochs_elsewhere(name: str, device: torch.device, options: argparse.Namespace) -> Iterator[Epoch]:
    """Those of the plain loop, in a process of its own: what studytool does to this one would help it, too."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=answer, args=(there, name, device, options, torch.get_num_threads()), daemon=True
    )
    process.start()
    there.close()
    with closing(here):
        while True:
            here.send("an epoch")
            yield here.recv()


def answer(asked: Connection, name: str, device: torch.device, options: argparse.Namespace, threads: int) -> None:
    """In the other process: an epoch of the plain loop whenever one is asked for, until nobody is there to ask."""
    torch.set_num_threads(threads)
    epochs = plain_epochs(name, device, options)
    with suppress(EOFError):
        while asked.recv():
            asked.send(next(epochs))


def plain_epochs(name: str, device: torch.device, options: argparse.Namespace) -> Iterator[Epoch]:
    """Epochs of the loop that every tutorial has."""
    side, count = (options.side,) * 3, options.batch_size * options.steps
    settings = ModelSettings(backbone=name)
    model = build_model(settings, num_classes=CLASSES, volume_shape_dhw=side, seed=0).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    compute_loss = torch.nn.CrossEntropyLoss()
    volumes_B1DHW = torch.randn(count, 1, *side, device=device)
    labels_B = torch.arange(count, device=device) % CLASSES
    while True:
        synchronize(device)
        begun = time.perf_counter()
        for i in range(0, count, options.batch_size):
            optimizer.zero_grad()
            loss = compute_loss(model(volumes_B1DHW[i : i + options.batch_size]), labels_B[i : i + options.batch_size])
            loss.backward()
            optimizer.step()
        synchronize(device)
        yield Epoch(count / (time.perf_counter() - begun))


def noise(splits: Mapping[str, int], side: int) -> Iterator[Particle]:
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for i in range(count):
            volume_DHW = rng.standard_normal((side,) * 3, dtype=np.float32)
            yield Particle(f"{split}-{i}", f"class-{i % CLASSES}", split, split, volume_DHW, 10.0)


if __name__ == "__main__":
    main()
