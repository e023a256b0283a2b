"""A trial's network where it is trained: on the device, in its memory format, with the cache of its frozen part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from studytool import registry
from studytool.data.shards import Dataset
from studytool.models.adapt import StagedModel
from studytool.models.backbones import find_backbone
from studytool.models.trim import trim_kernels
from studytool.spec import TrialSpec
from studytool.training.cut import find_cut
from studytool.training.device import Precision, choose_memory_format, choose_precision
from studytool.training.features import FeatureCache
from studytool.training.kept import Kept
from studytool.training.meter import CostMeter


@dataclass(frozen=True)
class Network:
    """`cache` is None where the trial wants none, or nothing of the network is worth keeping."""

    model: StagedModel
    precision: Precision
    memory_format: torch.memory_format
    cache: FeatureCache | None


def build_network(
    trial: TrialSpec,
    dataset: Dataset,
    device: torch.device,
    meter: CostMeter,
    kept: Kept,
    *,
    however_cheap: bool = False,
) -> Network:
    """Build the network of a trial on a dataset; see `build_model` for the errors.

    With `however_cheap` there is a cache also where computing the frozen part is quicker than reading its activations.
    """
    manifest = dataset.manifest
    model = kept.network(
        trial.model, num_classes=len(manifest.classes), volume_shape_dhw=manifest.shape_dhw, seed=trial.seed
    )
    memory_format = choose_memory_format(trial.train.channels_last, model, device)
    precision = choose_precision(trial.train.precision, device)
    model.to(device).to(memory_format=memory_format)
    if trial.train.trim_kernels == "auto":
        trim_kernels(model)
    cut = find_cut(model, None if however_cheap else device) if trial.cache == "auto" else None
    cache = None
    if cut is not None:
        at_once = trial.train.volumes_at_once
        cache = FeatureCache(model, cut, dataset, precision, memory_format, meter, at_once=at_once)
    return Network(model, precision, memory_format, cache)


def import_backbone(name: str) -> None:
    """Import the network's code before the clock runs; else the first trial in a process would pay for all."""
    backbone = find_backbone(name)
    for entry in (backbone.build, backbone.split):
        registry.load(entry)
