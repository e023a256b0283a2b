"""A study whose records are made up, but as a real one leaves them: for tests of what comes after the training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from studytool.results import Cost, DeviceInfo, EpochResult, Outcome, Scores, TrialRecord
from studytool.seeds import derive_seed
from studytool.spec import StudySpec, TrialSpec, load_study
from studytool.study.records import new_record

CLASSES = ("apoferritin", "barrel", "hexamer", "ribosome")
YAML = """\
name: fabricated
data: {path: data/small}
arms:
  backbone: [r2plus1d_18]
  init: [random, kinetics400]
  freeze: [none, stem]
exclude:
  - {init: random, freeze: stem}
search:
  learning_rate: {log_uniform: [1.0e-5, 1.0e-2]}
  trials_per_arm: 4
confirm: {seeds: 3}
train: {max_epochs: 6, batch_size: 16}
metric: {name: val/balanced_accuracy, mode: max, target: 0.7}
"""
RANDOM, WHOLE, STEM = "r2plus1d_18.random.none", "r2plus1d_18.kinetics400.none", "r2plus1d_18.kinetics400.stem"
QUALITY = {RANDOM: 0.62, WHOLE: 0.86, STEM: 0.80}


def make_spec(folder: Path, text: str = YAML, name: str = "fabricated") -> StudySpec:
    path = folder / "study.yaml"
    path.write_text(text)
    return load_study(path, [f"output={folder / 'studies'}", f"name={name}"])


def make_manifest(folder: Path) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps({"format_version": 1, "classes": CLASSES, "counts": {"ribosome": {"train": 40}}}))
    return path


def make_scores(accuracy: float, loss: float, generator: np.random.Generator, per_class: int = 100) -> Scores:
    """Scores with a confusion matrix drawn with about this accuracy."""
    right = generator.binomial(per_class, min(max(accuracy, 0.0), 1.0), size=len(CLASSES))
    confusion = np.diag(right)
    for i in range(len(CLASSES)):
        others = [j for j in range(len(CLASSES)) if j != i]
        confusion[i, others] += generator.multinomial(per_class - right[i], [1 / len(others)] * len(others))
    share = float(right.mean()) / per_class
    return Scores(
        count=per_class * len(CLASSES),
        loss=loss,
        accuracy=share,
        balanced_accuracy=share,
        macro_f1=share,
        macro_auc=min(1.0, 0.5 + share / 2),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
    )


def make_epochs(trial: TrialSpec, quality: float, *, epochs: int | None = None) -> tuple[EpochResult, ...]:
    """A curve that rises towards `quality`, with the noise of the trial's seed; tested at the end of a confirm run."""
    generator = np.random.default_rng(derive_seed(trial.arm, trial.phase, trial.number, trial.seed))
    level = quality + 0.02 * generator.standard_normal()
    seconds_per_epoch = {"none": 4.0, "stem": 3.0}.get(trial.model.freeze, 2.0)
    results: list[EpochResult] = []
    best_epoch, best_value = 0, -1.0
    for epoch in range(1, (epochs or trial.train.max_epochs) + 1):
        value = level * (1 - 0.75 ** (2 * epoch)) + 0.005 * generator.standard_normal()
        scores = make_scores(value, 1.6 * (1 - value), generator)
        if scores.balanced_accuracy > best_value:
            best_epoch, best_value = epoch, scores.balanced_accuracy
        last = epoch == trial.train.max_epochs
        results.append(
            EpochResult(
                epoch=epoch,
                steps=10 * epoch,
                train_loss=1.7 * (1 - value),
                learning_rate=trial.train.learning_rate * (1 - epoch / 10),
                val=scores,
                cost=Cost(
                    data_seconds=0.02 * epoch,
                    train_seconds=0.8 * seconds_per_epoch * epoch,
                    evaluate_seconds=0.2 * seconds_per_epoch * epoch,
                    device_seconds=(seconds_per_epoch + 0.02) * epoch,
                    samples=160 * epoch,
                    flops=3e12 * epoch,
                    peak_memory_gib=0.8,
                ),
                best_epoch=best_epoch,
                best_value=best_value,
                test=make_scores(best_value - 0.02, 0.5, generator) if last and trial.phase == "confirm" else None,
                is_last=last,
            )
        )
    return tuple(results)


def make_trials(spec: StudySpec) -> list[tuple[TrialSpec, TrialRecord]]:
    """Of every arm: the search (two trials complete, one pruned, one failed) and the confirm runs of its trial 1."""
    trials: list[tuple[TrialSpec, TrialRecord]] = []
    for arm in spec.list_arms():
        quality = QUALITY[arm.name]
        search = [
            (Outcome.COMPLETE, quality - 0.10, 1e-4),
            (Outcome.COMPLETE, quality, 1e-3),
            (Outcome.PRUNED, quality - 0.25, 2e-5),
            (Outcome.FAILED, quality - 0.40, 9e-3),
        ]
        for number, (outcome, reached, learning_rate) in enumerate(search):
            trial = spec.trial(arm, {"learning_rate": learning_rate}, phase="search", number=number, seed=spec.seed)
            ran = {Outcome.COMPLETE: None, Outcome.PRUNED: 3, Outcome.FAILED: 1}[outcome]
            message = "epoch 2: the training loss is nan" if outcome is Outcome.FAILED else ""
            trials.append((trial, make_record(trial, outcome, make_epochs(trial, reached, epochs=ran), message)))
        for number in range(spec.confirm.seeds):
            seed = derive_seed(spec.seed, "confirm", number)
            trial = spec.trial(
                arm, {"learning_rate": 1e-3}, phase="confirm", number=number, seed=seed, source=1 if search else None
            )
            trials.append((trial, make_record(trial, Outcome.COMPLETE, make_epochs(trial, quality))))
    return trials


def make_record(
    trial: TrialSpec, outcome: Outcome | None, epochs: tuple[EpochResult, ...] = (), message: str = ""
) -> TrialRecord:
    return replace(
        new_record(trial, "fingerprint"),
        outcome=outcome,
        epochs=epochs,
        message=message,
        device=DeviceInfo("cpu", "x86_64, 1 threads", 2),
    )
