"""2D ImageNet weights made 3D: names of torchvision's image networks turned into those of the video networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

_BIAS_TABLE = "relative_position_bias_table"


def inflated(
    tensors_2d: Mapping[str, Tensor], own: Mapping[str, Tensor], rename: Callable[[str], str]
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """2D tensors under the video network's names, and which of them got another shape to fit `own`.

    A kernel [out, in, h, w] is repeated over time and divided by the length, so that a clip whose frames are all equal
    gives the response of the image network. A table of relative positions is repeated for every distance in time.
    What cannot be made to fit is left as it is.
    """
    tensors: dict[str, Tensor] = {}
    reshaped: set[str] = set()
    for name_2d, tensor in tensors_2d.items():
        name = rename(name_2d)
        tensors[name] = tensor
        if name not in own or own[name].shape == tensor.shape:
            continue
        fitted = _fitted(name, tensor, own[name])
        if fitted is not None:
            tensors[name] = fitted
            reshaped.add(name)
    return tensors, frozenset(reshaped)


def resnet18_name(name: str) -> str:
    """torchvision's resnet18 -> r3d_18."""
    name = re.sub(r"^conv1\.", "stem.0.", name)
    name = re.sub(r"^bn1\.", "stem.1.", name)
    name = re.sub(r"^(layer\d\.\d+)\.conv(\d)\.", r"\1.conv\2.0.", name)
    return re.sub(r"^(layer\d\.\d+)\.bn(\d)\.", r"\1.conv\2.1.", name)


def resnet50_name(name: str) -> str:
    """torchvision's resnet50 -> slow_r50."""
    return _resnet50_name(name, pool_after_stage1=False)


def resnet50_pooled_name(name: str) -> str:
    """torchvision's resnet50 -> c2d_r50 and i3d_r50, which have one more pooling layer."""
    return _resnet50_name(name, pool_after_stage1=True)


def swin_name(name: str) -> str:
    """torchvision's swin_t, swin_s and swin_b -> swin3d_t, swin3d_s and swin3d_b."""
    name = re.sub(r"^features\.0\.0\.", "patch_embed.proj.", name)
    name = re.sub(r"^features\.0\.2\.", "patch_embed.norm.", name)
    return re.sub(r"^features\.(\d+)\.", lambda found: f"features.{int(found[1]) - 1}.", name)


def _resnet50_name(name: str, *, pool_after_stage1: bool) -> str:
    name = re.sub(r"^conv1\.", "blocks.0.conv.", name)
    name = re.sub(r"^bn1\.", "blocks.0.norm.", name)

    def block(found: re.Match[str]) -> str:
        stage = int(found[1])
        return f"blocks.{stage + (pool_after_stage1 and stage > 1)}.res_blocks.{found[2]}."

    name = re.sub(r"^layer(\d)\.(\d+)\.", block, name)
    name = name.replace(".downsample.0.", ".branch1_conv.").replace(".downsample.1.", ".branch1_norm.")
    for number, letter in zip("123", "abc", strict=True):
        name = name.replace(f".conv{number}.", f".branch2.conv_{letter}.")
        name = name.replace(f".bn{number}.", f".branch2.norm_{letter}.")
    return name


def _fitted(name: str, tensor: Tensor, own: Tensor) -> Tensor | None:
    if tensor.ndim == 4 and own.ndim == 5:
        out_channels, in_channels, frames, height, width = own.shape
        if tensor.shape == (out_channels, in_channels, height, width):
            return tensor.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
    if name.endswith(_BIAS_TABLE) and own.shape[1] == tensor.shape[1] and own.shape[0] % tensor.shape[0] == 0:
        return tensor.repeat(own.shape[0] // tensor.shape[0], 1)
    return None
