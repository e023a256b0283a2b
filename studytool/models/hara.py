"""The 3D ResNets of Hara, Kataoka and Satoh (CVPR 2018), with the parameter names of their published checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from studytool.models.anatomy import Anatomy, GlobalAverage, split_stages
from studytool.models.backbones import Clip


def r3d_34() -> nn.Module:
    """3D ResNet-34 with shortcuts of type A, 400 classes."""
    return HaraResNet(Basic, (3, 4, 6, 3), padded_shortcuts=True)


def r3d_50() -> nn.Module:
    """3D ResNet-50 with shortcuts of type B, 400 classes."""
    return HaraResNet(Bottleneck, (3, 4, 6, 3), padded_shortcuts=False)


def split(network: Any, _clip_thw: Clip) -> Anatomy:
    """The stem with its pooling, and four layers."""
    layers = [getattr(network, f"layer{i}") for i in range(1, 5)]
    return Anatomy(split_stages(network.stem(), *layers), GlobalAverage(), network.fc.in_features)


class Basic(nn.Module):
    """Two 3x3x3 convolutions with a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _convolution(channels_in, planes, 3, stride)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = _convolution(planes, planes, 3)
        self.bn2 = nn.BatchNorm3d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, planes x expansion, T, H, W], the sides divided by the stride."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1x1, 3x3x3 and 1x1x1 convolutions with a shortcut; the one in the middle has the stride."""

    expansion = 4

    def __init__(self, channels_in: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _convolution(channels_in, planes, 1)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = _convolution(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv3 = _convolution(planes, planes * self.expansion, 1)
        self.bn3 = nn.BatchNorm3d(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, planes x expansion, T, H, W], the sides divided by the stride."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        return functional.relu(self.bn3(self.conv3(x)) + shortcut)


class PaddedShortcut(nn.Module):
    """Shortcut of type A: every `stride`-th voxel, and zeros for the channels that are missing; no parameters."""

    def __init__(self, channels_out: int, stride: int) -> None:
        super().__init__()
        self.channels_out = channels_out
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, channels_out, T, H, W], the sides divided by the stride."""
        x = x[:, :, :: self.stride, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, 0, 0, 0, self.channels_out - x.shape[1]))


class HaraResNet(nn.Module):
    """conv1, bn1, pooling, layer1 to layer4, average, fc; clips of 16 frames of 112 x 112."""

    def __init__(
        self, block: type[Basic] | type[Bottleneck], depths: tuple[int, ...], *, padded_shortcuts: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 64, 7, stride=(1, 2, 2), padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool3d(3, stride=2, padding=1)
        channels = 64
        for i, depth in enumerate(depths):
            planes, stride = 64 * 2**i, 1 if i == 0 else 2
            layer, channels = _layer(block, channels, planes, depth, stride, padded_shortcuts)
            self.add_module(f"layer{i + 1}", layer)
        self.fc = nn.Linear(channels, 400)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def stem(self) -> nn.Sequential:
        """Everything before layer1."""
        return nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)

    def forward(self, clips: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> logits [B, 400]."""
        x = self.stem()(clips)
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        logits: Tensor = self.fc(x.flatten(2).mean(2))
        return logits


def _layer(
    block: type[Basic] | type[Bottleneck], channels: int, planes: int, depth: int, stride: int, padded: bool
) -> tuple[nn.Sequential, int]:
    """`depth` blocks, the first with the stride, and the channels they give."""
    channels_out = planes * block.expansion
    downsample: nn.Module | None = None
    if stride != 1 or channels != channels_out:
        projection = nn.Sequential(_convolution(channels, channels_out, 1, stride), nn.BatchNorm3d(channels_out))
        downsample = PaddedShortcut(channels_out, stride) if padded else projection
    first = block(channels, planes, stride, downsample)
    return nn.Sequential(first, *(block(channels_out, planes, 1, None) for _ in range(depth - 1))), channels_out


def _convolution(channels_in: int, channels_out: int, side: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(channels_in, channels_out, side, stride=stride, padding=side // 2, bias=False)
