"""One trial: `train_trial` walks through its epochs and yields a result for each.

It knows nothing of Ray or MLflow. Whoever drives it (Ray Tune, the command line, a test) decides when to stop, by not
asking for the next epoch. On a CPU a trial is a pure function of its TrialSpec and its dataset, to the last bit,
however often it was stopped and resumed: the epoch order, augmentation and dropout of an epoch depend on (seed, epoch)
alone, and the learning rate on the step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from studytool.data.labels import training_rows
from studytool.data.shards import Dataset
from studytool.models.anatomy import Activations
from studytool.results import EpochResult, Scores
from studytool.seeds import derive_seed
from studytool.spec import TrialSpec
from studytool.training.checkpoint import load_last
from studytool.training.course import Course
from studytool.training.device import (
    choose_device,
    choose_forward,
    release_memory,
    reuse_memory,
    seeded,
)
from studytool.training.evaluate import autocast, class_probabilities, convolutions
from studytool.training.features import CachedFeed
from studytool.training.inputs import Batches, Feed, part_of, shape_of
from studytool.training.kept import Kept
from studytool.training.loss import Loss, micro_batches
from studytool.training.meter import CostMeter
from studytool.training.network import build_network, import_backbone
from studytool.training.normalization import follow_statistics
from studytool.training.optim import Updater
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
    on_saved: Callable[[], None] | None = None,
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
        on_saved: called when `last.pt` was written before the end, for example to copy it; no part of the cost.

    Raises:
        DataError: the dataset cannot be read, or lacks a split, class or labels, or does not fit the trial's input.
        TrainingError: the loss is no longer finite, or the trial is impossible on this data or device.
        WeightsError: pre-trained weights are missing, or the folder's files are damaged or of another trial.
    """
    chosen = choose_device(device)
    reuse_memory(trial.train.reuse_memory, chosen)
    import_backbone(trial.model.backbone)
    meter = CostMeter(chosen, trials_side_by_side=trials_side_by_side)
    run: _Run | None = None
    kept = kept or Kept(most_bytes=0)
    try:
        with meter.phase("data"):
            dataset = kept.dataset_of(trial)
            check_data(trial, dataset)
            check_compiler(trial, chosen)
        with meter.phase("checkpoint"):
            state = load_last(folder, trial, dataset.fingerprint)
        if state is not None and state.finished:
            yield from state.epochs
            return
        run = _Run(trial, folder, dataset, chosen, meter, kept, on_saved)
        if state is not None:
            run.course.resume(state)
        del state
        yield from run.results()
    finally:
        # One process trains one trial after another: nothing of this one may stay, but for what is in `kept`.
        del run
        release_memory(chosen, compiled=trial.train.is_compiled)


class _Run:
    """A trial under way: the network, its optimizer, its data, its results so far."""

    def __init__(
        self,
        trial: TrialSpec,
        folder: Path,
        dataset: Dataset,
        device: torch.device,
        meter: CostMeter,
        kept: Kept,
        on_saved: Callable[[], None] | None,
    ) -> None:
        self.trial = trial
        self.dataset = dataset
        self.device = device
        self.meter = meter
        manifest = dataset.manifest
        with meter.phase("train"):
            self.network = build_network(trial, dataset, device, meter, kept)
            self.model = self.network.model
            rows = training_rows(dataset, trial.input, trial.seed)
            self.train_feed = self._feed(rows, training=True)
            follow_statistics(self.model, len(self.train_feed))
            self.loss = Loss(trial.train, dataset.labels[rows], len(manifest.classes), device)
            self.updater = Updater(
                self.model,
                trial.train,
                steps_per_epoch=len(self.train_feed),
                scale_gradients=self.network.precision == "float16",
            )
            check_last_batch(trial, self.model, volume_shape_dhw=manifest.shape_dhw, num_train=len(rows))
            self.forward = choose_forward(trial.train, self.model, device)
        self.course = Course(
            trial,
            folder,
            dataset,
            self.model,
            self.updater,
            meter,
            self.network.precision,
            steps_per_epoch=len(self.train_feed),
            on_saved=on_saved,
        )

    def results(self) -> Iterator[EpochResult]:
        """The results of all epochs, those before a resume first."""
        course, max_epochs = self.course, self.trial.train.max_epochs
        yield from course.epochs[: max_epochs - 1]
        while len(course.epochs) < max_epochs:
            epoch = len(course.epochs) + 1
            course.add(self._train(epoch), self._evaluate("val", epoch))
            if epoch < max_epochs:
                yield course.epochs[-1]
        yield course.finish(lambda selected: self._evaluate("test", selected))

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
                    self.course.check_finite(losses[: i + 1], epoch)
        return float(losses.mean())

    def _add_gradients(self, inputs: Activations, labels_B: torch.Tensor) -> torch.Tensor:
        """Forward and backward pass of a batch, in parts where memory is short; gives the batch's mean loss."""
        train, losses = self.trial.train, []
        for part in micro_batches(len(labels_B), batch_size=train.batch_size, accumulate=train.accumulate):
            some = part_of(inputs, part)
            with self.meter.step("train", shape_of(some)) as counted:
                forward = self.model if counted else self.forward
                with autocast(self.device, self.network.precision):
                    logits_BC = forward(some, after=self.train_feed.after)
                    loss = self.loss.part(logits_BC, labels_B[part], labels_B)
                self.updater.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _evaluate(self, split: str, epoch: int) -> Scores:
        feed = self._feed(self.dataset.rows(split), training=False)
        probabilities = class_probabilities(self.updater.result, feed, self.network.precision, self.meter)
        return self.course.scores(split, probabilities, epoch)

    def _feed(self, rows: NDArray[np.int64], *, training: bool) -> Batches:
        train = self.trial.train
        batch_size = train.batch_size if training else train.volumes_at_once
        cache = self.network.cache
        if cache and cache.serves(rows, self.trial.input, training=training):
            return CachedFeed(
                cache, rows, self.trial.input, batch_size=batch_size, training=training, seed=self.trial.seed
            )
        return Feed(
            self.dataset,
            rows,
            self.trial.input,
            batch_size=batch_size,
            training=training,
            seed=self.trial.seed,
            device=self.device,
            memory_format=self.network.memory_format,
            meter=self.meter,
        )
