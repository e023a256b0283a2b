"""Which parameters are trained, when, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from studytool.errors import SpecError, unknown_name
from studytool.models.adapt import POOL, StagedModel, is_batchnorm
from studytool.models.backbones import FREEZE_RULES

HEAD = "head"


@dataclass(frozen=True)
class StageRow:
    """One line of a freeze report; `buffers` counts the numbers kept in buffers, such as running means."""

    name: str
    parameters: int
    trained: int
    buffers: int


def freeze(model: StagedModel) -> None:
    """Freeze the model as `model.freezing` says, in the state it has in the first epoch.

    Raises:
        SpecError: the model has no such freeze point, or nothing that the rule could train.
    """
    points = (*FREEZE_RULES, *model.stages)
    rule = model.freezing.rule
    if rule not in points:
        raise SpecError(f"{unknown_name('freeze point', rule, points)}; this network has {', '.join(points)}")
    if rule == "norm_only" and not any(is_norm(module) for _, part in _parts(model) for module in part.modules()):
        raise SpecError("freeze: norm_only matches nothing: this network has no normalization layer with parameters")
    release(model, 1)


def release(model: StagedModel, epoch: int) -> tuple[str, ...]:
    """Set what is trained in `epoch` (counted from 1) and say which parts of the network are trained anew.

    Only `gradual` changes from epoch to epoch; what is trained depends on the epoch alone, so that a resumed run
    need not repeat the calls before. The names given back are those whose `parameter_groups` the optimizer lacks.
    """
    before = set(_trained_parts(model))
    for name, part in _parts(model):
        for parameter in part.parameters():
            parameter.requires_grad_(_is_trained(model, name, epoch))
    if model.freezing.rule == "norm_only":
        for module in (module for _, part in _parts(model) for module in part.modules() if is_norm(module)):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    for parameter in model.head.parameters():
        parameter.requires_grad_(True)
    model.note_frozen()
    return tuple(name for name in _trained_parts(model) if name not in before)


def parameter_groups(
    model: StagedModel, *, learning_rate: float, weight_decay: float, parts: tuple[str, ...] | None = None
) -> list[dict[str, Any]]:
    """The trained parameters as groups for a torch optimizer, from the head down to the stem.

    Each has `params`, `lr`, `weight_decay` (0 for biases and norms), `name` such as "stage2/decay" and `lr_scale`: the
    factor of its learning rate, below 1 with `layer_decay`; a schedule multiplies it in. `parts` limits the groups to
    those parts, to be added to an optimizer after a `release`; groups keep their order when a run is resumed.
    """
    groups: list[dict[str, Any]] = []
    top_down = [(HEAD, model.head), *reversed(_parts(model))]
    for name, part in top_down:
        if parts is not None and name not in parts:
            continue
        trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
        scale = _learning_rate_scale(model, name)
        for kind, chosen in (
            ("decay", [parameter for parameter in trained if parameter.ndim > 1]),
            ("no_decay", [parameter for parameter in trained if parameter.ndim <= 1]),
        ):
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "lr": learning_rate * scale,
                        "weight_decay": weight_decay if kind == "decay" else 0.0,
                        "name": f"{name}/{kind}",
                        "lr_scale": scale,
                    }
                )
    return groups


def frozen_parameters(model: StagedModel) -> frozenset[str]:
    """The names of the parameters that are as they were built, and stay so."""
    if model.freezing.rule == "gradual":
        return frozenset()
    return frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def freeze_report(model: StagedModel) -> tuple[StageRow, ...]:
    """Parameters, trained parameters and buffer entries of every part, from the stem to the head."""
    return tuple(
        StageRow(
            name=name,
            parameters=sum(p.numel() for p in part.parameters()),
            trained=sum(p.numel() for p in part.parameters() if p.requires_grad),
            buffers=sum(b.numel() for b in part.buffers()),
        )
        for name, part in (*_parts(model), (HEAD, model.head))
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes activations and has parameters of its own."""
    kinds = nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | nn.modules.instancenorm._InstanceNorm
    has_parameters = any(True for _ in module.parameters(recurse=False))
    return has_parameters and (is_batchnorm(module) or isinstance(module, kinds))


def _parts(model: StagedModel) -> list[tuple[str, nn.Module]]:
    return [(name, model.part(name)) for name in model.part_names]


def _trained_parts(model: StagedModel) -> list[str]:
    return [name for name, part in _parts(model) if any(p.requires_grad for p in part.parameters())]


def _is_trained(model: StagedModel, name: str, epoch: int) -> bool:
    """Whether all parameters of a part are trained; the pool comes after the last stage and is released with it."""
    rule, names = model.freezing.rule, list(model.stages)
    position = names.index(name) if name != POOL else len(names)
    if rule in ("backbone", "norm_only"):
        return False
    if rule == "gradual":
        released = (epoch - 1) // model.freezing.gradual_epochs
        return position >= len(names) - released if released else False
    return position > names.index(rule) if rule in names else True


def _learning_rate_scale(model: StagedModel, name: str) -> float:
    if model.freezing.rule != "layer_decay" or name == HEAD:
        return 1.0
    names = list(model.stages)
    position = names.index(name) if name != POOL else len(names) - 1
    return float(model.freezing.layer_decay ** (len(names) - position))
