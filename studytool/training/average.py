"""The exponential moving average of a network's weights, which is often better than the weights themselves."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """A copy of a network whose weights, and running means and variances, follow the network's slowly.

    After optimizer step t (from 0) average = d average + (1 - d) weights, with d the smaller of `decay` and
    (1 + t) / (10 + t): a short training, too, forgets its random start. What is counted in whole numbers is copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        now = model.state_dict()
        pairs = [(mean, now[name]) for name, mean in self.model.state_dict().items()]
        follow = [(mean, value) for mean, value in pairs if mean.is_floating_point()]
        average = get_ema_multi_avg_fn(min(self._decay, (1 + step) / (10 + step)))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            average([mean for mean, _ in follow], [value for _, value in follow], None)
            for mean, value in pairs:
                if not mean.is_floating_point():
                    mean.copy_(value)
