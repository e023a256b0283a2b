"""What `init: motion` is worth: random, shuffled and motion weights of `r2plus1d_tiny` with few labels.

    python benchmarks/motion/compare.py --out data/motion            # everything: some hours on two cores
    python benchmarks/motion/compare.py --out data/motion --data real --labels 5
    python benchmarks/motion/compare.py --out data/motion --table    # only the table of what is there

Ten densities at 24^3, SNR 0.3, wedge of ±60 degrees. For each number of labels per class and each initialization the
learning rate is the one of `LEARNING_RATES` with the best mean validation accuracy over the first `TUNING_SEEDS` seeds;
the test accuracy is that of this rate over all seeds. A seed chooses the labelled volumes, the head, the order and the
augmentation, the same for every initialization. The weights are those of the last epoch, so validation volumes choose
the learning rate and nothing else. What was computed is kept in OUT/results.jsonl; a second call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from studytool.data.particles import Particle
from studytool.data.shards import Dataset, open_dataset, write_dataset
from studytool.data.simulate import simulate_dataset
from studytool.files import sha256_of
from studytool.models.weights import weights_path
from studytool.report.statistics import Spent, cost_ratio, mean_interval, paired_difference
from studytool.settings import InputSettings, MetricSettings, ModelSettings, SimulateSettings, TrainSettings
from studytool.spec import TrialSpec
from studytool.training.loop import train_trial

INITS = ("random", "shuffled", "motion")
LEARNING_RATES = {5: (3e-3, 1e-2, 3e-2), 20: (3e-3, 1e-2), 100: (3e-3, 1e-2)}
EPOCHS = {5: 20, 20: 12, 100: 4}
SEEDS = 10
TUNING_SEEDS = {5: 2, 20: 1, 100: 1}
TRAIN_PER_CLASS, VAL_PER_CLASS, TEST_PER_CLASS = 200, 10, 60
TEMPLATES = "data/macromolecules_10A"


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out)
    if not arguments.table:
        for source in arguments.data:
            for labels in arguments.labels:
                run_cell(results, source, labels, arguments.inits)
    for source in arguments.data:
        for labels in arguments.labels:
            for line in table(results, source, labels):
                print(line)


def run_cell(results: Results, source: str, labels: int, inits: list[str]) -> None:
    """All trials of one source of densities and one number of labels per class."""
    for seed in range(TUNING_SEEDS[labels]):
        for init in inits:
            for rate in LEARNING_RATES[labels]:
                results.trial(source, labels, init, rate, seed)
    rates = {init: results.best_rate(source, labels, init) for init in inits}
    for seed in range(SEEDS):
        for init in inits:
            results.trial(source, labels, init, rates[init], seed)


class Results:
    """The finished trials, kept as lines of JSON."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / "results.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        # Another checkpoint makes other results; those from random weights stay.
        self.done = {_key(r): r for r in map(json.loads, lines) if r["weights"] == _weights(r["init"])}

    def trial(self, source: str, labels: int, init: str, rate: float, seed: int) -> dict[str, Any]:
        """The result of a trial, which is trained if it is not there yet."""
        key = (source, labels, init, rate, seed)
        if key not in self.done:
            result = train(self.out, *key)
            result["weights"] = _weights(init)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            self.done[key] = result
            print(
                f"{source} {labels} labels {init} lr {rate:g} seed {seed}: val {result['val'][-1]:.3f} "
                f"test {result['test']:.3f}, {result['wall_seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        return self.done[key]

    def get(self, source: str, labels: int, init: str, rate: float) -> dict[int, dict[str, Any]]:
        """Results by seed."""
        return {key[4]: result for key, result in self.done.items() if key[:4] == (source, labels, init, rate)}

    def best_rate(self, source: str, labels: int, init: str) -> float | None:
        """The rate with the best mean validation accuracy over the tuning seeds; None if they are not there."""
        means = {}
        for rate in LEARNING_RATES[labels]:
            found = self.get(source, labels, init, rate)
            values = [found[seed]["val"][-1] for seed in range(TUNING_SEEDS[labels]) if seed in found]
            if len(values) == TUNING_SEEDS[labels]:
                means[rate] = np.mean(values)
        return max(means, key=lambda rate: means[rate]) if len(means) == len(LEARNING_RATES[labels]) else None


def _weights(init: str) -> str:
    """The SHA-256 of the file that an initialization reads, "" for none."""
    path = weights_path("r2plus1d_tiny", init)
    return "" if path is None else sha256_of(path)


def _key(result: dict[str, Any]) -> tuple[str, int, str, float, int]:
    return result["source"], result["labels"], result["init"], result["learning_rate"], result["seed"]


def train(out: Path, source: str, labels: int, init: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one trial to its end."""
    data = small_dataset(out, source, labels, seed)
    trial = TrialSpec(
        study="motion",
        arm=init,
        phase="confirm",
        number=seed,
        seed=seed,
        data_path=str(data),
        model=ModelSettings(backbone="r2plus1d_tiny", init=init),
        input=InputSettings(),
        train=TrainSettings(max_epochs=EPOCHS[labels], learning_rate=rate),
        metric=MetricSettings(name="val/accuracy", select="last"),
    )
    folder = out / "trials" / f"{os.getpid()}"
    started = time.perf_counter()
    epochs = list(train_trial(trial, folder, device="cpu"))
    shutil.rmtree(folder)
    return {
        "source": source,
        "labels": labels,
        "init": init,
        "learning_rate": rate,
        "seed": seed,
        "val": [epoch.val.accuracy for epoch in epochs],
        "test": epochs[-1].test.accuracy,
        "samples": [epoch.cost.samples for epoch in epochs],
        "flops": [epoch.cost.flops for epoch in epochs],
        "train_seconds": epochs[-1].cost.train_seconds,
        "wall_seconds": time.perf_counter() - started,
    }


def small_dataset(out: Path, source: str, labels: int, seed: int) -> Path:
    """`labels` training volumes of each class, drawn by the seed, with all validation and test volumes."""
    folder = out / "data" / f"{source}-{labels}-{seed}"
    if not folder.exists():
        dataset = open_dataset(full_dataset(out, source))
        rng = np.random.default_rng([labels, seed])
        rows = dataset.rows("train")
        chosen = [rng.permutation(rows[dataset.labels[rows] == label])[:labels] for label in range(10)]
        rows = np.concatenate([*chosen, dataset.rows("val"), dataset.rows("test")])
        write_dataset(
            _particles(dataset, rows),
            folder,
            dtype=dataset.manifest.dtype,
            provenance={"kind": "subset", "of": dataset.manifest.fingerprint, "labels": labels, "seed": seed},
            volumes_per_shard=4096,
        )
    return folder


def _particles(dataset: Dataset, rows: np.ndarray) -> Iterator[Particle]:
    volume = np.empty((1, *dataset.manifest.shape_dhw), dtype=dataset.manifest.dtype)
    for row in rows.tolist():
        dataset.gather(np.array([row]), volume)
        yield Particle(
            particle_id=str(dataset.particle_ids[row]),
            label=dataset.manifest.classes[dataset.labels[row]],
            tomogram=str(dataset.tomograms[row]),
            split=str(dataset.splits[row]),
            volume_DHW=volume[0].astype(np.float32),
            voxel_size_angstrom=dataset.manifest.voxel_size_angstrom,
            snr=float(dataset.snr[row]),
        )


def full_dataset(out: Path, source: str) -> Path:
    """Ten classes: the phantoms, or the densities of the shared folder."""
    folder = out / "data" / source
    if not folder.exists():
        # A tomogram holds ten volumes of each class, so that the splits have the sizes that are wanted.
        counts = (TRAIN_PER_CLASS // 10, VAL_PER_CLASS // 10, TEST_PER_CLASS // 10)
        settings = SimulateSettings(
            classes=10,
            volumes_per_class=10 * sum(counts),
            side=24,
            snr=0.3,
            tomograms=counts,
            templates=None if source == "phantoms" else str(_shared() / TEMPLATES),
            seed=1,
        )
        simulate_dataset(settings, folder)
    return folder


def table(results: Results, source: str, labels: int) -> Iterator[str]:
    """Lines of Markdown: accuracy, the paired gain over random, and the cost to what random reaches."""
    chosen = {init: results.best_rate(source, labels, init) for init in INITS}
    if None in chosen.values():
        return
    found = {init: results.get(source, labels, init, rate) for init, rate in chosen.items()}
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
    target = float(np.mean([found["random"][seed]["val"][-1] for seed in seeds]))
    spent = {init: {s: _spent(by_seed[s], target) for s in seeds} for init, by_seed in found.items()}
    yield f"\n{source}, {labels} labels per class, {EPOCHS[labels]} epochs, {len(seeds)} seeds; target {target:.3f}\n"
    yield "| init | learning rate | test accuracy, % | gain over random, points | samples to target | of random's |"
    yield "|---|---|---|---|---|---|"
    for init in INITS:
        accuracy = {seed: 100 * found[init][seed]["test"] for seed in seeds}
        gain, cost = "", ""
        if init != "random":
            random = {seed: 100 * found["random"][seed]["test"] for seed in seeds}
            gain = _shown(paired_difference(accuracy, random).interval)
            ratio = cost_ratio(spent[init], spent["random"])
            cost = f"{ratio.bound} {_number(ratio.ratio)} [{_number(ratio.low)}, {_number(ratio.high)}]"
        reached = [s.amount for s in spent[init].values() if s.reached]
        samples = (
            f"{np.median(reached):.0f} ({len(reached)} of {len(seeds)})" if reached else f"never (0 of {len(seeds)})"
        )
        interval = mean_interval(list(accuracy.values()), lowest=0, highest=100)
        yield f"| {init} | {chosen[init]:g} | {_shown(interval)} | {gain} | {samples} | {cost} |"


def _spent(result: dict[str, Any], target: float) -> Spent:
    for value, samples in zip(result["val"], result["samples"], strict=True):
        if value >= target:
            return Spent(samples, True)
    return Spent(result["samples"][-1], False)


def _shown(interval: Any) -> str:
    half = "" if interval.low is None else f" ± {(interval.high - interval.low) / 2:.1f}"
    return f"{interval.mean:.1f}{half}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _shared() -> Path:
    root = Path(__file__).resolve().parents[2]
    return (root / os.environ.get("STUDYTOOL_SHARED", "../shared")).resolve()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = ["phantoms", *(["real"] if (_shared() / TEMPLATES).is_dir() else [])]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", nargs="+", choices=sources, default=sources)
    parser.add_argument("--labels", nargs="+", type=int, choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--inits", nargs="+", choices=INITS, default=list(INITS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="train nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
