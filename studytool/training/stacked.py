"""The linear heads of several trials, side by side in one tensor, trained by one batched step.

Axis K is that of the trials. The gradient of cross-entropy through a linear layer is written out, and so are torch's
rules of update, with a rate, a decay and a momentum per trial; `tests/training/test_together.py` compares both with
torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from studytool.training.device import DTYPES, Precision
from studytool.training.loss import Loss
from studytool.training.optim import Updater


@dataclass(frozen=True)
class Head:
    """One trial's: its layer, what updates it when it is trained alone, and its loss."""

    linear: nn.Linear
    updater: Updater
    loss: Loss
    gradient_clip: float | None


class StackedHeads:
    """Heads of the same shape and kind of optimizer, from their state now until `give_back`.

    `first_step` (from 0) is the next optimizer step of all, `num_steps` how many there will be at most.
    """

    def __init__(self, heads: Sequence[Head], precision: Precision, *, first_step: int, num_steps: int) -> None:
        self._heads = heads
        self._dtype = DTYPES[precision]
        self._first_step = self._step = first_step
        device = heads[0].linear.weight.device
        tables = [head.loss.table(device) for head in heads]
        self._table_KCC = torch.stack([table for table, _ in tables])
        self._class_weights_KC = torch.stack([weights for _, weights in tables])
        self._rows_K1 = torch.arange(len(heads), device=device)[:, None]
        steps = range(first_step, first_step + num_steps)
        rates = [[head.updater.learning_rate(step) for head in heads] for step in steps]
        self._rates_SK = torch.tensor(rates, device=device)
        clips = [head.gradient_clip for head in heads]
        self._clip_K = None
        if any(clip is not None for clip in clips):
            self._clip_K = torch.tensor([math.inf if clip is None else clip for clip in clips], device=device)
        self._weights = _Stack([(head.linear.weight, head.updater.optimizer) for head in heads])
        self._biases = _Stack([(head.linear.bias, head.updater.optimizer) for head in heads])

    def step(self, features_KBF: torch.Tensor, labels_KB: torch.Tensor) -> torch.Tensor:
        """Train every head on a batch of its own; the losses [K] before, in nats."""
        features_KBF = features_KBF.to(self._dtype)
        weights_KCF, biases_KC = self._weights.values.to(self._dtype), self._biases.values.to(self._dtype)
        logits_KBC = torch.baddbmm(biases_KC[:, None], features_KBF, weights_KCF.transpose(1, 2))
        log_probabilities_KBC = torch.log_softmax(logits_KBC.float(), dim=2)
        counted_KBC = self._table_KCC[self._rows_K1, labels_KB]
        total_K = self._class_weights_KC.gather(1, labels_KB).sum(1)
        losses_K = -(counted_KBC * log_probabilities_KBC).sum((1, 2)) / total_K
        residuals_KBC = log_probabilities_KBC.exp() * counted_KBC.sum(2, keepdim=True) - counted_KBC
        slopes_KBC = (residuals_KBC / total_K[:, None, None]).to(self._dtype)
        gradients = [torch.bmm(slopes_KBC.transpose(1, 2), features_KBF).float(), slopes_KBC.sum(1).float()]
        if self._clip_K is not None:
            norm_K = sum(gradient.flatten(1).square().sum(1) for gradient in gradients).sqrt()  # type: ignore[union-attr]
            factor_K = (self._clip_K / (norm_K + 1e-6)).clamp(max=1.0)  # as nn.utils.clip_grad_norm_ has it
            gradients = [gradient * _beside(factor_K, gradient) for gradient in gradients]
        rates_K = self._rates_SK[self._step - self._first_step]
        self._step += 1
        for stack, gradient in zip((self._weights, self._biases), gradients, strict=True):
            stack.update(gradient, rates_K, self._step)
        return losses_K

    def give_back(self) -> None:
        """Put weights and optimizer states where a trial that is trained alone has them."""
        for stack in (self._weights, self._biases):
            stack.give_back(self._step)
        for head in self._heads:
            for group in head.updater.optimizer.param_groups:
                group["lr"] = head.updater.learning_rate(self._step - 1) * group["lr_scale"]


