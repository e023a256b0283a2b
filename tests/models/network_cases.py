"""What the tests of this room share: the backbones as test cases, a quick way to build one, and volumes."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from studytool.models.adapt import StagedModel
from studytool.models.anatomy import Anatomy, GlobalAverage, split_stages
from studytool.models.backbones import BACKBONES, Backbone
from studytool.models.build import build_model
from studytool.settings import ModelSettings


def cases(quick: set[str]) -> list[object]:
    """Every backbone as a case; those not in `quick` are marked slow."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in BACKBONES]


def needs(name: str) -> Backbone:
    """The backbone, or a skip where its package is not installed."""
    backbone = BACKBONES[name]
    if backbone.package and importlib.util.find_spec(backbone.package) is None:
        pytest.skip(f"the optional package {backbone.package} is not installed")
    return backbone


def build(shape: tuple[int, int, int] = (24, 24, 24), seed: int = 3, **settings: object) -> StagedModel:
    return build_model(ModelSettings(**settings), num_classes=5, volume_shape_dhw=shape, seed=seed)


def volumes(batch: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.randn(batch, 1, *shape, generator=torch.Generator().manual_seed(seed))


TINY = "network_cases:tiny_net"


def tiny_net() -> Anatomy:
    """A small network of four stages whose pool has parameters, for what does not depend on the backbone."""
    widths = [4, 4, 8, 8, 8]
    stages = [
        nn.Sequential(nn.Conv3d(i, o, 3, stride=2, padding=1), nn.BatchNorm3d(o), nn.ReLU(), nn.Dropout(0.1))
        for i, o in pairwise([3, *widths])
    ]
    return Anatomy(split_stages(*stages), nn.Sequential(GlobalAverage(), nn.LayerNorm(widths[-1])), widths[-1])
