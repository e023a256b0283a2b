"""Optimizers, learning-rate schedules and updates."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it anyway; here it is done before a trial's clock runs
from torch import nn

from studytool import registry
from studytool.models.adapt import StagedModel
from studytool.models.freeze import frozen_parameters, parameter_groups, release
from studytool.settings import TrainSettings
from studytool.training.average import Average

Schedule = Callable[[float], float]
"""A function from the progress after warm-up, in [0, 1), to the factor on the learning rate, in [0, 1]."""


def build_optimizer(model: StagedModel, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer of what is trained in the first epoch; weight decay spares biases and normalizations.

    With `fused: auto` one kernel updates all tensors where torch has one.
    """
    kind = registry.lookup("optimizer", settings.optimizer, registry.OPTIMIZERS)
    fused = True if settings.fused == "auto" else None
    options = {"momentum": settings.momentum, "nesterov": settings.momentum > 0, "fused": fused}
    accepted = inspect.signature(kind).parameters
    optimizer: torch.optim.Optimizer = kind(
        parameter_groups(model, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay),
        **{name: value for name, value in options.items() if name in accepted},
    )
    return optimizer


def learning_rate_factor(settings: TrainSettings, step: int, steps_per_epoch: int) -> float:
    """The factor on the learning rate at optimizer step `step` (from 0): a pure function of the trial's length.

    It rises linearly over the warm-up, the first step having 1 / warm-up steps, then follows the schedule.
    """
    total = settings.max_epochs * steps_per_epoch
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    schedule: Schedule = registry.lookup("schedule", settings.schedule, registry.SCHEDULES)
    return schedule((step - warmup) / max(1, total - warmup))


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter, arXiv 1608.03983, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def multistep(progress: float) -> float:
    """1, from half of the training on 0.1, from three quarters on 0.01."""
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


def constant(progress: float) -> float:
    """1, whatever the progress."""
    del progress
    return 1.0


class Updater:
    """Turns losses into updates: gradients (scaled for float16), clipping, the schedule's learning rate, freezing.

    `optimizer` is torch's own. `result` is the network that the trial is judged by and that is kept: `model`, or with
    `ema` its average.
    """

    def __init__(
        self, model: StagedModel, settings: TrainSettings, *, steps_per_epoch: int, scale_gradients: bool
    ) -> None:
        self._model = model
        self._settings = settings
        self._steps_per_epoch = steps_per_epoch
        self.optimizer = build_optimizer(model, settings)
        device = next(model.parameters()).device
        self._scaler = torch.amp.GradScaler(device.type, enabled=scale_gradients)
        self._average = None if settings.ema is None else Average(model, settings.ema)
        self.result: nn.Module = model if self._average is None else self._average.model

    def learning_rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0 over the whole trial; that of the head."""
        return self._settings.learning_rate * learning_rate_factor(self._settings, step, self._steps_per_epoch)

    def begin_epoch(self, epoch: int) -> bool:
        """Release what gradual freezing trains from this epoch (from 1) on; whether there is anything new."""
        parts = release(self._model, epoch)
        rate, decay = self._settings.learning_rate, self._settings.weight_decay
        if parts:
            for group in parameter_groups(self._model, learning_rate=rate, weight_decay=decay, parts=parts):
                self.optimizer.add_param_group(group)
        return bool(parts)

    def update(self, loss: torch.Tensor, step: int) -> None:
        """Backward pass and parameter update of optimizer step `step`."""
        self.backward(loss)
        self.step(step)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass; gradients of several losses add up until the next step."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, step: int) -> None:
        """Parameter update of optimizer step `step` by the gradients since the last one."""
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        if self._settings.gradient_clip is not None:
            self._scaler.unscale_(self.optimizer)
            trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(trained, self._settings.gradient_clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update(self._model, step)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed trial needs, as tensors, numbers and strings."""
        average = {} if self._average is None else self._average.model.state_dict()
        frozen = frozen_parameters(self._model)
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": {name: mean for name, mean in average.items() if name not in frozen},
        }

    def load_state_dict(self, state: dict[str, Any], epochs: int) -> None:
        """Go on from the `state_dict` of the same model and settings after so many epochs."""
        for epoch in range(1, epochs + 1):
            # Groups are known by their place, so they have to come in the order in which they first came.
            self.begin_epoch(epoch)
        self.optimizer.load_state_dict(state["optimizer"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.model.load_state_dict(state["average"], strict=False)
