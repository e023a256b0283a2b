"""Many heads in one pass: trials that train nothing but a head, on the same frozen features, stepped as one batch.

Each has its own rows and their order, start, rate, decay, schedule, optimizer state, files and outcome, and gives what
`train_trial` gives for it alone, to 1e-5 in float32; either goes on from the other's files. What is done for all of
them at once (building the network, filling the cache, every step) is charged to them in equal parts.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from studytool.data.labels import Rows, training_rows
from studytool.data.stream import epoch_order
from studytool.errors import StudytoolError, TrainingError, WeightsError
from studytool.models.adapt import POOL, StagedModel, make_head
from studytool.models.anatomy import Activations
from studytool.models.build import depends_on_seed
from studytool.results import EpochResult, Scores
from studytool.spec import TrialSpec
from studytool.training.checkpoint import TrialState, load_last
from studytool.training.course import Course
from studytool.training.device import choose_device, release_memory, reuse_memory
from studytool.training.evaluate import class_probabilities
from studytool.training.inputs import view_of_epoch
from studytool.training.kept import Kept
from studytool.training.loss import Loss
from studytool.training.meter import CostMeter, Phase, Share, settle
from studytool.training.network import Network, build_network, import_backbone
from studytool.training.optim import Updater
from studytool.training.packs import may_train_together
from studytool.training.preflight import check_data
from studytool.training.stacked import Head, StackedHeads

_EVALUATED_AT_ONCE = 4096

Step = dict[str, EpochResult | StudytoolError]
"""What an epoch of every trial has given, by trial id: its result, or why the trial failed in it."""


def train_together(
    trials: Sequence[TrialSpec],
    folders: Sequence[Path],
    *,
    device: str | None = None,
    trials_side_by_side: int = 1,
    kept: Kept | None = None,
) -> Generator[Step, None, None]:
    """Train trials that may be trained together (see `may_train_together`), one epoch of all of them per step.

    All epochs are yielded as `train_trial` yields them, those trained before at once and unchanged; trials that were
    stopped earlier than others catch up. One that fails in an epoch is in that step with its error and in none after
    it; the others go on. `folders` are the trials' own, in their order; see `train_trial` for the rest.

    Raises:
        ValueError: two of the trials may not be trained together.
        DataError, WeightsError, OSError: as `train_trial`, where none of the trials could go on.
    """
    if not all(may_train_together(trials[0], trial) for trial in trials):
        raise ValueError(f"not to be trained together: {', '.join(trial.trial_id for trial in trials)}")
    chosen = choose_device(device)
    reuse_memory(trials[0].train.reuse_memory, chosen)
    import_backbone(trials[0].model.backbone)
    meter = CostMeter(chosen, trials_side_by_side=trials_side_by_side)
    pack: _Pack | None = None
    try:
        pack = _Pack(
            [_Member(trial, folder, Share(meter)) for trial, folder in zip(trials, folders, strict=True)],
            chosen,
            meter,
            kept or Kept(most_bytes=0),
        )
        for epoch in range(1, trials[0].train.max_epochs + 1):
            yield pack.step(epoch)
    finally:
        del pack
        release_memory(chosen)


@dataclass(frozen=True)
class _Training:
    """What trains one of the trials: `model` has the tensors of the `network`'s, but a head of its own."""

    network: Network
    model: StagedModel
    head: Head
    course: Course
    rows: Rows


@dataclass
class _Member:
    """One of the trials, and what it has given so far; one that has `ended` has no `training`."""

    trial: TrialSpec
    folder: Path
    share: Share
    training: _Training | None = None
    failure: StudytoolError | None = None
    ended: Sequence[EpochResult] = ()

    @property
    def epochs(self) -> Sequence[EpochResult]:
        return self.training.course.epochs if self.training else self.ended


