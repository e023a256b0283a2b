"""One trial: `train_trial` walks through its epochs and yields a result for each.

It knows nothing of Ray or MLflow. Whoever drives it (Ray Tune, the command line, a test) decides when to stop, by not
asking for the next epoch. On a CPU a trial is a pure function of its TrialSpec and its dataset, to the last bit,
however often it was stopped and resumed: the epoch order, augmentation and dropout of an epoch depend on (seed, epoch)
alone, and the learning rate on the step.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from studytool import registry
from studytool.data.labels import training_rows
from studytool.data.preparation import preparation_of
from studytool.data.remote_copy import local_copy
from studytool.data.shards import Dataset
from studytool.errors import TrainingError, WeightsError
from studytool.models.anatomy import Activations
from studytool.models.backbones import find_backbone
from studytool.results import EpochResult, Scores
from studytool.seeds import derive_seed
from studytool.spec import TrialSpec
from studytool.training import trained
from studytool.training.checkpoint import TrialState, load_last, repeat_last, save_last
from studytool.training.device import (
    choose_device,
    choose_forward,
    choose_memory_format,
    choose_precision,
    release_memory,
    seeded,
)
from studytool.training.evaluate import autocast, class_probabilities, convolutions
from studytool.training.features import CachedFeed, FeatureCache, find_cut
from studytool.training.inputs import Batches, Feed, part_of, shape_of
from studytool.training.kept import Kept
from studytool.training.loss import Loss, micro_batches
from studytool.training.meter import CostMeter
from studytool.training.metrics import score
from studytool.training.normalization import follow_statistics
from studytool.training.optim import Updater
from studytool.training.predictions import save_test_predictions
from studytool.training.preflight import check_compiler, check_data, check_last_batch

CHECK_EVERY = 50
"""Steps between two looks at the loss on a GPU, which has to be waited for; on a CPU every step is looked at."""


def train_trial(
    trial: TrialSpec,
    folder: Path,
    *,
    device: str | None = None,
    trials_side_by_side: int = 1,
    kept: Kept | None = None,
) -> Generator[EpochResult, None, None]:
    """Train a trial epoch by epoch in `folder`, from where it was stopped, and yield every epoch's result.

    All epochs are yielded, those that an earlier call has trained at once and unchanged, so that the caller sees the
    same curve whatever happened before. The last one has `is_last`; in the confirm phase it also has the scores of
    the selected weights on the test split, which nothing else ever reads.

    Args:
        trial: what to train, and on which data.
        folder: the trial's own; it gets `last.pt`, `best.safetensors` and `best.json`, each whole or not at all.
        device: "cpu", "cuda" or "cuda:N"; None takes a GPU where there is one.
        trials_side_by_side: how many trials share the device, for the cost.
        kept: what earlier trials of this process have opened and built, and where this one keeps it for later ones.

    Raises:
        DataError: the dataset cannot be read, or lacks a split, class or labels, or does not fit the trial's input.
        TrainingError: the loss is no longer finite, or the trial is impossible on this data or device.
        WeightsError: pre-trained weights are missing, or the folder's files are damaged or of another trial.
    """
    chosen = choose_device(device)
    import_backbone(trial.model.backbone)
    meter = CostMeter(chosen, trials_side_by_side=trials_side_by_side)
    run: _Run | None = None
    kept = kept or Kept(most_bytes=0)
    try:
        with meter.phase("data"):
            data = local_copy(trial.data_path, leave_out=trial.data_leave_out)
            dataset = kept.dataset(data, trial.data_split)
            check_data(trial, dataset)
            check_compiler(trial, chosen)
        with meter.phase("checkpoint"):
            state = load_last(folder, trial, dataset.fingerprint)
        if state is not None and state.finished:
            yield from state.epochs
            return
        run = _Run(trial, folder, dataset, chosen, meter, kept)
        if state is not None:
            run.resume(state)
        del state
        yield from run.results()
    finally:
        # One process trains one trial after another: nothing of this one may stay, but for what is in `kept`.
        del run
        release_memory(chosen, compiled=trial.train.is_compiled)


def import_backbone(name: str) -> None:
    """Import the network's code before the clock runs; else the first trial in a process would pay for all."""
    backbone = find_backbone(name)
    for entry in (backbone.build, backbone.split):
        registry.load(entry)


