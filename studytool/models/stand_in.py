"""Files that stand in for published weights: same names and shapes, random numbers; to rehearse a study."""

from __future__ import annotations

from pathlib import Path

import torch

from studytool.errors import SpecError
from studytool.files import whole_file
from studytool.models.backbones import find_backbone
from studytool.models.build import build_untouched
from studytool.models.weights import record_digest
from studytool.seeds import derive_seed


def write_stand_in(backbone: str, init: str, folder: Path, *, seed: int) -> Path:
    """Write a file with the name, tensor names and shapes of the one that `init` reads, and its digest beside it.

    With `STUDYTOOL_WEIGHTS` set to `folder`, the file is taken for the published one, but load reports say "recorded",
    not "published": its numbers mean nothing.

    Raises:
        SpecError: this initialization reads no published file.
    """
    chosen = find_backbone(backbone)
    file = chosen.weights.get(chosen.video_init if init == "shuffled" else init)
    if file is None or file.shipped:
        raise SpecError(f"backbone {backbone} reads no published file for init {init!r}")
    stand_in_seed = derive_seed(seed, "stand-in", file.name)
    if init == "imagenet_inflated":
        network = _image_network(file.name.partition("-")[0], stand_in_seed)
    else:
        network = build_untouched(chosen, stand_in_seed)
    path = folder / file.name
    with whole_file(path) as temporary:
        torch.save(dict(network.state_dict()), temporary)
    record_digest(path)
    return path


def _image_network(name: str, seed: int) -> torch.nn.Module:
    from torchvision.models import get_model

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network: torch.nn.Module = get_model(name)
    return network
