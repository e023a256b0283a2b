"""ViViT and VideoMAE from the `transformers` package, taken apart into stages of three layers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from studytool.models.anatomy import Anatomy, FirstToken, TokenAverage, split_stages
from studytool.models.backbones import Clip
from studytool.models.tokens import PatchStem, grid_after, resized_table

_LAYERS_PER_STAGE = 3


def vivit_b_16x2() -> Any:
    """ViViT-B/16x2 with 400 classes and random weights."""
    from transformers import VivitConfig, VivitForVideoClassification

    return VivitForVideoClassification(VivitConfig(num_labels=400))


def videomae_b() -> Any:
    """VideoMAE-B with 400 classes and random weights."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    return VideoMAEForVideoClassification(VideoMAEConfig(num_labels=400))


def split_vivit(network: Any, clip_thw: Clip) -> Anatomy:
    """ViViT: tubelets, a class token and learned positions; the class token is the feature."""
    body = network.vivit
    embeddings = body.embeddings
    projection = embeddings.patch_embeddings.projection
    native = (body.config.num_frames, *embeddings.patch_embeddings.image_size)
    old, new = grid_after(native, projection), grid_after(clip_thw, projection)
    table = embeddings.position_embeddings[0]
    positions = torch.cat([table[:1], resized_table(table[1:], old, new)]).detach()
    added = ClassTokenPositions(embeddings.cls_token, nn.Parameter(positions[None]))
    layers = body.layers if hasattr(body, "layers") else body.encoder.layer
    pool = nn.Sequential(body.layernorm, FirstToken())
    return Anatomy(split_stages(PatchStem(projection, added), *_stages(layers)), pool, body.config.hidden_size)


def split_videomae(network: Any, clip_thw: Clip) -> Anatomy:
    """VideoMAE: tubelets and fixed sine positions; the normalized average of the tokens is the feature."""
    body = network.videomae
    embeddings = body.embeddings
    projection = embeddings.patch_embeddings.projection
    native = (body.config.num_frames, *embeddings.patch_embeddings.image_size)
    old, new = grid_after(native, projection), grid_after(clip_thw, projection)
    added = FixedPositions(resized_table(embeddings.position_embeddings[0].detach(), old, new)[None])
    pool = nn.Sequential(TokenAverage(), network.fc_norm)
    return Anatomy(
        split_stages(PatchStem(projection, added), *_stages(body.encoder.layer)), pool, body.config.hidden_size
    )


def vivit_name(name: str) -> str:
    """A name of the published ViViT file -> the name since transformers 5."""
    name = re.sub(r"encoder\.layer\.", "layers.", name)
    name = re.sub(r"attention\.attention\.(query|key|value)\.", lambda found: f"attention.{found[1][0]}_proj.", name)
    name = name.replace("attention.output.dense.", "attention.o_proj.")
    return name.replace("intermediate.dense.", "mlp.fc1.").replace("output.dense.", "mlp.fc2.")


def videomae_name(name: str) -> str:
    """A name of the published VideoMAE file -> the name since transformers 5."""
    return name.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias")


class ClassTokenPositions(nn.Module):
    """Puts a class token in front of the tokens and adds learned positions."""

    def __init__(self, class_token: nn.Parameter, positions: nn.Parameter) -> None:
        super().__init__()
        self.class_token = class_token
        self.positions = positions

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, C] -> [B, 1 + N, C]."""
        return torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.positions


class FixedPositions(nn.Module):
    """Adds positions that are not learned."""

    positions: Tensor

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self.register_buffer("positions", positions)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return tokens + self.positions


class _Layers(nn.Module):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            output = layer(tokens)
            tokens = output[0] if isinstance(output, tuple) else output
        return tokens


def _stages(layers: Any) -> list[nn.Module]:
    return [_Layers(layers[i : i + _LAYERS_PER_STAGE]) for i in range(0, len(layers), _LAYERS_PER_STAGE)]
