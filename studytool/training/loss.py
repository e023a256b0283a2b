"""The loss, what each class counts in it, and the parts that a batch is computed in."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from studytool.settings import TrainSettings


class Loss:
    """The mean cross-entropy over a batch, as a sum over the parts that it is computed in.

    `labels` [N] are those of the training volumes; "balanced" class weights come from them (see `balanced_weights`).
    """

    def __init__(
        self, settings: TrainSettings, labels: NDArray[np.int64], num_classes: int, device: torch.device
    ) -> None:
        self._settings = settings
        self._num_classes = num_classes
        self._class_weights: torch.Tensor | None = None
        if settings.class_weights == "balanced":
            self._class_weights = balanced_weights(labels, num_classes).to(device)

    def part(self, logits_BC: torch.Tensor, labels_B: torch.Tensor, labels_of_batch: torch.Tensor) -> torch.Tensor:
        """What a part adds to the loss of its whole batch: the mean of the part times its share of the batch."""
        loss = training_loss(logits_BC, labels_B, self._settings, self._class_weights)
        if len(labels_B) == len(labels_of_batch):
            return loss
        if self._class_weights is None:
            return loss * (len(labels_B) / len(labels_of_batch))
        return loss * (self._class_weights[labels_B].sum() / self._class_weights[labels_of_batch].sum())

    def table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The same loss as a table [C, C] and the weights [C] of the classes, both float32.

        Row y says how much each class's -log probability counts for a volume of class y; the loss of a batch is the
        sum over its volumes, divided by that of their weights.
        """
        classes, smoothing = self._num_classes, self._settings.label_smoothing
        weights = torch.ones(classes, device=device) if self._class_weights is None else self._class_weights
        smoothed_CC = (1 - smoothing) * torch.eye(classes, device=device) + smoothing / classes
        return smoothed_CC * weights, weights


def training_loss(
    logits_BC: torch.Tensor,
    labels_B: torch.Tensor,
    settings: TrainSettings,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy (nats, in float32) against labels smoothed by `label_smoothing`.

    The mean over the batch, weighted by that of each volume's class where there are `class_weights` [C].
    """
    return nn.functional.cross_entropy(
        logits_BC.float(), labels_B, weight=class_weights, label_smoothing=settings.label_smoothing
    )


def balanced_weights(labels: NDArray[np.int64], num_classes: int) -> torch.Tensor:
    """Float32 [C]: N / (C n_c), so that every class counts the same and the mean over the volumes is 1."""
    counts = np.bincount(labels, minlength=num_classes)
    return torch.from_numpy(len(labels) / (num_classes * counts)).float()


def micro_batches(count: int, *, batch_size: int, accumulate: int) -> list[slice]:
    """The parts that a batch of `count` volumes is computed in, one gradient being added to the other.

    They are as even as can be and none has more than batch_size / accumulate volumes (rounded up), so that the smaller
    last batch of an epoch has fewer parts, not smaller ones.
    """
    largest = -(-batch_size // accumulate)
    parts = -(-count // largest)
    ends = [count * part // parts for part in range(parts + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]
