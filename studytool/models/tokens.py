"""Building blocks of networks that work on tokens: grids of tokens, position tables, and blocks as stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from studytool.models.backbones import Clip


class PatchStem(nn.Module):
    """Cuts a clip into patches by a convolution, then adds positions."""

    def __init__(self, patches: nn.Module, positions: nn.Module) -> None:
        super().__init__()
        self.patches = patches
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, T, H, W] -> [B, N, C]."""
        tokens: Tensor = self.positions(self.patches(x).flatten(2).transpose(1, 2))
        return tokens


class GridBlocks(nn.Module):
    """Transformer blocks that take tokens with their grid and give both back; the grid that goes in is fixed."""

    def __init__(self, blocks: Sequence[nn.Module], grid: Clip) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.grid = grid

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, C] -> [B, fewer N, more C]."""
        grid: Any = self.grid
        for block in self.blocks:
            tokens, grid = block(tokens, grid)
        return tokens


def grid_after(grid: Clip, layer: Any) -> Clip:
    """The grid that a convolution without dilation makes of a grid."""
    sizes = zip(grid, layer.kernel_size, layer.stride, layer.padding, strict=True)
    t, h, w = ((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes)
    return t, h, w


def resized_table(table: Tensor, old: Clip, new: Clip) -> Tensor:
    """A table of positions [old T*H*W, C], interpolated trilinearly to [new T*H*W, C]; equal grids change nothing."""
    if old == new:
        return table
    channels = table.shape[1]
    volume = table.detach().T.reshape(1, channels, *old)
    return functional.interpolate(volume, size=new, mode="trilinear").reshape(channels, -1).T.contiguous()


def pooled_stages(blocks: Sequence[nn.Module], pools: Sequence[Any], grid: Clip) -> list[nn.Module]:
    """Blocks as stages, a new one wherever the queries are pooled with a stride; `pools` are those layers or None."""
    stages: list[nn.Module] = []
    collected: list[nn.Module] = []
    stage_grid = grid
    for block, pool in zip(blocks, pools, strict=True):
        if collected and pool is not None and max(pool.stride) > 1:
            stages.append(GridBlocks(collected, stage_grid))
            collected, stage_grid = [], grid
        collected.append(block)
        grid = grid if pool is None else grid_after(grid, pool)
    return [*stages, GridBlocks(collected, stage_grid)]
