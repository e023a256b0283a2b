"""The backbones and their weights as tables for a person."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group
from rich.table import Table

from studytool.models.backbones import FREEZE_RULES, find_backbone
from studytool.models.cards import ModelCard, describe_models
from studytool.models.weights import list_weights


def models_table() -> Group:
    """One row per backbone; GFLOPs are of one forward pass of a 32^3 volume. Letters are explained below the table."""
    cards = describe_models()
    licences = _letters(card.licence for card in cards)
    starts = _letters(init for card in cards for init in card.initializations)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("backbone", "from"):
        table.add_column(heading, no_wrap=True)
    for heading in ("M parameters", "GFLOPs", "stages"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("init", no_wrap=True)
    table.add_column("licence", no_wrap=True)
    for card in cards:
        table.add_row(
            card.name,
            card.source,
            f"{card.parameters / 1e6:.1f}",
            f"{card.gflops:.2f}",
            str(len(card.stages) - 1),
            " ".join(starts[init] for init in card.initializations),
            licences[card.licence],
        )
    inits = "init: " + ", ".join(f"{letter} {init}" for init, letter in starts.items())
    notes = [inits, *(f"licence {letter}: {text}" for text, letter in licences.items())]
    return Group(table, *notes, "`studytool models NAME` shows the stages that can be frozen.")


def _letters(names: Iterable[str]) -> dict[str, str]:
    return {name: chr(ord("a") + i) for i, name in enumerate(dict.fromkeys(names))}


def model_text(name: str) -> str:
    """All about one backbone: its card, its stages with their parameters, and what `freeze:` may be.

    Raises:
        SpecError: no such backbone.
    """
    backbone = find_backbone(name)
    card = next((card for card in describe_models() if card.name == name), None)
    lines = [f"{name} ({backbone.source}; {backbone.paper or 'no paper known'}; {backbone.licence})"]
    if card is not None:
        lines += _measured(card)
    lines.append(f"init: {', '.join(backbone.initializations)}, checkpoint:PATH")
    rules = {**FREEZE_RULES, **{stage: f"everything up to and with {stage} is frozen" for stage in backbone.stages}}
    kept = {} if card is None else {rule: f"  ({mib:g} MiB)" for rule, mib in card.activations_mib.items()}
    lines.append("freeze (in brackets what a training step of one 32^3 volume keeps for the backward pass):")
    lines += [f"  {rule:<12} {meaning}{kept.get(rule, '')}" for rule, meaning in rules.items()]
    return "\n".join(lines)


def weights_table() -> Table:
    """One row per published file of weights and the state of its copy here."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("backbone", "init", "state", "file"):
        table.add_column(heading, overflow="fold")
    for row in list_weights():
        table.add_row(row.backbone, row.init, row.state, str(row.path))
    return table


def _measured(card: ModelCard) -> list[str]:
    parts = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in card.parts.items())
    return [
        f"{card.parameters / 1e6:.2f} M parameters, {card.features} features, {card.gflops:.2f} GFLOPs at 32^3",
        f"parameters by stage: {parts}",
    ]
