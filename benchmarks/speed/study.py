"""The same 24 trials four ways: studytool, studytool with its speed switched off, as in Ray's tutorial, Optuna's loop.

    python benchmarks/speed/study.py --out results         # about 40 minutes on two quiet cores
    python benchmarks/speed/study.py --out results --full  # 32^3 volumes, for a GPU
    python benchmarks/speed/study.py --out results --tiny  # one trial of one epoch each: does it all still run?

Two networks x {none, stage3, backbone} x two learning rates x two seeds, from a file of weights such as are published
for them (its numbers are random, which changes no time). All four ways train the same network (one grey channel,
frozen batch normalization in eval), on the same volumes and splits, each normalized, without augmentation, with Adam
at a constant rate, the same batch size and number of epochs, one trial at a time, on a CPU with one thread. What
studytool does beyond that (checkpoints, six scores, the test split at the end, the curve in MLflow) is in its time;
the share that its trials spend on checkpoints is shown. Each arm of network and freezing is run by all four, one
after the other, so that the ratios of a row come from the same minutes; with `--rounds` the order is turned round
each time, and medians are shown.

Device time is wall time from the moment that the first trial begins in a worker that is up to the end of the last, as
the one slot is then held: filling the cache is in it, and starting further workers; starting Python, Ray and the first
worker and writing the report is not.

Every measurement is kept in `--out` at once, and one that is there is not made again. The table in Markdown is written
to `study.md` there, and printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from overhead import wall_seconds

from studytool.study.records import read_records

HERE = Path(__file__).parent
BACKBONES, FREEZES, RATES = ("r3d_18", "r2plus1d_18"), ("none", "stage3", "backbone"), (1e-3, 3e-4)
SWITCHED_OFF = (
    "cache=off",
    "train.precision=float32",
    "train.channels_last=off",
    "train.fused=off",
    "train.trim_kernels=off",
    "train.reuse_memory=off",
    "train.checkpoints=each_epoch",
    "train.compile=off",
    "resources.trials_together=1",
    "resources.keep_workers=false",
)
"""What this issue brought, as `--set` of a study without it."""
WAYS = ("studytool", "switched off", "Ray's tutorial", "Optuna's loop")
STUDY = """
name: study
data: {{path: {data}}}
arms: {{backbone: [{backbone}], freeze: [{freeze}], learning_rate: {rates}}}
model: {{init: "checkpoint:{weights}"}}
confirm: {{seeds: {seeds}}}
train: {{max_epochs: {epochs}, batch_size: {batch}, schedule: constant, weight_decay: 0.0}}
input: {{augment: []}}
resources: {{trials_at_once: 1, cpu: {cpus}}}
"""
SIMULATION = """
name: data
data:
  path: data
  simulate: {{classes: 4, volumes_per_class: {per_class}, side: {side}, voxel_size_angstrom: {voxel}, snr: 1.0}}
"""


@dataclass(frozen=True)
class Size:
    """How large the comparison is; `loaders` are processes of torch's DataLoader, for the other side."""

    side: int = 16
    per_class: int = 20
    epochs: int = 6
    batch: int = 16
    seeds: int = 2
    rates: tuple[float, ...] = RATES
    cpus: int = 1
    loaders: int = 0

    @property
    def trials(self) -> int:
        """Of an arm of network and freezing."""
        return self.seeds * len(self.rates)


