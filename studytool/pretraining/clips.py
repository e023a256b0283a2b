"""Generated grey clips with labels: sprites of a few shapes that move in a few ways, seen by a bad camera.

Each clip is an honest little video: a flat, textured sprite appears in front of a cloudy background, moves, and goes;
a bar may pass before it and the light may flicker. Its class is its kind of shape and its kind of motion. All else is
left to chance: place, size, speed, sharpness, contrast (dark or bright), blur, halo, and how strong and how coarse the
noise is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from studytool.seeds import derive_seed

_BLOBS = 12
"""A sprite is a sum of this many soft round blobs, thresholded; those a shape does not need have no weight."""


@dataclass(frozen=True)
class Clips:
    """Clips [B, 1, T, H, W], float32 of mean 0 and deviation 1 each; int64 [B] indices into `SHAPES` and `MOTIONS`."""

    clips_B1THW: Tensor
    shapes_B: Tensor
    motions_B: Tensor


def generate_clips(count: int, *, seed: int, clip_thw: tuple[int, int, int] = (24, 24, 24)) -> Clips:
    """Make `count` clips, as many of each class as can be (the last ones of a random order are left out).

    The result depends on the arguments alone, not on the number of threads.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "clips", count, *clip_thw))
    rounds = -(-count // len(CLASSES))
    labels_B = torch.cat([torch.randperm(len(CLASSES), generator=generator) for _ in range(rounds)])[:count]
    chance = _Chance(generator, count)
    life_BT, time_BT = _life(chance, clip_thw[0])
    centres, sizes, weights = _sprites(chance, labels_B // len(MOTIONS))
    centres, sizes = _moved(chance, labels_B % len(MOTIONS), time_BT, centres, sizes)
    scene_BTHW = _rendered(chance, centres * life_BT[:, :, None, None], sizes * life_BT[:, :, None], weights, clip_thw)
    scene_BTHW = scene_BTHW * _light(chance, clip_thw[0])[:, :, None, None]
    scene_BTHW = _occluded(chance, scene_BTHW)
    return Clips(_filmed(chance, scene_BTHW)[:, None], labels_B // len(MOTIONS), labels_B % len(MOTIONS))


class _Chance:
    """Random numbers, one per clip unless another shape is asked for."""

    def __init__(self, generator: torch.Generator, count: int) -> None:
        self.generator = generator
        self.count = count

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(self.count, *shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.count, *shape, generator=self.generator)

    def log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return self.uniform(math.log(low), math.log(high), *shape).exp()

    def happens(self, probability: float) -> Tensor:
        """Whether something happens, as 0 or 1."""
        return (torch.rand(self.count, generator=self.generator) < probability).float()

    def sign(self) -> Tensor:
        return 2 * self.happens(0.5) - 1


def _on_circle(number: int, radius: float, size: float, turn: float = 1.0) -> list[tuple[float, float, float]]:
    angles = [2 * math.pi * turn * i / number for i in range(number)]
    return [(radius * math.cos(a), radius * math.sin(a), size) for a in angles]


SHAPES: Mapping[str, list[tuple[float, float, float]]] = {
    "disc": [(0, 0, 0.42), *_on_circle(6, 0.6, 0.38)],
    "rod": [(0.27 * i, 0, 0.26) for i in range(-4, 5)],
    "ring": _on_circle(10, 0.95, 0.26),
    "pair": [(-0.75, 0, 0.46), (0.75, 0, 0.46)],
    "trio": _on_circle(3, 0.85, 0.4),
    "cross": [blob for i in (-3, -2, -1, 1, 2, 3) for blob in ((0.36 * i, 0, 0.22), (0, 0.36 * i, 0.22))],
    "arc": _on_circle(12, 0.95, 0.26, turn=0.6),
    "comet": [(-0.5, 0, 0.5), (0.1, 0, 0.34), (0.5, 0, 0.26), (0.85, 0, 0.2), (1.15, 0, 0.15)],
}
"""Kinds of shape: blobs (x, y, size) in units of the sprite's radius."""


def _sprites(chance: _Chance, shapes_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centres [B, 1, K, 2], sizes [B, 1, K] and weights [B, K] of the blobs of sprites at rest, no two the same."""
    table = torch.zeros(len(SHAPES), _BLOBS, 4)
    for i, blobs in enumerate(SHAPES.values()):
        table[i, : len(blobs), :3] = torch.tensor(blobs)
        table[i, : len(blobs), 3] = 1.0
    chosen = table[shapes_B]
    weights = chosen[..., 3] * chance.uniform(0.75, 1.25, _BLOBS)
    centres = chosen[..., :2] + 0.07 * chance.normal(_BLOBS, 2)
    stretch = chance.uniform(0.85, 1.18, 1, 2)
    sizes = chosen[..., 2] * chance.uniform(0.85, 1.15, _BLOBS)
    return _turned(centres * stretch, chance.uniform(0, 2 * math.pi, 1))[:, None], sizes[:, None], weights


def _drift(chance: _Chance, t: Tensor, centres: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    angle, reach = chance.uniform(0, 2 * math.pi), chance.uniform(0.7, 1.6)
    path = torch.stack([angle.cos(), angle.sin()], -1)[:, None] * (t * reach[:, None])[..., None]
    return centres + path[:, :, None], sizes.expand(-1, t.shape[1], -1)


def _spin(chance: _Chance, t: Tensor, centres: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    turned = _turned(centres, (t * (chance.sign() * chance.uniform(1.2, 3.2))[:, None])[..., None])
    off = _turned(chance.uniform(-0.25, 0.25, 1, 2), torch.zeros(1))
    return turned + off[:, None], sizes.expand(-1, t.shape[1], -1)


def _tumble(chance: _Chance, t: Tensor, centres: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Turning about an axis in the picture: foreshortened in one direction, again and again."""
    angle = chance.uniform(0, 2 * math.pi, 1)
    phase = t * chance.uniform(1.3, 3.0)[:, None] + chance.uniform(0, 2 * math.pi)[:, None]
    flat = torch.stack([torch.ones_like(t), phase.cos()], -1)[:, :, None]
    return _turned(_turned(centres, -angle[:, None]) * flat, angle[:, None]), sizes.expand(-1, t.shape[1], -1)


def _swell(chance: _Chance, t: Tensor, centres: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    depth = chance.uniform(0.45, 0.75)[:, None]
    factor = 1 - depth * (t - chance.uniform(-0.3, 0.3)[:, None]).abs().clamp(max=1.2)
    return _scaled(centres, sizes, factor)


def _pulse(chance: _Chance, t: Tensor, centres: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    phase = t * chance.uniform(4.5, 8.0)[:, None] + chance.uniform(0, 2 * math.pi)[:, None]
    return _scaled(centres, sizes, 0.85 + chance.uniform(0.22, 0.4)[:, None] * phase.sin())


def _split(chance: _Chance, t: Tensor, centres: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The blobs begin on top of one another and part."""
    apart = torch.sigmoid((t - chance.uniform(-0.3, 0.3)[:, None]) * chance.uniform(2.5, 6.0)[:, None])
    return centres * (0.1 + 1.4 * apart)[..., None, None], sizes * (1.15 - 0.25 * apart)[..., None]


def _merge(chance: _Chance, t: Tensor, centres: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    return _split(chance, -t, centres, sizes)


def _writhe(chance: _Chance, t: Tensor, centres: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """A wave runs through the sprite and bends it."""
    angle = chance.uniform(0, 2 * math.pi, 1)
    own = _turned(centres, -angle[:, None])
    phase = t * (chance.sign() * chance.uniform(2.5, 5.0))[:, None]
    wave = own[..., :1] * chance.uniform(2.0, 3.5, 1, 1, 1) + phase[..., None, None]
    bent = torch.cat([own[..., :1].expand_as(wave), own[..., 1:] + chance.uniform(0.35, 0.6, 1, 1, 1) * wave.sin()], -1)
    return _turned(bent, angle[:, None]), sizes.expand(-1, t.shape[1], -1)


Motion = Callable[[_Chance, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
MOTIONS: Mapping[str, Motion] = {
    "drift": _drift,
    "spin": _spin,
    "tumble": _tumble,
    "swell": _swell,
    "pulse": _pulse,
    "split": _split,
    "merge": _merge,
    "writhe": _writhe,
}
"""Kinds of motion: functions of time [B, T] (-1 at the sprite's birth, 1 at its end), centres and sizes at rest."""

CLASSES: tuple[str, ...] = tuple(f"{shape}-{motion}" for shape in SHAPES for motion in MOTIONS)


def _moved(
    chance: _Chance, motions_B: Tensor, time_BT: Tensor, centres: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Centres [B, T, K, 2] and sizes [B, T, K] under each clip's own motion, disturbed by a little turn and drift."""
    frames = time_BT.shape[1]
    out_centres = torch.empty(chance.count, frames, _BLOBS, 2)
    out_sizes = torch.empty(chance.count, frames, _BLOBS)
    for i, move in enumerate(MOTIONS.values()):
        chosen = motions_B == i
        some = _Chance(chance.generator, int(chosen.sum()))
        out_centres[chosen], out_sizes[chosen] = move(some, time_BT[chosen], centres[chosen], sizes[chosen])
    out_centres = _turned(out_centres, (0.3 * chance.normal()[:, None] * time_BT)[..., None])
    out_centres = out_centres + (0.12 * chance.normal(1, 1, 2) * time_BT[..., None, None])
    return out_centres, out_sizes


def _life(chance: _Chance, frames: int) -> tuple[Tensor, Tensor]:
    """The sprite's size factor [B, T] as it appears, lives and goes, and its own time [B, T], -1 to 1 over its life.

    A third are there throughout; the others open and close like an iris.
    """
    frame = torch.linspace(-1, 1, frames)
    middle, half = chance.uniform(-0.25, 0.25)[:, None], chance.uniform(0.45, 1.0)[:, None]
    time = ((frame - middle) / half).clamp(-1.3, 1.3)
    roundness = chance.uniform(0.25, 0.6)[:, None]
    iris = (1 - time**2).clamp(min=0) ** roundness
    always = chance.happens(0.3)[:, None]
    return always + (1 - always) * iris, torch.where(always > 0, frame.expand_as(time), time)


def _rendered(
    chance: _Chance, centres: Tensor, sizes: Tensor, weights: Tensor, clip_thw: tuple[int, int, int]
) -> Tensor:
    """Sprite over background [B, T, H, W]: about 1 inside the sprite, about 0 outside."""
    _, height, width = clip_thw
    radius = chance.uniform(0.2, 0.36) * min(height, width)
    place = chance.uniform(-0.1, 0.1, 2) * torch.tensor([width, height])
    x = torch.arange(width) - (width - 1) / 2 - place[:, None, None, :1]
    y = torch.arange(height) - (height - 1) / 2 - place[:, None, None, 1:]
    centres = centres * radius[:, None, None, None]
    spread = (sizes * radius[:, None, None]).clamp(min=0.35)[..., None]
    # A Gaussian is a product over the axes, so that a frame is a product of two small matrices.
    across = torch.exp(-0.5 * ((x - centres[..., :1]) / spread) ** 2)
    down = torch.exp(-0.5 * ((y - centres[..., 1:]) / spread) ** 2)
    fading = (sizes * radius[:, None, None] / 0.35).clamp(max=1)
    field = torch.einsum("btk,btkh,btkw->bthw", fading * weights[:, None], down, across)
    sharpness = chance.log_uniform(4, 16)[:, None, None, None]
    solid = torch.sigmoid((field - 0.5) * sharpness)
    soft = chance.happens(0.3)[:, None, None, None]
    sprite = soft * field.clamp(max=2) + (1 - soft) * solid
    texture = _cloud(chance, clip_thw, moving=False) * chance.uniform(0, 0.35)[:, None, None, None]
    background = _cloud(chance, clip_thw, moving=True) * chance.uniform(0, 0.2)[:, None, None, None]
    return sprite * (1 + texture) + background


def _cloud(chance: _Chance, clip_thw: tuple[int, int, int], *, moving: bool) -> Tensor:
    """Pictures with the spectrum 1/f^a of natural scenes, deviation 1, at rest or drifting [B, T, H, W]."""
    frames, height, width = clip_thw
    ky = torch.fft.fftfreq(2 * height)[:, None]
    kx = torch.fft.rfftfreq(2 * width)[None, :]
    frequency = (ky**2 + kx**2).sqrt().clamp(min=1 / (2 * height))
    spectrum = frequency ** -chance.uniform(0.8, 1.8)[:, None, None]
    spectrum[:, 0, 0] = 0
    white = chance.normal(2 * height, 2 * width)
    picture: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * spectrum, s=white.shape[1:])
    picture = picture / picture.std(dim=(1, 2), keepdim=True)
    if not moving:
        return picture[:, None, :height, :width]
    x = torch.linspace(-0.5, 0.5, width)
    y = torch.linspace(-0.5, 0.5, height)
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)
    path = torch.linspace(-1, 1, frames)[None, :, None] * chance.uniform(-0.45, 0.45, 1, 2)
    where = grid[None, None] + path[:, :, None, None]
    return functional.grid_sample(
        picture[:, None], where.flatten(1, 2), align_corners=True, padding_mode="reflection"
    ).view(chance.count, frames, height, width)


def _light(chance: _Chance, frames: int) -> Tensor:
    """Brightness over time [B, T]: steady, or a flicker."""
    depth = chance.happens(0.3) * chance.uniform(0.1, 0.5)
    return 1 + depth[:, None] * chance.normal(frames).clamp(-1.5, 1.5)


def _occluded(chance: _Chance, scene_BTHW: Tensor) -> Tensor:
    """A bar of constant grey passes before some scenes."""
    _, frames, height, width = scene_BTHW.shape
    angle = chance.uniform(0, 2 * math.pi)[:, None, None, None]
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)[None, :]
    path = torch.linspace(-1, 1, frames)[None, :, None, None] * chance.uniform(0.5, 1.2)[:, None, None, None]
    distance = (x * angle.cos() + y * angle.sin() - path - chance.uniform(-0.6, 0.6)[:, None, None, None]).abs()
    half = chance.uniform(0.08, 0.25)[:, None, None, None]
    mask = torch.sigmoid((half - distance) * 12) * chance.happens(0.2)[:, None, None, None]
    grey = chance.uniform(-0.2, 0.6)[:, None, None, None]
    return scene_BTHW * (1 - mask) + grey * mask


def _filmed(chance: _Chance, scene_BTHW: Tensor) -> Tensor:
    """The camera: blur, a halo of sharpening, noise, contrast; mean 0 and deviation 1 over each clip."""
    shape = scene_BTHW.shape[1:]
    kt = torch.fft.fftfreq(shape[0])[:, None, None]
    ky = torch.fft.fftfreq(shape[1])[None, :, None]
    kx = torch.fft.rfftfreq(shape[2])[None, None, :]
    spatial, temporal = ky**2 + kx**2, kt**2

    def gaussian(sigma_pixels: Tensor, sigma_frames: Tensor) -> Tensor:
        space = torch.exp(-2 * math.pi**2 * spatial * (sigma_pixels**2)[:, None, None, None])
        return space * torch.exp(-2 * math.pi**2 * temporal * (sigma_frames**2)[:, None, None, None])

    sharp = gaussian(chance.uniform(0, 1.4), chance.uniform(0, 1.2))
    halo = chance.happens(0.5) * chance.uniform(0, 1)
    wide = gaussian(chance.uniform(2, 5), chance.uniform(0, 4))
    picture: Tensor = torch.fft.irfftn(
        torch.fft.rfftn(scene_BTHW, dim=(1, 2, 3)) * (sharp - halo[:, None, None, None] * wide), s=shape, dim=(1, 2, 3)
    )
    coarse = (chance.happens(0.5) * chance.uniform(0, 1.2))[:, None, None, None]
    flicker = chance.uniform(0, 1)[:, None, None, None]
    grain = (spatial + flicker * temporal).clamp(min=(1 / max(shape)) ** 2).sqrt() ** -coarse
    noise: Tensor = torch.fft.irfftn(
        torch.fft.rfftn(chance.normal(*shape), dim=(1, 2, 3)) * grain, s=shape, dim=(1, 2, 3)
    )
    snr = chance.log_uniform(0.25, 25.0)
    scale = (picture.flatten(1).var(1) / snr).sqrt() / noise.flatten(1).std(1)
    clip: Tensor = (picture + scale[:, None, None, None] * noise) * chance.sign()[:, None, None, None]
    centred = clip - clip.mean(dim=(1, 2, 3), keepdim=True)
    return centred / centred.flatten(1).std(1)[:, None, None, None].clamp(min=1e-6)


def _scaled(centres: Tensor, sizes: Tensor, factor_BT: Tensor) -> tuple[Tensor, Tensor]:
    return centres * factor_BT[..., None, None], sizes * factor_BT[..., None]


def _turned(points: Tensor, angle: Tensor) -> Tensor:
    """Points [..., 2] turned by an angle that has one dimension less (or spreads over it)."""
    cos, sin = angle.cos(), angle.sin()
    x, y = points[..., 0], points[..., 1]
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1)
