"""What a network says about volumes: the one way to it, for validation, test and prediction alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from studytool.training.device import DTYPES, Precision
from studytool.training.inputs import Batches, shape_of
from studytool.training.meter import CostMeter


def class_probabilities(model: nn.Module, feed: Batches, precision: Precision, meter: CostMeter) -> NDArray[np.float64]:
    """Class probabilities [N, C] of the feed's rows, in their order; the model is left in eval mode.

    The same weights, rows, batch size, precision and device give the same numbers to the last bit.
    """
    model.eval()
    logits: list[torch.Tensor] = []
    with meter.phase("evaluate"), convolutions(repeatable=True), torch.no_grad():
        for inputs, labels_B in feed.epoch(0):
            with meter.step("evaluate", shape_of(inputs)), autocast(labels_B.device, precision):
                logits_BC = model(inputs, after=feed.after)
            logits.append(logits_BC.double())
        probabilities: NDArray[np.float64] = torch.softmax(torch.cat(logits), dim=1).cpu().numpy()
    return probabilities


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The forward pass in mixed precision; plain float32 where that is the choice."""
    mixed = precision != "float32"
    return torch.autocast(device.type, dtype=DTYPES[precision] if mixed else None, enabled=mixed)


@contextmanager
def convolutions(*, repeatable: bool) -> Iterator[None]:
    """How cuDNN chooses its kernels within the block: the same ones always, or the fastest of a measurement."""
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark)
    cudnn.deterministic, cudnn.benchmark = repeatable, not repeatable
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
