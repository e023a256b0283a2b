"""A trial on its way, however it is trained: its results so far, its files, and what is written when an epoch ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from studytool.data.preparation import preparation_of
from studytool.data.shards import Dataset
from studytool.errors import TrainingError
from studytool.models.adapt import StagedModel
from studytool.models.freeze import frozen_parameters
from studytool.results import EpochResult, Scores
from studytool.spec import TrialSpec
from studytool.training import trained
from studytool.training.checkpoint import (
    TrialState,
    fingerprint,
    repeat_last,
    restore_model,
    save_last,
)
from studytool.training.cost import CHECKPOINT_SHARE, MOST_SECONDS_UNSAVED
from studytool.training.device import Precision
from studytool.training.meter import CostMeter, Share
from studytool.training.metrics import score
from studytool.training.optim import Updater
from studytool.training.predictions import save_test_predictions

_BYTES_WRITTEN_PER_SECOND = 300e6
"""What a disk is taken for until a checkpoint has been written to it."""
_STATES = 3
"""An optimizer keeps about twice as much for what is trained as that itself."""


class Course:
    """Takes what each epoch has given, writes `last.pt` when that is due, and at last the selected weights.

    With `each_epoch` it is due whatever the trial says: somebody else stops it, and has it go on elsewhere. `on_saved`
    is called then; what it takes counts as writing, but is no cost.
    """

    def __init__(
        self,
        trial: TrialSpec,
        folder: Path,
        dataset: Dataset,
        model: StagedModel,
        updater: Updater,
        meter: CostMeter | Share,
        precision: Precision,
        *,
        steps_per_epoch: int,
        each_epoch: bool = False,
        on_saved: Callable[[], None] | None = None,
    ) -> None:
        self.trial = trial
        self.epochs: list[EpochResult] = []
        self._folder = folder
        self._dataset = dataset
        self._model = model
        self._updater = updater
        self._meter = meter
        self._precision = precision
        self._steps_per_epoch = steps_per_epoch
        self._frozen = frozen_parameters(model)
        self._fingerprint: str | None = None
        self._weights_selected: dict[str, torch.Tensor] = {}
        self._on_saved = on_saved
        self._each_epoch = each_epoch or trial.train.checkpoints == "each_epoch"
        self._saved_at = time.perf_counter()
        trained_bytes = sum(p.nbytes for name, p in model.named_parameters() if name not in self._frozen)
        self._seconds_to_save = _STATES * trained_bytes / _BYTES_WRITTEN_PER_SECOND

    def resume(self, state: TrialState) -> None:
        """Go on after the last epoch of `state`."""
        with self._meter.phase("checkpoint"):
            self.epochs = list(state.epochs)
            self._meter.go_on_from(self.epochs[-1].cost)
            restore_model(self._model, state, self._folder)
            self._updater.load_state_dict(state.updater, len(self.epochs))
            self._weights_selected = state.selected or self._weights()
        self._saved_at = time.perf_counter()

    def add(self, train_loss: float, val: Scores) -> None:
        """Take the next epoch, and write what a resume needs if that is due; after the last one `finish` does."""
        epoch, metric = len(self.epochs) + 1, self.trial.metric
        value = val.metric(metric.name)
        best = (epoch, value)
        if self.epochs and not metric.sign * value > metric.sign * self.epochs[-1].best_value:
            best = (self.epochs[-1].best_epoch, self.epochs[-1].best_value)
        steps = epoch * self._steps_per_epoch
        self.epochs.append(
            EpochResult(
                epoch=epoch,
                steps=steps,
                train_loss=train_loss,
                learning_rate=self._updater.learning_rate(steps - 1),
                val=val,
                cost=self._meter.total(),
                best_epoch=best[0],
                best_value=best[1],
            )
        )
        with self._meter.phase("checkpoint"):
            if self._selected() is self.epochs[-1]:
                self._weights_selected = self._weights()
        since = time.perf_counter() - self._saved_at
        is_worth_it = self._seconds_to_save <= CHECKPOINT_SHARE * since or since >= MOST_SECONDS_UNSAVED
        if epoch < self.trial.train.max_epochs and (self._each_epoch or is_worth_it):
            self._save()

    def _save(self) -> None:
        begun = time.perf_counter()
        with self._meter.phase("checkpoint"):
            save_last(self._folder, self._state(), self.trial, self._dataset.fingerprint)
        if self._on_saved is not None:
            self._on_saved()
        self._saved_at = time.perf_counter()
        self._seconds_to_save = self._saved_at - begun

    def finish(self, scores_on_test: Callable[[int], Scores]) -> EpochResult:
        """The last epoch's result; after this nothing is left to do.

        Now the selected weights are written, whole; in the confirm phase `scores_on_test` is asked for theirs.
        """
        selected, test = self._selected(), None
        with self._meter.phase("checkpoint"):
            self._updater.result.load_state_dict(self._weights_selected, strict=False)
            record = trained.save_best(self._folder, self._updater.result, self._best_record())
        if self.trial.phase == "confirm":
            test = scores_on_test(selected.epoch)
            with self._meter.phase("checkpoint"):
                trained.save_record(self._folder, replace(record, result=replace(selected, test=test)))
        cost = self._meter.total()
        cost = replace(cost, ending_device_seconds=cost.device_seconds - self.epochs[-1].cost.device_seconds)
        last = replace(self.epochs[-1], test=test, is_last=True, cost=cost)
        finished = TrialState((*self.epochs[:-1], last), True, {}, {})
        save_last(self._folder, finished, self.trial, self._dataset.fingerprint)
        # The generation before it, too, holds the results then, and no longer the optimizer's large state.
        repeat_last(self._folder)
        self.epochs[-1] = last
        return last

    def scores(self, split: str, probabilities: NDArray[np.float64], epoch: int) -> Scores:
        """How good the probabilities are for the rows of a split; those for the test split are kept.

        Raises:
            TrainingError: they are not finite.
        """
        with self._meter.phase("evaluate"):
            if not np.isfinite(probabilities).all():
                what = f"epoch {epoch}: the network's output on the {split} split is not finite"
                raise self._diverged(what, epoch, self._steps_per_epoch - 1)
            rows = self._dataset.rows(split)
            labels = self._dataset.labels[rows]
            if split == "test":
                save_test_predictions(self._folder, probabilities, labels, rows)
            return score(probabilities, labels, len(self._dataset.manifest.classes))

    def check_finite(self, losses: torch.Tensor, epoch: int) -> None:
        """Check the losses of the first steps of an epoch (TrainingError with what may help)."""
        if bool(losses.isfinite().all()):
            return
        i = int(losses.isfinite().logical_not().nonzero()[0])
        raise self._diverged(f"epoch {epoch}, step {i + 1}: the loss is {float(losses[i])}", epoch, i)

    def _diverged(self, what: str, epoch: int, i: int) -> TrainingError:
        rate = self._updater.learning_rate((epoch - 1) * self._steps_per_epoch + i)
        remedies = ["lower learning_rate"]
        if self.trial.train.gradient_clip is None:
            remedies.append("set gradient_clip, for example to 1")
        if self._precision != "float32":
            remedies.append(f"set precision to float32 instead of {self._precision}")
        return TrainingError(f"{what} at learning rate {rate:.3g}; {' or '.join(remedies)}")

    def _state(self) -> TrialState:
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._model, self._frozen)
        selected = {} if self._selected() is self.epochs[-1] else self._weights_selected
        model = {name: tensor for name, tensor in self._model.state_dict().items() if name not in self._frozen}
        return TrialState(tuple(self.epochs), False, model, self._updater.state_dict(), selected, self._fingerprint)

    def _weights(self) -> dict[str, torch.Tensor]:
        """What the trial would be judged by now, copied; without what is frozen."""
        state = self._updater.result.state_dict()
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if name not in self._frozen}

    def _selected(self) -> EpochResult:
        """The epoch whose weights the trial stands for: the best one on the validation split, or the last one."""
        if self.trial.metric.select == "last":
            return self.epochs[-1]
        return self.epochs[self.epochs[-1].best_epoch - 1]

    def _best_record(self) -> trained.BestRecord:
        manifest = self._dataset.manifest
        return trained.BestRecord(
            trial=self.trial,
            classes=manifest.classes,
            volume_shape_dhw=manifest.shape_dhw,
            voxel_size_angstrom=manifest.voxel_size_angstrom,
            data_fingerprint=self._dataset.fingerprint,
            precision=self._precision,
            result=self._selected(),
            preparation=preparation_of(manifest),
        )
