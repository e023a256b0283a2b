from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from studytool.settings import TrainSettings
from studytool.training.loss import Loss, balanced_weights, micro_batches, training_loss

CPU = torch.device("cpu")


def test_label_smoothing_by_hand():
    # Probabilities 0.8 and 0.2; smoothing 0.1 over two classes makes the label 0.95 and 0.05.
    logits = torch.tensor([[math.log(0.8), math.log(0.2)]])
    loss = training_loss(logits, torch.tensor([0]), TrainSettings(label_smoothing=0.1))
    assert float(loss) == pytest.approx(-(0.95 * math.log(0.8) + 0.05 * math.log(0.2)))


def test_balanced_weights_by_hand():
    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = balanced_weights(labels, 3)
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert float(weights[labels].mean()) == pytest.approx(1.0)
    assert balanced_weights(np.array([0, 1, 1, 0]), 2).tolist() == [1.0, 1.0]


def test_with_balanced_weights_each_class_counts_the_same():
    labels = torch.tensor([0, 0, 0, 1])
    logits = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    loss = Loss(TrainSettings(class_weights="balanced"), labels.numpy(), 2, CPU)
    right, wrong = (float(-torch.log_softmax(logits[0], 0)[label]) for label in (0, 1))
    assert float(loss.part(logits, labels, labels)) == pytest.approx((right + wrong) / 2)
    plain = Loss(TrainSettings(), labels.numpy(), 2, CPU)
    assert float(plain.part(logits, labels, labels)) == pytest.approx((3 * right + wrong) / 4)


@pytest.mark.parametrize("changes", [{}, {"class_weights": "balanced"}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("count", [1, 5, 12])
def test_the_parts_add_up_to_the_loss_and_gradient_of_the_batch(changes: dict[str, Any], count: int):
    generator = torch.Generator().manual_seed(0)
    settings = TrainSettings(**{"class_weights": "balanced", **changes})
    labels = torch.randint(3, (count,), generator=generator)
    loss = Loss(settings, np.array([0] * 5 + [1] * 2 + [2] * 9), 3, CPU)
    values = torch.randn((count, 3), generator=generator, dtype=torch.float64)
    whole, parts = values.clone().requires_grad_(), values.clone().requires_grad_()
    expected = loss.part(whole, labels, labels)
    expected.backward()
    pieces = [loss.part(parts[s], labels[s], labels) for s in micro_batches(count, batch_size=12, accumulate=5)]
    total = torch.stack(pieces).sum()
    total.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize(
    ("count", "accumulate", "sizes"),
    [(8, 1, [8]), (8, 2, [4, 4]), (5, 2, [2, 3]), (3, 2, [3]), (8, 3, [2, 3, 3]), (8, 8, [1] * 8), (2, 8, [1, 1])],
)
def test_parts_of_batches_of_8(count: int, accumulate: int, sizes: list[int]):
    parts = micro_batches(count, batch_size=8, accumulate=accumulate)
    assert [len(range(count)[part]) for part in parts] == sizes
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
