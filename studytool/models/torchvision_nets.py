"""torchvision's video networks taken apart into stages."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from studytool.models.anatomy import Anatomy, FirstToken, GlobalAverage, split_stages
from studytool.models.backbones import Clip
from studytool.models.tokens import PatchStem, grid_after, pooled_stages, resized_table


def split_resnet(network: Any, _clip_thw: Clip) -> Anatomy:
    """r3d_18, mc3_18, r2plus1d_18: the stem and four layers."""
    layers = [getattr(network, f"layer{i}") for i in range(1, 5)]
    return Anatomy(split_stages(network.stem, *layers), GlobalAverage(), network.fc.in_features)


def split_s3d(network: Any, _clip_thw: Clip) -> Anatomy:
    """S3D: a new stage wherever the network pools; the fixed last window becomes a global average."""
    stages = [network.features[start:end] for start, end in pairwise([0, 2, 4, 7, 13, 16])]
    return Anatomy(split_stages(*stages), GlobalAverage(), network.classifier[1].in_channels)


def split_mvit(network: Any, clip_thw: Clip) -> Anatomy:
    """MViT: patches and positions, then a new stage wherever the queries are pooled; the class token is the feature.

    Absolute position tables (V1) are interpolated here, relative ones (V2) by torchvision at every call.
    """
    grid = grid_after(clip_thw, network.conv_proj)
    positions = network.pos_encoding
    if positions.spatial_pos is not None:
        height, width = positions.spatial_size
        spatial = resized_table(positions.spatial_pos, (1, height, width), (1, *grid[1:]))
        temporal = resized_table(positions.temporal_pos, (positions.temporal_size, 1, 1), (grid[0], 1, 1))
        positions.spatial_pos, positions.temporal_pos = nn.Parameter(spatial), nn.Parameter(temporal)
    positions.temporal_size, positions.spatial_size = grid[0], grid[1:]
    pools = [block.attn.pool_q.pool if block.attn.pool_q is not None else None for block in network.blocks]
    stages = pooled_stages(network.blocks, pools, grid)
    return Anatomy(
        split_stages(PatchStem(network.conv_proj, positions), *stages),
        nn.Sequential(network.norm, FirstToken()),
        network.head[1].in_features,
    )


def split_swin(network: Any, clip_thw: Clip) -> Anatomy:
    """Swin3D: patches, then four stages that each begin by merging patches; the average is the feature."""
    parts = network.features
    stages = [parts[0:1], parts[1:3], parts[3:5], parts[5:7]]
    grid = [-(-side // patch) for side, patch in zip(clip_thw, network.patch_embed.tuple_patch_size, strict=True)]
    for i, stage in enumerate(stages):
        if i:
            grid = [grid[0], -(-grid[1] // 2), -(-grid[2] // 2)]
        for module in stage.modules():
            if hasattr(module, "relative_position_bias_table"):
                _fit_window(module, grid)
    stem = nn.Sequential(network.patch_embed, network.pos_drop)
    return Anatomy(split_stages(stem, *stages), _NormAverage(network.norm), network.num_features)


class _NormAverage(nn.Module):
    """[B, T, H, W, C] -> [B, C]."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        return normed.flatten(1, 3).mean(1)


def _fit_window(attention: Any, grid: list[int]) -> None:
    """Cut an attention window down to a grid that is smaller, and look relative positions up by what they are.

    torchvision cuts the window at every call, but goes on to take the first rows of the full window's index, which
    are other positions; a network trained on large clips never meets that case.
    """
    full = attention.window_size
    window = [min(side, size) for side, size in zip(grid, full, strict=True)]
    if window == full:
        return
    axes = [torch.arange(side) for side in window]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    offsets = places[:, :, None] - places[:, None, :] + torch.tensor([size - 1 for size in full])[:, None, None]
    _, height, width = (2 * size - 1 for size in full)
    attention.relative_position_index = (offsets[0] * height + offsets[1]) * width + offsets[2]
    attention.window_size = window
    attention.shift_size = [
        0 if side <= size else shift for side, size, shift in zip(grid, full, attention.shift_size, strict=True)
    ]
