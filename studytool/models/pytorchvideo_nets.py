"""pytorchvideo's networks taken apart into stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from studytool.models.anatomy import Anatomy, FirstToken, GlobalAverage, split_stages
from studytool.models.backbones import Clip
from studytool.models.tokens import grid_after, pooled_stages, resized_table

SLOWFAST_RATIO = 4


def split_resnet(network: Any, _clip_thw: Clip) -> Anatomy:
    """slow_r50, c2d_r50, i3d_r50, csn_r101, r2plus1d_r50: the stem and four stages; extra pooling ends stage1."""
    stem, *stages, head = network.blocks
    if len(stages) == 5:
        stages = [nn.Sequential(stages[0], stages[1]), *stages[2:]]
    return Anatomy(split_stages(stem, *stages), GlobalAverage(), head.proj.in_features)


def split_x3d(network: Any, _clip_thw: Clip) -> Anatomy:
    """X3D: the stem and four stages; the pooling of the head, with its convolutions, makes the features."""
    stem, *stages, head = network.blocks
    return Anatomy(split_stages(stem, *stages), _ProjectedPool(head.pool), head.proj.in_features)


def split_slowfast(network: Any, _clip_thw: Clip) -> Anatomy:
    """SlowFast: every stage takes and gives [slow, fast]; the averages of both pathways are the features."""
    stem, *stages, _pool, head = network.blocks
    parts = split_stages(_TwoPathwayStem(stem), *(_TwoPathways(stage) for stage in stages))
    return Anatomy(parts, _ConcatenatedAverages(), head.proj.in_features)


def split_mvit(network: Any, clip_thw: Clip) -> Anatomy:
    """MViT: patches and positions, then a new stage wherever the queries are pooled; the class token is the feature."""
    grid = grid_after(clip_thw, network.patch_embed.patch_model)
    positions = network.cls_positional_encoding
    frames, height, width = positions.patch_embed_shape
    spatial = resized_table(positions.pos_embed_spatial[0], (1, height, width), (1, *grid[1:]))
    temporal = resized_table(positions.pos_embed_temporal[0], (frames, 1, 1), (grid[0], 1, 1))
    positions.pos_embed_spatial = nn.Parameter(spatial.detach()[None])
    positions.pos_embed_temporal = nn.Parameter(temporal.detach()[None])
    positions.num_spatial_patch, positions.num_temporal_patch = grid[1] * grid[2], grid[0]
    positions._patch_embed_shape = grid
    before = [network.patch_embed, positions, network.pos_drop, network.norm_patch_embed]
    stem = nn.Sequential(*(module for module in before if module is not None))
    stages = pooled_stages(network.blocks, [block.attn.pool_q for block in network.blocks], grid)
    pool = nn.Sequential(network.norm_embed, FirstToken())
    return Anatomy(split_stages(stem, *stages), pool, network.head.proj.in_features)


class _ProjectedPool(nn.Module):
    """X3D's last convolution, a global average, and one more layer on the averages: [B, C, T, H, W] -> [B, 2048]."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.before = nn.Sequential(pool.pre_conv, pool.pre_norm, pool.pre_act)
        self.average = nn.AdaptiveAvgPool3d(1)
        after = [pool.post_conv, pool.post_norm, pool.post_act]
        self.after = nn.Sequential(*(module for module in after if module is not None))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.after(self.average(self.before(x)))
        return features.flatten(1)


class _TwoPathways(nn.Module):
    """A stage of both pathways, on a list of its own: pytorchvideo's changes the list it is given."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, pathways: list[Tensor]) -> list[Tensor]:
        output: list[Tensor] = self.stage(list(pathways))
        return output


class _TwoPathwayStem(_TwoPathways):
    """The stem, which first makes the slow pathway: a fourth of the frames, evenly spread from the first to the last.

    Their number is rounded up, as the convolutions that join the pathways do.
    """

    def forward(self, clip: Any) -> list[Tensor]:
        frames = clip.shape[2]
        kept = torch.linspace(0, frames - 1, -(-frames // SLOWFAST_RATIO)).long()
        return super().forward([clip.index_select(2, kept.to(clip.device)), clip])


class _ConcatenatedAverages(nn.Module):
    """[[B, C1, ...], [B, C2, ...]] -> [B, C1 + C2]."""

    def forward(self, pathways: list[Tensor]) -> Tensor:
        return torch.cat([pathway.flatten(2).mean(2) for pathway in pathways], 1)
