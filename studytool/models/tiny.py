"""`r2plus1d_tiny`: a small R(2+1)D network for small grey volumes, quick enough to be trained on a CPU."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

from studytool.models.anatomy import Anatomy, GlobalAverage, split_stages
from studytool.models.backbones import Clip

STEM_WIDTH = 16
STAGES = ((32, 1), (64, 2), (128, 1))
"""Width and stride of each stage."""


def r2plus1d_tiny() -> nn.Sequential:
    """The network for clips [B, 1, T, H, W]: a stem, and three stages of one residual block each; it has no head.

    Every convolution is a spatial one (1 x k x k) and then one over time (k x 1 x 1), each followed by batch
    normalization, as in R(2+1)D (Tran et al., CVPR 2018, arXiv 1711.11248). Strides are the same over space and time,
    4 in all. The stem sees 7 x 7 x 5 places, so that it averages noise away before its stride throws anything away.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=_stem())
    width = STEM_WIDTH
    for i, (next_width, stride) in enumerate(STAGES, start=1):
        parts[f"stage{i}"] = _Block(width, next_width, stride)
        width = next_width
    network = nn.Sequential(parts)
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def split(network: nn.Sequential, _clip_thw: Clip) -> Anatomy:
    """The stem and the stages, then a global average."""
    return Anatomy(split_stages(*network), GlobalAverage(), STAGES[-1][0])


class _Block(nn.Module):
    """relu(shortcut(x) + two (2+1)D convolutions of x); the first one and the shortcut have the stride."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_convolution(width_in, width_out, stride), nn.ReLU(inplace=True), *_convolution(width_out, width_out, 1)
        )
        self.shortcut = nn.Sequential(
            nn.Conv3d(width_in, width_out, 1, stride=stride, bias=False), nn.BatchNorm3d(width_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.layers(x) + self.shortcut(x), inplace=True)


def _stem() -> nn.Sequential:
    return nn.Sequential(*_convolution(1, STEM_WIDTH, 2, spatial=7, temporal=5), nn.ReLU(inplace=True))


def _convolution(width_in: int, width_out: int, stride: int, spatial: int = 3, temporal: int = 3) -> list[nn.Module]:
    """A convolution over space, batch normalization, relu, a convolution over time, batch normalization."""
    return [
        nn.Conv3d(
            width_in,
            width_out,
            (1, spatial, spatial),
            stride=(1, stride, stride),
            padding=(0, spatial // 2, spatial // 2),
            bias=False,
        ),
        nn.BatchNorm3d(width_out),
        nn.ReLU(inplace=True),
        nn.Conv3d(
            width_out, width_out, (temporal, 1, 1), stride=(stride, 1, 1), padding=(temporal // 2, 0, 0), bias=False
        ),
        nn.BatchNorm3d(width_out),
    ]


def own_name(name: str) -> str:
    """The name of a tensor in this network, from its name in the adapted network that was pre-trained."""
    return name.removeprefix("stages.")
