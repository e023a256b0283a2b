"""The adapted network: a grey volume goes in, stage after stage, and the study's own head comes last."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from studytool.errors import DataError, SpecError
from studytool.models.anatomy import Activations, Anatomy, input_convolutions
from studytool.models.backbones import Backbone, Clip
from studytool.models.initialize import LoadReport
from studytool.seeds import derive_seed

POOL = "pool"
# Cyclic, so that no choice of the time axis mirrors the molecule.
_AXES = {"z": (0, 1, 2), "y": (1, 2, 0), "x": (2, 0, 1)}


@dataclass(frozen=True)
class Freezing:
    """A freeze point or rule, and the numbers that rules have: epochs between releases, and a factor per stage."""

    rule: str
    gradual_epochs: int
    layer_decay: float


class StagedModel(nn.Module):
    """A backbone as an ordered list of stages, then pooling, then a head.

    `stages` ("stem", "stage1", …) and `pool` are the parts; `head` is dropout and one linear layer. Leading parts
    without a trained parameter (see `studytool.models.freeze`) run without a graph. A part that is frozen is always in
    evaluation mode, whatever `.train()` says; only its batch normalization follows `frozen_batchnorm`. `description`
    says in plain data how the network was made, `load_report` what was loaded into it.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        framing: Framing,
        head: nn.Module,
        *,
        freezing: Freezing,
        frozen_batchnorm: str,
        description: dict[str, Any],
    ) -> None:
        super().__init__()
        self.framing = framing
        self.stages = nn.ModuleDict(anatomy.stages)
        self.pool = anatomy.pool
        self.head = head
        self.num_features = anatomy.features
        self.freezing = freezing
        self.frozen_batchnorm = frozen_batchnorm
        self.description = description
        self.frozen_parts: tuple[str, ...] = ()
        self.load_report = LoadReport("random")

    def forward(self, x: Activations, after: str | None = None) -> Tensor:
        """Logits [B, classes] of volumes [B, 1, D, H, W] as the dataset has them, or of activations `after` a part."""
        if after is None:
            assert isinstance(x, Tensor)
            return self.forward_suffix(self.forward_prefix(x, self.frozen_prefix), self.frozen_prefix)
        return self.forward_suffix(x, after)

    def features(self, volumes_B1DHW: Tensor) -> Tensor:
        """Features [B, num_features], before the head."""
        features = self.forward_prefix(volumes_B1DHW, POOL)
        assert isinstance(features, Tensor)
        return features

    def forward_prefix(self, volumes_B1DHW: Tensor, upto: str | None) -> Activations:
        """Run up to and with the part `upto` ("stem", …, "pool"); None only frames the volumes."""
        activations: Activations = self._run(self.framing(volumes_B1DHW.to(self._dtype)), None, upto)
        return activations

    def forward_suffix(self, activations: Activations, after: str | None) -> Tensor:
        """Logits [B, classes] from what `forward_prefix` gave for the part `after`."""
        logits: Tensor = self.head(self._run(activations, after, POOL))
        return logits

    def with_head(self, head: nn.Module) -> StagedModel:
        """The same network, with the very tensors of this one, and another head."""
        twin = copy.copy(self)
        twin._modules = {**self._modules, "head": head}
        return twin

    @property
    def anatomy(self) -> Anatomy:
        """The network without framing and head."""
        return Anatomy(dict(self.stages.items()), self.pool, self.num_features)

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts in the order they run: the stages, then "pool"."""
        return (*self.stages, POOL)

    def part(self, name: str) -> nn.Module:
        """A stage, or the pool, by name (KeyError)."""
        return self.pool if name == POOL else self.stages[name]

    @property
    def frozen_prefix(self) -> str | None:
        """The last of the leading parts that are frozen, None where the first one learns."""
        prefix = None
        for name in self.part_names:
            if name not in self.frozen_parts:
                break
            prefix = name
        return prefix

    @property
    def prefix_is_constant(self) -> bool:
        """Whether the frozen prefix gives the same for the same volume in every epoch, so that it can be kept."""
        return self.frozen_prefix is not None and self.frozen_batchnorm == "eval"

    def note_frozen(self) -> None:
        """Find out anew which parts are frozen; to be called after `requires_grad` of parameters has changed."""
        frozen: list[str] = []
        before_is_frozen = False
        for name in self.part_names:
            flags = [parameter.requires_grad for parameter in self.part(name).parameters()]
            before_is_frozen = not any(flags) if flags else before_is_frozen
            if before_is_frozen:
                frozen.append(name)
        self.frozen_parts = tuple(frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> StagedModel:
        """Set the mode of everything that is not frozen."""
        super().train(mode)
        for name in self.frozen_parts:
            for module in self.part(name).modules():
                module.training = mode and self.frozen_batchnorm == "train" and is_batchnorm(module)
        return self

    def _run(self, x: Activations, after: str | None, upto: str | None) -> Any:
        names = self.part_names
        first = 0 if after is None else names.index(after) + 1
        last = 0 if upto is None else names.index(upto) + 1
        without_graph = 0 if self.frozen_prefix is None else names.index(self.frozen_prefix) + 1
        for i in range(first, last):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= without_graph):
                x = self.part(names[i])(x)
        return x

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class Framing(nn.Module):
    """[B, 1, D, H, W] -> [B, channels, T, H, W]: time axis to the front, resized, the grey channel repeated."""

    def __init__(self, volume_shape_dhw: Clip, clip_thw: Clip, *, time_axis: str, channels: int) -> None:
        super().__init__()
        self.volume_shape_dhw = volume_shape_dhw
        self.clip_thw = clip_thw
        self.axes = _AXES[time_axis]
        self.channels = channels

    def forward(self, volumes_B1DHW: Tensor) -> Tensor:
        """Frame a batch; another shape than the network was built for is a DataError."""
        if tuple(volumes_B1DHW.shape[1:]) != (1, *self.volume_shape_dhw):
            raise DataError(
                f"the network was built for volumes of shape [B, 1, {', '.join(map(str, self.volume_shape_dhw))}], "
                f"found {list(volumes_B1DHW.shape)}"
            )
        x = volumes_B1DHW.permute(0, 1, *(2 + axis for axis in self.axes))
        if tuple(x.shape[2:]) != self.clip_thw:
            x = functional.interpolate(x, size=self.clip_thw, mode="trilinear", align_corners=False)
        return x.expand(-1, self.channels, -1, -1, -1)


def turned(volume_shape_dhw: Clip, time_axis: str) -> Clip:
    """The volume's sides with the time axis first."""
    t, h, w = (volume_shape_dhw[axis] for axis in _AXES[time_axis])
    return t, h, w


