"""Settings -> a network ready to train: the published network, its weights, and what a subtomogram asks of it."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from studytool import registry
from studytool.errors import SpecError
from studytool.models.adapt import (
    Framing,
    Freezing,
    StagedModel,
    adapt_stem,
    clip_for,
    make_head,
    remove_strides,
    turned,
)
from studytool.models.anatomy import Anatomy
from studytool.models.backbones import BACKBONES, Backbone, check_model_choice, find_backbone
from studytool.models.freeze import freeze
from studytool.models.initialize import check_stem, initialize, load_trial
from studytool.models.weights import weights_path
from studytool.seeds import derive_seed
from studytool.settings import ModelSettings


def build_model(
    settings: ModelSettings, *, num_classes: int, volume_shape_dhw: tuple[int, int, int], seed: int
) -> StagedModel:
    """Build the network that `settings` describe, on the CPU, for volumes [B, 1, D, H, W] of that shape.

    Depends on the arguments alone: torch's global random state is neither read nor changed. Random weights come from
    (seed, "weights") and the head from (seed, "head").

    Raises:
        SpecError: a choice that does not exist, or that this backbone lacks.
        WeightsError: the weights are missing, damaged, or do not fit.
    """
    check_model_choice(settings.backbone, settings.init, settings.freeze, settings.stem_stride)
    backbone = find_backbone(settings.backbone)
    clip_thw = clip_for(turned(volume_shape_dhw, settings.time_axis), settings.input_size, backbone)
    network = build_untouched(backbone, seed)
    report = initialize(network, backbone, settings.init, seed)
    anatomy: Anatomy = registry.load(backbone.split)(network, clip_thw)
    check_stem(report, network, anatomy, weights_path(backbone.name, settings.init))
    channels = adapt_stem(anatomy.stages["stem"], settings.stem, clip_thw)
    if settings.stem_stride == "remove":
        remove_strides(anatomy.stages["stem"])
    model = StagedModel(
        anatomy,
        Framing(volume_shape_dhw, clip_thw, time_axis=settings.time_axis, channels=channels),
        make_head(anatomy.features, num_classes, settings.dropout, seed),
        freezing=Freezing(settings.freeze, settings.gradual_epochs, settings.layer_decay),
        frozen_batchnorm=settings.frozen_batchnorm,
        description=_description(settings, backbone, volume_shape_dhw, clip_thw),
    )
    model.load_report = load_trial(model, backbone, settings.init) or report
    freeze(model)
    return model


def depends_on_seed(model: StagedModel) -> bool:
    """Whether another seed would have given another network, and not just another head.

    Of a network of one's own it is not known whether it holds something random that no file has.
    """
    report = model.load_report
    is_from_file = bool(report.file) and not report.missing and report.initialization != "shuffled"
    return not is_from_file or model.description["backbone"] not in BACKBONES


def build_untouched(backbone: Backbone, seed: int) -> Any:
    """The network as its makers publish it, with random weights from (seed, "weights").

    Raises:
        SpecError: a package it needs is not installed.
    """
    if backbone.package and importlib.util.find_spec(backbone.package) is None:
        raise SpecError(
            f"backbone {backbone.name} needs the package {backbone.package!r}; install it with "
            f"pip install 'studytool[{backbone.package}]'"
        )
    make = registry.load(backbone.build)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "weights"))
        return make()


def _description(
    settings: ModelSettings, backbone: Backbone, volume_shape_dhw: tuple[int, int, int], clip_thw: tuple[int, int, int]
) -> dict[str, Any]:
    """What was done to the published network, in plain data."""
    return {
        **settings.model_dump(mode="json"),
        "source": backbone.source,
        "volume_shape_dhw": list(volume_shape_dhw),
        "clip_thw": list(clip_thw),
        "resized": clip_thw != turned(volume_shape_dhw, settings.time_axis),
        "positions": backbone.positions,
    }
