"""A network taken apart: an ordered list of stages, and how the last one's output becomes one feature vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from studytool.errors import SpecError
from studytool.models.backbones import Clip

Activations: TypeAlias = Tensor | list[Tensor]
"""What one stage hands to the next: a tensor, or one per pathway."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of a network in the order they run.

    `stages` begins with "stem"; each takes the output of the one before. `pool` turns the last output into features
    [B, `features`]. Parameters of `pool` (a last norm, say) belong to the backbone, not to the head.
    """

    stages: Mapping[str, nn.Module]
    pool: nn.Module
    features: int


class GlobalAverage(nn.Module):
    """The mean over every position, whatever the size."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C]."""
        return x.flatten(2).mean(2)


class TokenAverage(nn.Module):
    """The mean over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, C]."""
        return x.mean(1)


class FirstToken(nn.Module):
    """The class token, which stands before the others."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1 + N, C] -> [B, C]."""
        return x[:, 0]


def split_stages(stem: nn.Module, *stages: nn.Module) -> dict[str, nn.Module]:
    """Name stages: stem, stage1, stage2, …"""
    return {"stem": stem, **{f"stage{i}": stage for i, stage in enumerate(stages, start=1)}}


def split_children(network: object, clip_thw: Clip) -> Anatomy:
    """Take the user's own network apart: its children in order are the stem and the stages.

    Raises:
        SpecError: it is no module, has no children, or its children do not take one another's output.
    """
    own = getattr(network, "anatomy", network)
    if isinstance(own, Anatomy):
        return own
    if not isinstance(network, nn.Module):
        raise SpecError(f"the function of your backbone returned {type(network).__name__}, not a torch.nn.Module")
    children = list(network.children())
    if not children:
        raise SpecError(f"your backbone {type(network).__name__} has no children to be its stem and stages")
    stem, *later = children
    stages = split_stages(stem if list(stem.children()) else nn.Sequential(stem), *later)
    output = _dry_run(stages, clip_thw)
    pool = TokenAverage() if output.ndim == 3 else GlobalAverage() if output.ndim > 3 else nn.Identity()
    features = output.shape[-1] if output.ndim <= 3 else output.shape[1]
    return Anatomy(stages, pool, features)


def input_convolutions(stem: nn.Module, clip_thw: Clip) -> list[nn.Conv3d] | None:
    """The convolutions of three colours that take the clip itself, not what another layer made of it.

    They are those that meet one channel when the stem is run on a clip of one, which is repeated for them. None where
    the stem cannot be run like that, since something else in it needs three channels, too.
    """
    colour = [module for module in stem.modules() if isinstance(module, nn.Conv3d) and module.in_channels == 3]
    found: dict[nn.Conv3d, None] = {}

    def repeat_grey(convolution: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        # A weight that is computed from others cannot be summed; nor has one of several groups all of the colours.
        if not inputs or inputs[0].shape[1] != 1 or convolution.groups != 1 or "weight" not in convolution._parameters:
            return None
        found[convolution] = None
        return (inputs[0].expand(-1, 3, -1, -1, -1),)

    if not colour:
        return []
    hooks = [convolution.register_forward_pre_hook(repeat_grey) for convolution in colour]
    try:
        run_in_eval(stem, lambda: stem(torch.zeros(1, 1, *clip_thw)))
    except (RuntimeError, TypeError, ValueError):
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return list(found)


def run_in_eval(network: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """What `run` gives without a graph and with `network` in evaluation mode, whose modes are put back afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval()
        with torch.no_grad():
            return run()
    finally:
        for module, training in modes:
            module.training = training


def _dry_run(stages: Mapping[str, nn.Module], clip_thw: Clip) -> Tensor:
    chain = nn.ModuleList(stages.values())
    channels = 1 if input_convolutions(stages["stem"], clip_thw) == [] else 3

    def run() -> Tensor:
        x = torch.zeros(1, channels, *clip_thw)
        for name, stage in stages.items():
            try:
                x = stage(x)
            except (RuntimeError, TypeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise SpecError(
                    f"your backbone's {name} cannot take what the stage before it gives: {reason}"
                ) from error
        return x

    return run_in_eval(chain, run)