class _Stack:
    """One tensor of every trial, [K, ...], with what its optimizer remembers."""

    def __init__(self, owned: Sequence[tuple[torch.Tensor, torch.optim.Optimizer]]) -> None:
        self._owned = owned
        self._groups = [_group_of(parameter, optimizer) for parameter, optimizer in owned]
        self._rule, names = _RULES[type(owned[0][1])]
        self.values = torch.stack([parameter.detach() for parameter, _ in owned])
        self.memory = {name: torch.stack([_remembered(o.state, p, name) for p, o in owned]) for name in names}
        self.group = self._groups[0]
        self.decay, self.momentum = self._each("weight_decay"), self._each("momentum")

    def update(self, gradients: torch.Tensor, rates_K: torch.Tensor, count: int) -> None:
        """The update number `count`, from 1."""
        self._rule(self, gradients, _beside(rates_K, self.values), count)

    def _each(self, name: str) -> torch.Tensor | None:
        """A setting of every trial's, shaped for `values`; None where it is 0 for all."""
        values = [group.get(name, 0.0) for group in self._groups]
        return _beside(torch.tensor(values, device=self.values.device), self.values) if any(values) else None

    def give_back(self, count: int) -> None:
        """Give every trial its own again, after so many updates."""
        for k, (parameter, optimizer) in enumerate(self._owned):
            with torch.no_grad():
                parameter.copy_(self.values[k])
            memory = {name: kept[k].clone() for name, kept in self.memory.items()}
            if "betas" in self._groups[k]:
                memory = {"step": torch.tensor(float(count), device=parameter.device), **memory}
            elif not self._groups[k]["momentum"]:
                memory = {}
            if memory:
                optimizer.state[parameter] = memory


def _adamw(stack: _Stack, gradients: torch.Tensor, rates: torch.Tensor, count: int) -> None:
    if stack.decay is not None:
        stack.values.mul_(1 - rates * stack.decay)
    _follow(stack, gradients, rates, count)


def _adam(stack: _Stack, gradients: torch.Tensor, rates: torch.Tensor, count: int) -> None:
    if stack.decay is not None:
        gradients = gradients + stack.decay * stack.values
    _follow(stack, gradients, rates, count)


def _follow(stack: _Stack, gradients: torch.Tensor, rates: torch.Tensor, count: int) -> None:
    (beta1, beta2), mean, square = stack.group["betas"], stack.memory["exp_avg"], stack.memory["exp_avg_sq"]
    mean.lerp_(gradients, 1 - beta1)
    square.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    scale = square.sqrt().div_(math.sqrt(1 - beta2**count)).add_(stack.group["eps"])
    stack.values.addcmul_(mean / scale, rates, value=-1 / (1 - beta1**count))


def _sgd(stack: _Stack, gradients: torch.Tensor, rates: torch.Tensor, _count: int) -> None:
    if stack.decay is not None:
        gradients = gradients + stack.decay * stack.values
    if stack.momentum is not None:  # Nesterov's; torch begins with the first gradient: the same as from nothing
        momentum = stack.memory["momentum_buffer"].mul_(stack.momentum).add_(gradients)
        gradients = gradients + stack.momentum * momentum
    stack.values.sub_(rates * gradients)


Rule = Callable[[_Stack, torch.Tensor, torch.Tensor, int], None]
_RULES: dict[type[torch.optim.Optimizer], tuple[Rule, tuple[str, ...]]] = {
    torch.optim.AdamW: (_adamw, ("exp_avg", "exp_avg_sq")),
    torch.optim.Adam: (_adam, ("exp_avg", "exp_avg_sq")),
    torch.optim.SGD: (_sgd, ("momentum_buffer",)),
}


def _group_of(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(parameter is one for one in group["params"]))


def _remembered(state: Any, parameter: torch.Tensor, name: str) -> torch.Tensor:
    kept: torch.Tensor | None = state[parameter].get(name) if parameter in state else None
    return torch.zeros_like(parameter) if kept is None else kept


def _beside(numbers_K: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
    """Numbers [K], shaped to be multiplied with a stack [K, ...]."""
    return numbers_K.view(-1, *[1] * (stack.ndim - 1))