def clip_for(volume_thw: Clip, input_size: str | int, backbone: Backbone) -> Clip:
    """The clip the first stage gets: the volume, the native clip or N^3, enlarged to what the network can take.

    Raises:
        SpecError: "native" of a backbone that has no native clip.
    """
    if input_size == "native":
        if backbone.native_clip_thw is None:
            raise SpecError(f"backbone {backbone.name} has no native clip; give input_size as 'keep' or a number")
        wanted = backbone.native_clip_thw
    else:
        wanted = volume_thw if isinstance(input_size, str) else (input_size, input_size, input_size)
    limits = zip(wanted, backbone.smallest_thw, backbone.multiple_thw, strict=True)
    t, h, w = (-(-max(side, smallest) // multiple) * multiple for side, smallest, multiple in limits)
    return t, h, w


def adapt_stem(stem: nn.Module, rule: str, clip_thw: Clip) -> int:
    """Make the stem's convolutions that take a clip of three channels take one, in place; gives the channels it takes.

    `sum` keeps the response to a grey clip repeated three times, `mean` divides it by three; `repeat` leaves the stem
    as it is and has the volume repeated instead, which gives the same as `sum` at three times the work. So is a stem
    left that needs three channels elsewhere than in its convolutions.

    Raises:
        SpecError: `mean` for such a stem.
    """
    found = input_convolutions(stem, clip_thw)
    if found is None:
        if rule == "mean":
            raise SpecError(
                "stem: found 'mean', but this backbone's stem needs three channels elsewhere than in convolutions that "
                "take the clip; it can be 'sum' or 'repeat'"
            )
        return 3
    if not found or rule == "repeat":
        return 3 if found else 1
    for convolution in found:
        summed = convolution.weight.detach().sum(1, keepdim=True)
        convolution.weight = nn.Parameter(summed if rule == "sum" else summed / 3)
        convolution.in_channels = 1
    return 1


def remove_strides(stem: nn.Module) -> None:
    """Set the strides of the stem's convolutions and pooling layers to 1, in place.

    The convolution that brings SlowFast's fast pathway to the slow one's length keeps its stride.
    """
    for name, module in stem.named_modules():
        if not name.endswith("conv_fast_to_slow") and isinstance(module, nn.Conv3d | nn.MaxPool3d | nn.AvgPool3d):
            module.stride = (1, 1, 1)


def make_head(features: int, num_classes: int, dropout: float, seed: int) -> nn.Sequential:
    """Dropout and a linear layer with small normal weights (deviation 0.01) and no bias at the start.

    The weights come from (seed, "head"), so that trials with the same seed start from the same head.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "head"))
    linear = nn.Linear(features, num_classes, device="meta").to_empty(device="cpu")
    nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    head = nn.Sequential()
    head.add_module("dropout", nn.Dropout(dropout))
    head.add_module("linear", linear)
    return head


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a module is batch normalization of any number of dimensions."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
