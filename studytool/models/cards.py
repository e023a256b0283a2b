"""What every backbone is and costs: a table that is measured once, kept beside this file, and read without torch.

`python -m studytool.models.cards` measures all backbones anew and writes the file.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studytool.files import write_json
from studytool.models.backbones import BACKBONES, find_backbone

if TYPE_CHECKING:
    from studytool.models.adapt import StagedModel

CARDS_FILE = Path(__file__).with_name("model_cards.json")
SIDE = 32


@dataclass(frozen=True)
class ModelCard:
    """One line of the table of backbones, measured with the default settings on one volume of 32^3.

    `parameters` counts all but the head, `parts` the same by stage, in order. `gflops` counts the multiplications and
    the additions of one forward pass, in units of 10^9. `activations_mib` is what a training step of one volume keeps
    for the backward pass, parameters left out: with nothing frozen ("none"), with everything up to a stage frozen, and
    with only the head trained ("backbone"). `features` is the length of the feature vector.
    """

    name: str
    source: str
    parameters: int
    parts: dict[str, int]
    features: int
    gflops: float
    activations_mib: dict[str, float]
    native_clip_thw: tuple[int, int, int] | None
    stages: tuple[str, ...]
    initializations: tuple[str, ...]
    positions: str
    licence: str
    paper: str


def describe_models() -> tuple[ModelCard, ...]:
    """The cards of all backbones, in the order of the table."""
    measured = json.loads(CARDS_FILE.read_text(encoding="utf-8"))
    return tuple(_card(name, measured[name]) for name in BACKBONES)


def measure(name: str) -> dict[str, Any]:
    """Build a backbone and measure what its card says, in plain data.

    Raises:
        SpecError: a package it needs is not installed.
    """
    from studytool.models.build import build_model
    from studytool.models.freeze import HEAD, freeze_report
    from studytool.settings import ModelSettings

    shape = (SIDE, SIDE, SIDE)
    model = build_model(ModelSettings(backbone=name), num_classes=10, volume_shape_dhw=shape, seed=0)
    parts = {row.name: row.parameters for row in freeze_report(model) if row.name != HEAD}
    return {
        "parameters": sum(parts.values()),
        "parts": parts,
        "features": model.num_features,
        "gflops": round(_forward_flops(model) / 1e9, 3),
        "activations_mib": {
            rule: round(_kept_bytes(model, rule) / 2**20, 2) for rule in ("none", *model.stages, "backbone")
        },
    }


def _card(name: str, measured: dict[str, Any]) -> ModelCard:
    backbone = find_backbone(name)
    return ModelCard(
        name=name,
        source=backbone.source,
        native_clip_thw=backbone.native_clip_thw,
        stages=backbone.stages,
        initializations=backbone.initializations,
        positions=backbone.positions,
        licence=backbone.licence,
        paper=backbone.paper,
        **measured,
    )


def _forward_flops(model: StagedModel) -> int:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    # The plain form of attention, so that its products are counted on any device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.eval()(torch.zeros(1, 1, SIDE, SIDE, SIDE))
    return int(counter.get_total_flops())


def _kept_bytes(model: StagedModel, rule: str) -> int:
    import torch

    from studytool.models.freeze import freeze

    model.freezing = replace(model.freezing, rule=rule)
    freeze(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(torch.zeros(2, 1, SIDE, SIDE, SIDE))
    return sum(storage.nbytes() for storage in kept.values()) // 2


def _write_all() -> None:
    cards = {}
    for name in BACKBONES:
        cards[name] = measure(name)
        print(name, cards[name], file=sys.stderr)
    write_json(CARDS_FILE, cards)


if __name__ == "__main__":
    _write_all()
