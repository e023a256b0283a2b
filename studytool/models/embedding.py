"""What a network has learned to see: the features that its last linear layer reads."""

from __future__ import annotations

import torch
from torch import Tensor

from studytool.models.adapt import StagedModel


def embed(model: StagedModel, volumes_B1DHW: Tensor) -> Tensor:
    """Features [B, F], float32, of volumes [B, 1, D, H, W] as the network takes them (filtered and normalized).

    They are what the linear layer of the head reads, for every backbone: `model.head.linear(features)` are the logits.
    The network is in evaluation mode meanwhile and no graph is kept; afterwards its modes are as before.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model.features(volumes_B1DHW).float()
    finally:
        model.train(training)
