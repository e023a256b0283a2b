"""Where a network is cut behind its frozen part, and what the activations there depend on."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from studytool.files import sha256_of
from studytool.models.adapt import StagedModel
from studytool.models.anatomy import Activations

_LEAST_FLOPS_PER_BYTE = {"cpu": 50.0, "cuda": 5000.0}
"""Below this the frozen part is computed again sooner than its activations are read: a stem, on a GPU."""


@dataclass(frozen=True)
class Cut:
    """Where a network is cut, and what of one volume crosses: the shapes of its activations, one per pathway."""

    after: str
    shapes: tuple[tuple[int, ...], ...]
    flops_per_volume: float

    @property
    def size(self) -> int:
        """Numbers per volume."""
        return sum(math.prod(shape) for shape in self.shapes)


def find_cut(model: StagedModel, device: torch.device | None) -> Cut | None:
    """Where the activations of `model` are worth keeping; None where nothing stays the same, or computing is cheaper.

    Without a `device` they are, however cheap computing is.
    `gradual` freezing is not cut: its frozen part shrinks while it trains.
    """
    if not model.prefix_is_constant or model.frozen_prefix is None or model.freezing.rule == "gradual":
        return None
    parameter = next(model.parameters())
    one_volume = torch.zeros(1, 1, *model.framing.volume_shape_dhw, device=parameter.device, dtype=parameter.dtype)
    with FlopCounterMode(display=False) as counter:
        activations = run_frozen(model, one_volume, model.frozen_prefix)
    cut = Cut(
        model.frozen_prefix,
        tuple(tuple(part.shape[1:]) for part in pathways(activations)),
        float(counter.get_total_flops()),
    )
    if device is None:
        return cut
    return cut if cut.flops_per_volume >= _LEAST_FLOPS_PER_BYTE[device.type] * 4 * cut.size else None


def run_frozen(model: StagedModel, volumes_B1DHW: torch.Tensor, upto: str) -> Activations:
    """What the parts up to and with `upto` make of volumes: in evaluation mode, without gradients."""
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            return model.forward_prefix(volumes_B1DHW, upto)
    finally:
        model.train(training)


def pathways(activations: Activations) -> list[torch.Tensor]:
    """The activations of each pathway of a network, which most have one of."""
    return list(activations) if isinstance(activations, list | tuple) else [activations]


def digest_of_weights(model: StagedModel, upto: str) -> str:
    """SHA-256 of all tensors of the parts up to and with `upto`."""
    digest = hashlib.sha256()
    for name in model.part_names[: model.part_names.index(upto) + 1]:
        for key, tensor in model.part(name).state_dict().items():
            digest.update(f"{name}.{key}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_of_code(model: StagedModel, upto: str) -> str:
    """What the frozen parts do with their weights: the network's name, its modules, and the files these are written in.

    Two networks with the same weights need not compute the same, and nor does one whose file was edited.
    """
    backbone = str(model.description["backbone"])
    parts = [model.framing, *(model.part(name) for name in model.part_names[: model.part_names.index(upto) + 1])]
    kinds = {kind for part in parts for module in part.modules() for kind in type(module).__mro__}
    modules = {kind.__module__ for kind in kinds} | {backbone.partition(":")[0]}
    files = {
        inspect.getsourcefile(sys.modules[name])
        for name in modules
        if not name.startswith("torch.") and getattr(sys.modules.get(name), "__file__", None)
    }
    digests = sorted(sha256_of(Path(file)) for file in files if file and Path(file).is_file())
    return hashlib.sha256(json.dumps([backbone, *map(repr, parts), *digests]).encode()).hexdigest()
