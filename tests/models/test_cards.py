from __future__ import annotations

import subprocess
import sys

import pytest
from network_cases import cases, needs

from studytool.models.backbones import BACKBONES
from studytool.models.cards import describe_models, measure


def test_every_backbone_has_a_card() -> None:
    cards = describe_models()
    assert [card.name for card in cards] == list(BACKBONES)
    for card in cards:
        assert card.parameters == sum(card.parts.values())
        assert tuple(card.parts) == (*card.stages, "pool")
        assert card.gflops > 0
        assert tuple(card.activations_mib) == ("none", *card.stages, "backbone")
        kept = list(card.activations_mib.values())
        assert kept == sorted(kept, reverse=True)
        assert kept[-1] < 0.01 * kept[0]
        assert card.licence


def test_parameter_counts_are_those_known() -> None:
    """The published counts less the 400-class heads."""
    cards = {card.name: card.parameters for card in describe_models()}
    assert cards["r2plus1d_18"] == 31_505_325 - (512 + 1) * 400 - 2 * 45 * 49
    assert cards["swin3d_t"] == 28_158_070 - (768 + 1) * 400 - 2 * 96 * 2 * 4 * 4


def test_the_table_is_read_without_torch() -> None:
    code = "import sys; from studytool.models import cards; cards.describe_models(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("name", cases(set()))
def test_the_kept_table_is_what_is_measured(name: str) -> None:
    needs(name)
    [card] = [card for card in describe_models() if card.name == name]
    measured = measure(name)
    assert (card.parameters, card.parts, card.features) == (
        measured["parameters"],
        measured["parts"],
        measured["features"],
    )
    assert measured["gflops"] == pytest.approx(card.gflops, rel=0.01)
    assert measured["activations_mib"] == pytest.approx(card.activations_mib, rel=0.05, abs=0.02)