class _Pack:
    """The trials under way: what they have in common, and the steps that they take together."""

    def __init__(self, members: Sequence[_Member], device: torch.device, meter: CostMeter, kept: Kept) -> None:
        self._kept = kept
        self._members = members
        self._device = device
        self._meter = meter
        self._networks: dict[int, Network] = {}
        self._held: dict[tuple[int, bytes], tuple[int | None, torch.Tensor, float]] = {}
        first = members[0].trial
        with meter.phase("data"):
            self._dataset = kept.dataset_of(first)
            check_data(first, self._dataset)
        states = [self._take_up(member) for member in members]
        settle(meter, [member.share for member in members if member.training])
        for member, state in zip(members, states, strict=True):
            if member.training and state:
                try:
                    member.training.course.resume(state)
                except WeightsError as error:
                    member.failure = error

    def step(self, epoch: int) -> Step:
        """What an epoch has given for all that have not failed before it."""
        there = [member for member in self._members if member.failure is None or epoch == 1]
        behind = [member for member in there if member.failure is None and len(member.epochs) < epoch]
        if behind:
            self._train(behind, epoch)
        return {member.trial.trial_id: member.failure or member.epochs[epoch - 1] for member in there}

    def _take_up(self, member: _Member) -> TrialState | None:
        """Make what trains a trial, unless it has ended; gives the state that its folder has."""
        trial, dataset, classes = member.trial, self._dataset, len(self._dataset.manifest.classes)
        try:
            with self._meter.phase("checkpoint"):
                state = load_last(member.folder, trial, dataset.fingerprint)
        except WeightsError as error:
            member.failure = error
            return None
        if state is not None and state.finished:
            member.ended = state.epochs
            return None
        with self._meter.phase("train"):
            network = self._network_for(trial)
            head = make_head(network.model.num_features, classes, trial.model.dropout, trial.seed).to(self._device)
            model = network.model.with_head(head)
            rows = training_rows(dataset, trial.input, trial.seed)
            loss = Loss(trial.train, dataset.labels[rows], classes, self._device)
            steps = -(-len(rows) // trial.train.batch_size)
            updater = Updater(model, trial.train, steps_per_epoch=steps, scale_gradients=False)
        course = Course(
            trial,
            member.folder,
            dataset,
            model,
            updater,
            member.share,
            network.precision,
            steps_per_epoch=steps,
            each_epoch=True,
        )
        linear = head.get_submodule("linear")
        assert isinstance(linear, nn.Linear)
        stacked = Head(linear, updater, loss, trial.train.gradient_clip)
        member.training = _Training(network, model, stacked, course, rows)
        return state

    def _network_for(self, trial: TrialSpec) -> Network:
        """The network of all; where a part of its frozen weights is drawn at random, that of trials with this seed."""
        for seed, network in self._networks.items():
            if seed == trial.seed or not depends_on_seed(network.model):
                return network
        network = build_network(trial, self._dataset, self._device, self._meter, self._kept, however_cheap=True)
        assert network.cache is not None
        assert network.cache.cut.after == POOL
        self._networks[trial.seed] = network
        return network

    def _train(self, members: Sequence[_Member], epoch: int) -> None:
        """Train and evaluate an epoch of these, and write what each of them writes."""
        trainings = [(member, member.training) for member in members if member.training]
        losses_SK = self._train_heads([training for _, training in trainings], epoch)
        self._share_features([training for _, training in trainings], "val")
        settle(self._meter, [member.share for member in members])
        for k, (member, training) in enumerate(trainings):
            course = training.course
            try:
                course.check_finite(losses_SK[:, k], epoch)
                course.add(float(losses_SK[:, k].mean()), self._evaluate(training, "val", epoch))
            except (TrainingError, WeightsError) as error:
                member.failure = error
        if epoch == members[0].trial.train.max_epochs:
            self._finish([member for member in members if member.failure is None])

    def _finish(self, members: Sequence[_Member]) -> None:
        """Write the selected weights of these and, in the confirm phase, score them on the test split."""
        trainings = [(member, member.training) for member in members if member.training]
        if members and members[0].trial.phase == "confirm":
            self._share_features([training for _, training in trainings], "test")
            settle(self._meter, [member.share for member in members])
        for member, training in trainings:
            try:
                training.course.finish(lambda selected, training=training: self._evaluate(training, "test", selected))  # type: ignore[misc]
            except (TrainingError, WeightsError) as error:
                member.failure = error

    def _share_features(self, trainings: Sequence[_Training], split: str) -> None:
        """Read the features of a split, which all of these are then scored on, before its cost is shared."""
        for training in trainings:
            self._features(training, self._dataset.rows(split), None, "evaluate")

    def _train_heads(self, trainings: Sequence[_Training], epoch: int) -> torch.Tensor:
        """Train an epoch; the losses [steps, K] of its batches, on the CPU."""
        first = trainings[0].course.trial
        size = min(first.train.batch_size, len(trainings[0].rows))
        with self._meter.phase("train"):
            features_NF, labels_N, order_KN = self._rows_of(trainings, epoch)
            starts = range(0, order_KN.shape[1], size)
            losses_SK = torch.zeros(len(starts), len(trainings), dtype=torch.float64, device=self._device)
            heads = StackedHeads(
                [training.head for training in trainings],
                trainings[0].network.precision,
                first_step=(epoch - 1) * len(starts),
                num_steps=len(starts),
            )
            for i, start in enumerate(starts):
                at_KB = order_KN[:, start : start + size]
                with self._meter.step("train", (at_KB.numel(), features_NF.shape[1])):
                    features_KBF = features_NF.index_select(0, at_KB.flatten()).view(*at_KB.shape, -1)
                    losses_SK[i] = heads.step(features_KBF, labels_N[at_KB])
            heads.give_back()
        return losses_SK.cpu()

    def _rows_of(self, trainings: Sequence[_Training], epoch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features [N, F] and labels [N] of all that is learned from, and every trial's order [K, rows] of its own."""
        view = view_of_epoch(trainings[0].course.trial.input, epoch)
        features: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        orders, begins, end = [], dict[tuple[int, bytes], int](), 0
        for training in trainings:
            key = _key(training, training.rows)
            if key not in begins:
                features.append(self._features(training, training.rows, view, "train"))
                labels.append(torch.from_numpy(self._dataset.labels[training.rows]))
                begins[key], end = end, end + len(training.rows)
            seed = training.course.trial.seed
            orders.append(begins[key] + epoch_order(len(training.rows), seed=seed, epoch=epoch))
            self._meter.cache_saved_seconds += self._held[key][2] * len(training.rows)
        order_KN = torch.from_numpy(np.stack(orders))
        return torch.cat(features), torch.cat(labels).to(self._device), order_KN.to(self._device)

    def _features(self, training: _Training, rows: Rows, view: int | None, phase: Phase) -> torch.Tensor:
        """Features [N, F] of rows on the device; of each rows one view is held."""
        key = _key(training, rows)
        if key not in self._held or self._held[key][0] != view:
            cache = training.network.cache
            assert cache is not None
            features_NF, saved_seconds = cache.all_at_once(rows, training.course.trial.input, view, phase)
            assert isinstance(features_NF, torch.Tensor)
            self._held[key] = (view, features_NF, saved_seconds)
        return self._held[key][1]

    def _evaluate(self, training: _Training, split: str, epoch: int) -> Scores:
        rows = self._dataset.rows(split)
        features_NF = self._features(training, rows, None, "evaluate")
        self._meter.cache_saved_seconds += self._held[_key(training, rows)][2] * len(rows)
        feed = _Held(features_NF, torch.from_numpy(self._dataset.labels[rows]).to(self._device))
        probabilities = class_probabilities(training.model, feed, training.network.precision, self._meter)
        return training.course.scores(split, probabilities, epoch)


class _Held:
    """The batches of features [N, F] that are on the device already, in their order."""

    after: str | None = POOL

    def __init__(self, features_NF: torch.Tensor, labels_N: torch.Tensor) -> None:
        self._parts = list(
            zip(torch.split(features_NF, _EVALUATED_AT_ONCE), torch.split(labels_N, _EVALUATED_AT_ONCE), strict=True)
        )

    def __len__(self) -> int:
        return len(self._parts)

    def epoch(self, _epoch: int) -> Iterator[tuple[Activations, torch.Tensor]]:
        """All of it."""
        yield from self._parts


def _key(training: _Training, rows: Rows) -> tuple[int, bytes]:
    return id(training.network), rows.tobytes()