NORMAL = Size()
FULL = Size(side=32, per_class=500, epochs=10, batch=32, cpus=4, loaders=4)
TINY = Size(per_class=10, epochs=1, batch=8, seeds=1, rates=RATES[:1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--full", action="store_const", dest="size", const=FULL, default=NORMAL)
    parser.add_argument("--tiny", action="store_const", dest="size", const=TINY)
    parser.add_argument("--backbone", nargs="+", default=BACKBONES)
    parser.add_argument("--freeze", nargs="+", default=FREEZES)
    parser.add_argument("--side", type=int, help="of a volume, in voxels")
    parser.add_argument("--per-class", type=int, help="volumes of each of the four kinds, of all three splits")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--off", nargs="+", default=SWITCHED_OFF, metavar="KEY=VALUE", help="what is switched off")
    arguments = parser.parse_args()
    chosen = {name: getattr(arguments, name) for name in ("side", "per_class")}
    size = replace(arguments.size, **{name: value for name, value in chosen.items() if value})
    bench = Bench(arguments.out.absolute(), size, arguments.off)
    arms = [(backbone, freeze) for backbone in arguments.backbone for freeze in arguments.freeze]
    bench.run(arms, arguments.rounds)
    text = "\n".join(table_lines(bench.size, arms, bench.read(), arguments.off))
    (arguments.out / "study.md").write_text(text + "\n")
    print(text)


class Bench:
    """Makes the measurements that are missing in a folder."""

    def __init__(self, folder: Path, size: Size, off: Sequence[str]) -> None:
        self.folder = folder
        self.size = size
        self.off = off
        self._kept = folder / "study.jsonl"
        # As JSON has them.
        self._how: dict[str, Any] = json.loads(json.dumps({"size": asdict(size), "off": off, "machine": machine()}))

    def run(self, arms: Sequence[tuple[str, str]], rounds: int) -> None:
        """Every arm by each way, as often as there are rounds."""
        self._make_data()
        done = {(m["backbone"], m["freeze"], m["way"], m["round"]) for m in self.read()}
        for number in range(rounds):
            for backbone, freeze in arms:
                for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                    if (backbone, freeze, way, number) not in done:
                        found = self.measure(way, backbone, freeze)
                        what = {"backbone": backbone, "freeze": freeze, "way": way, "round": number, **found}
                        print(json.dumps(what), file=sys.stderr, flush=True)
                        with self._kept.open("a") as file:
                            file.write(json.dumps({**what, **self._how}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """The measurements of this size, made on this machine with the same switched off."""
        lines = self._kept.read_text().splitlines() if self._kept.exists() else []
        return [m for m in map(json.loads, lines) if all(m[name] == value for name, value in self._how.items())]

    def measure(self, way: str, backbone: str, freeze: str) -> dict[str, float]:
        """Seconds of an arm's trials, of checkpoints among them, and mean best accuracy; with a cache of its own."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="measuring-") as name:
            if way in ("Ray's tutorial", "Optuna's loop"):
                return self._tutorial(Path(name), "ray" if way == "Ray's tutorial" else "optuna", backbone, freeze)
            return self._study(Path(name), backbone, freeze, () if way == "studytool" else self.off)

    def _make_data(self) -> None:
        """The dataset, and the same volumes as one MRC file each with a table of their classes and splits."""
        self._data = self.folder / f"data-{self.size.side}-{self.size.per_class}"
        if (self._data / "whole").exists():
            return
        self._data.mkdir(parents=True, exist_ok=True)
        voxel = 18.0 * 16 / self.size.side
        text = SIMULATION.format(per_class=self.size.per_class, side=self.size.side, voxel=voxel)
        (self._data / "data.yaml").write_text(text)
        self._studytool(self._data, "data", "simulate", "data.yaml")
        self._studytool(self._data, "data", "export", "data", "--out", "mrc")
        (self._data / "whole").touch()

    def _weights(self, backbone: str) -> Path:
        """A file of the form that torchvision publishes."""
        path = self.folder / f"{backbone}.pth"
        if not path.exists():
            torch.manual_seed(0)
            torch.save(getattr(torchvision.models.video, backbone)(weights=None).state_dict(), path)
        return path

    def _study(self, folder: Path, backbone: str, freeze: str, settings: Sequence[str]) -> dict[str, float]:
        size, rates = self.size, list(self.size.rates)
        where = {"data": self._data / "data", "weights": self._weights(backbone)}
        text = STUDY.format(**asdict(size) | {"rates": rates}, **where, backbone=backbone, freeze=freeze)
        (folder / "study.yaml").write_text(text)
        words = [word for setting in settings for word in ("--set", setting)]
        self._studytool(folder, "run", "study.yaml", "--no-plan", *words)
        records = read_records(folder / "studies/study")
        assert len(records) == size.trials, f"{len(records)} records"
        best = [max(epoch.val.accuracy for epoch in record.epochs) for record in records]
        return {
            "seconds": wall_seconds(folder, "study", size.trials),
            "checkpoints": sum(record.cost.checkpoint_seconds for record in records),
            "accuracy": statistics.mean(best),
        }

    def _tutorial(self, folder: Path, how: str, backbone: str, freeze: str) -> dict[str, float]:
        fixed = {"root": str(self._data / "mrc"), "backbone": backbone, "freeze": freeze, "loaders": self.size.loaders}
        fixed |= {
            "weights": str(self._weights(backbone)),
            "batch_size": self.size.batch,
            "max_epochs": self.size.epochs,
        }
        varied = [(rate, seed) for rate in self.size.rates for seed in range(self.size.seeds)]
        path = folder / "configs.json"
        path.write_text(json.dumps([{**fixed, "learning_rate": rate, "seed": seed} for rate, seed in varied]))
        command = [sys.executable, str(HERE / "tutorial.py"), how, str(path), str(folder)]
        done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True, env=self._env(folder))
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    def _studytool(self, folder: Path, *words: str) -> None:
        command = [sys.executable, "-m", "studytool.cli", *words]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=self._env(folder))

    def _env(self, folder: Path) -> dict[str, str]:
        """Torch's threads, a cache of one's own, and the same modules as here."""
        own = {"OMP_NUM_THREADS": str(self.size.cpus), "STUDYTOOL_CACHE": str(folder / "cache")}
        return {**os.environ, **own, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}


def machine() -> str:
    """The processor, the cores that may be used, and the GPU."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0))
    return f"{next(iter(names), platform.machine())}, {cores} cores, {gpu}, torch {torch.__version__}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def table_lines(
    size: Size, arms: Sequence[tuple[str, str]], measured: Sequence[Mapping[str, Any]], off: Sequence[str]
) -> Iterator[str]:
    """Markdown: a row for each arm, the sums, and the goals. Accuracies stand in the order of the ways."""

    def median(name: str, arm: tuple[str, str], way: str) -> float:
        return statistics.median(m[name] for m in measured if (m["backbone"], m["freeze"], m["way"]) == (*arm, way))

    seconds = {arm: {way: median("seconds", arm, way) for way in WAYS} for arm in arms}
    frozen = [arm for arm in arms if arm[1] != "none"]
    yield f"{machine()}; load {os.getloadavg()[2]:.1f} in the last 15 minutes. {size.trials * len(arms)} trials a way"
    yield f"({size.side}^3, {4 * size.per_class} volumes in all, {size.epochs} epochs, batches of {size.batch});"
    yield f"rounds: {max(m['round'] for m in measured) + 1}. Switched off: {', '.join(off)}."
    yield ""
    writing = {arm: median("checkpoints", arm, "studytool") for arm in arms}
    ways = " | ".join(f"{way}, times" for way in WAYS[1:])
    yield f"| network, frozen | studytool, s | of it checkpoints | {ways} | accuracies |"
    yield "|---|---|---|---|---|---|---|"
    for arm in arms:
        accuracies = ", ".join(f"{median('accuracy', arm, way):.2f}" for way in WAYS)
        yield _row(", ".join(arm), seconds[arm], writing[arm], accuracies)
    for name, some in (("the frozen arms", frozen), ("all", arms)):
        if some:
            sums = {way: sum(seconds[arm][way] for arm in some) for way in WAYS}
            yield _row(name, sums, sum(writing[arm] for arm in some), "")
    yield ""
    yield "| goal | wanted | measured | met |"
    yield "|---|---|---|---|"
    for name, some, wanted in (("frozen arms", frozen, 10.0), ("whole study", arms, 4.0)):
        if some:
            ratio = sum(seconds[a]["Ray's tutorial"] for a in some) / sum(seconds[a]["studytool"] for a in some)
            yield _goal(f"{name}: device time of Ray's tutorial over studytool's", wanted, ratio)
    least = min(seconds[arm][way] / seconds[arm]["studytool"] for arm in arms for way in WAYS[1:])
    yield _goal("any other way in any arm, over studytool", 1.0, least)


def _row(name: str, seconds: Mapping[str, float], writing: float, accuracies: str) -> str:
    ours = seconds["studytool"]
    ratios = " | ".join(f"{seconds[way] / ours:.2f}" for way in WAYS[1:])
    return f"| {name} | {ours:.1f} | {writing / ours:.0%} | {ratios} | {accuracies} |"


def _goal(what: str, wanted: float, ratio: float) -> str:
    return f"| {what} | ≥ {wanted:g} | {ratio:.2f} | {'yes' if ratio >= wanted else '**no**'} |"


if __name__ == "__main__":
    main()