class _Run:
    """A trial under way: the network, its optimizer, its data, its results so far."""

    def __init__(
        self, trial: TrialSpec, folder: Path, dataset: Dataset, device: torch.device, meter: CostMeter, kept: Kept
    ) -> None:
        self.trial = trial
        self.folder = folder
        self.dataset = dataset
        self.device = device
        self.meter = meter
        self.epochs: list[EpochResult] = []
        self.precision = choose_precision(trial.train.precision, device)
        manifest = dataset.manifest
        with meter.phase("train"):
            self.model = kept.network(
                trial.model,
                num_classes=len(manifest.classes),
                volume_shape_dhw=manifest.shape_dhw,
                seed=trial.seed,
            )
            self.memory_format = choose_memory_format(trial.train.channels_last, self.model)
            self.model.to(device).to(memory_format=self.memory_format)
            cut = find_cut(self.model, device) if trial.cache == "auto" else None
            self.cache = cut and FeatureCache(
                self.model,
                cut,
                dataset,
                self.precision,
                self.memory_format,
                meter,
                at_once=trial.train.volumes_at_once,
            )
            rows = training_rows(dataset, trial.input, trial.seed)
            self.train_feed = self._feed(rows, training=True)
            follow_statistics(self.model, len(self.train_feed))
            self.loss = Loss(trial.train, dataset.labels[rows], len(manifest.classes), device)
            self.updater = Updater(
                self.model,
                trial.train,
                steps_per_epoch=len(self.train_feed),
                scale_gradients=self.precision == "float16",
            )
            check_last_batch(trial, self.model, volume_shape_dhw=manifest.shape_dhw, num_train=len(rows))
            self.forward = choose_forward(trial.train, self.model, device)

    def resume(self, state: TrialState) -> None:
        """Go on after the last epoch of `state`."""
        with self.meter.phase("checkpoint"):
            self.epochs = list(state.epochs)
            self.meter.spent = self.epochs[-1].cost
            self.model.load_state_dict(state.model)
            self.updater.load_state_dict(state.updater, len(self.epochs))
            # If the trial was stopped between writing last.pt and writing the selected weights, they are these.
            selected = self._selected()
            if selected is self.epochs[-1] and not trained.holds_epoch(self.folder, selected.epoch):
                trained.save_best(self.folder, self.updater.result, self._best_record())

    def results(self) -> Iterator[EpochResult]:
        """The results of all epochs, those before a resume first."""
        max_epochs = self.trial.train.max_epochs
        yield from self.epochs[: max_epochs - 1]
        while len(self.epochs) < max_epochs:
            self._epoch(len(self.epochs) + 1)
            if len(self.epochs) < max_epochs:
                yield self.epochs[-1]
        yield self._finish()

    def _epoch(self, epoch: int) -> None:
        train_loss = self._train(epoch)
        val = self._evaluate("val", epoch)
        value = val.metric(self.trial.metric.name)
        best = (epoch, value)
        if self.epochs and not self.trial.metric.sign * value > self.trial.metric.sign * self.epochs[-1].best_value:
            best = (self.epochs[-1].best_epoch, self.epochs[-1].best_value)
        steps = epoch * len(self.train_feed)
        self.epochs.append(
            EpochResult(
                epoch=epoch,
                steps=steps,
                train_loss=train_loss,
                learning_rate=self.updater.learning_rate(steps - 1),
                val=val,
                cost=self.meter.total(),
                best_epoch=best[0],
                best_value=best[1],
            )
        )
        with self.meter.phase("checkpoint"):
            state = TrialState(tuple(self.epochs), False, dict(self.model.state_dict()), self.updater.state_dict())
            save_last(self.folder, state, self.trial, self.dataset.fingerprint)
            if self._selected() is self.epochs[-1]:
                trained.save_best(self.folder, self.updater.result, self._best_record())

    def _train(self, epoch: int) -> float:
        """Train one epoch and return the mean loss of its batches."""
        steps = len(self.train_feed)
        losses = torch.zeros(steps, dtype=torch.float64, device=self.device)
        seed = derive_seed(self.trial.seed, "dropout", epoch)
        with self.meter.phase("train"), convolutions(repeatable=False), seeded(seed, self.device):
            # A step whose operations are counted runs uncompiled: in each epoch, so that a resume changes no bit.
            if self.updater.begin_epoch(epoch) or self.trial.train.is_compiled:
                self.meter.forget_steps()
            self.model.train()
            for i, (inputs, labels_B) in enumerate(self.train_feed.epoch(epoch)):
                losses[i] = self._add_gradients(inputs, labels_B)
                self.updater.step((epoch - 1) * steps + i)
                if self.device.type == "cpu" or i % CHECK_EVERY == CHECK_EVERY - 1 or i == steps - 1:
                    self._check_finite(losses[: i + 1], epoch)
        return float(losses.mean())

    def _add_gradients(self, inputs: Activations, labels_B: torch.Tensor) -> torch.Tensor:
        """Forward and backward pass of a batch, in parts where memory is short; gives the batch's mean loss."""
        train, losses = self.trial.train, []
        for part in micro_batches(len(labels_B), batch_size=train.batch_size, accumulate=train.accumulate):
            some = part_of(inputs, part)
            with self.meter.step("train", shape_of(some)) as counted:
                forward = self.model if counted else self.forward
                with autocast(self.device, self.precision):
                    logits_BC = forward(some, after=self.train_feed.after)
                    loss = self.loss.part(logits_BC, labels_B[part], labels_B)
                self.updater.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _check_finite(self, losses: torch.Tensor, epoch: int) -> None:
        if bool(losses.isfinite().all()):
            return
        i = int(losses.isfinite().logical_not().nonzero()[0])
        raise self._diverged(f"epoch {epoch}, step {i + 1}: the loss is {float(losses[i])}", epoch, i)

    def _diverged(self, what: str, epoch: int, i: int) -> TrainingError:
        rate = self.updater.learning_rate((epoch - 1) * len(self.train_feed) + i)
        remedies = ["lower learning_rate"]
        if self.trial.train.gradient_clip is None:
            remedies.append("set gradient_clip, for example to 1")
        if self.precision != "float32":
            remedies.append(f"set precision to float32 instead of {self.precision}")
        return TrainingError(f"{what} at learning rate {rate:.3g}; {' or '.join(remedies)}")

    def _evaluate(self, split: str, epoch: int) -> Scores:
        rows = self.dataset.rows(split)
        feed = self._feed(rows, training=False)
        probabilities = class_probabilities(self.updater.result, feed, self.precision, self.meter)
        with self.meter.phase("evaluate"):
            if not np.isfinite(probabilities).all():
                what = f"epoch {epoch}: the network's output on the {split} split is not finite"
                raise self._diverged(what, epoch, len(self.train_feed) - 1)
            labels = self.dataset.labels[rows]
            if split == "test":
                save_test_predictions(self.folder, probabilities, labels, rows)
            return score(probabilities, labels, len(self.dataset.manifest.classes))

    def _finish(self) -> EpochResult:
        """The last epoch's result, with the test scores in the confirm phase; after this nothing is left to do."""
        selected, test = self._selected(), None
        with self.meter.phase("checkpoint"):
            if not trained.holds_epoch(self.folder, selected.epoch):
                raise WeightsError(
                    f"{self.folder / trained.WEIGHTS} is damaged or not of epoch {selected.epoch}, which is selected; "
                    f"remove {self.folder} to train the trial again"
                )
            record = trained.read_best(self.folder)
        if self.trial.phase == "confirm":
            with self.meter.phase("checkpoint"):
                trained.load_best_weights(self.folder, record, self.updater.result)
            test = self._evaluate("test", selected.epoch)
            with self.meter.phase("checkpoint"):
                trained.save_record(self.folder, replace(record, result=replace(selected, test=test)))
        last = replace(self.epochs[-1], test=test, is_last=True, cost=self.meter.total())
        finished = TrialState((*self.epochs[:-1], last), True, {}, {})
        save_last(self.folder, finished, self.trial, self.dataset.fingerprint)
        # The generation before it, too, holds the results then, and no longer the optimizer's large state.
        repeat_last(self.folder)
        return last

    def _selected(self) -> EpochResult:
        """The epoch whose weights the trial stands for: the best one on the validation split, or the last one."""
        if self.trial.metric.select == "last":
            return self.epochs[-1]
        return self.epochs[self.epochs[-1].best_epoch - 1]

    def _best_record(self) -> trained.BestRecord:
        manifest = self.dataset.manifest
        return trained.BestRecord(
            trial=self.trial,
            classes=manifest.classes,
            volume_shape_dhw=manifest.shape_dhw,
            voxel_size_angstrom=manifest.voxel_size_angstrom,
            data_fingerprint=self.dataset.fingerprint,
            precision=self.precision,
            result=self._selected(),
            preparation=preparation_of(manifest),
        )

    def _feed(self, rows: NDArray[np.int64], *, training: bool) -> Batches:
        train = self.trial.train
        batch_size = train.batch_size if training else train.volumes_at_once
        if self.cache and self.cache.serves(rows, self.trial.input, training=training):
            return CachedFeed(
                self.cache, rows, self.trial.input, batch_size=batch_size, training=training, seed=self.trial.seed
            )
        return Feed(
            self.dataset,
            rows,
            self.trial.input,
            batch_size=batch_size,
            training=training,
            seed=self.trial.seed,
            device=self.device,
            memory_format=self.memory_format,
            meter=self.meter,
        )
