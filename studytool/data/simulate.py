"""Simulated subtomograms: density -> pose -> neighbours -> CTF -> missing wedge -> noise -> normalized volume.

Whoever reads only the mean or the variance of a volume learns nothing of its class: every volume has mean 0 and
deviation 1, and the noise is scaled to each particle's own signal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from studytool.data.imaging import contrast_transfer, wedge
from studytool.data.manifest import Manifest
from studytool.data.particles import SPLITS, Particle
from studytool.data.phantoms import PHANTOMS, phantom
from studytool.data.shards import write_dataset
from studytool.data.templates import load_templates
from studytool.data.workers import results_in_order, usable_cores
from studytool.errors import DataError, unknown_name
from studytool.seeds import derive_seed
from studytool.settings import SimulateSettings

Volume = np.ndarray[Any, np.dtype[np.float32]]

SNR_DEFINITION = (
    "snr = var(signal) / var(noise) over the voxels of each volume; signal is the particle alone, without its "
    "neighbours, after CTF and missing wedge; noise is white noise after the same missing wedge"
)
_VOLUMES_PER_SHARD = 4096
_CHUNK = 32
_WORTH_PROCESSES = 256  # starting processes takes longer than simulating fewer volumes


class Density(Protocol):
    """What is simulated: a phantom or a template, centred on its centre of mass, of mean density 1 inside."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def radius_angstrom(self) -> float: ...  # noqa: D102

    def render(  # noqa: D102
        self, side: int, voxel_size_angstrom: float, rotation: Any, offset_xyz_angstrom: ArrayLike
    ) -> Volume: ...


def simulate_dataset(
    settings: SimulateSettings,
    folder: Path,
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Simulate a dataset into `folder`; until it is whole, nothing stands under that name.

    The result depends on `settings` alone, not on `workers` (None: one process per core this process may use).
    `on_progress(done, total)` is called as volumes are finished.

    Raises:
        DataError: the folder exists, a class is unknown, a template cannot be used or does not fit the box.
    """
    scene = Scene(settings, select_densities(settings))
    total = len(scene.densities) * settings.volumes_per_class
    if workers is None:
        workers = usable_cores() if total >= _WORTH_PROCESSES else 1
    provenance = {
        "kind": "simulation",
        "settings": settings.model_dump(mode="json"),
        "snr_definition": SNR_DEFINITION,
        "tomograms": {
            scene.tomogram_name(number): {"split": scene.split(number), "defocus_um": scene.defocus_um(number)}
            for number in range(sum(settings.tomograms))
        },
    }

    def particles() -> Iterator[Particle]:
        simulated = results_in_order(scene.particle, range(total), workers=workers, chunk=_CHUNK)
        for done, particle in enumerate(simulated, start=1):
            yield particle
            if on_progress is not None and (done % _CHUNK == 0 or done == total):
                on_progress(done, total)

    return write_dataset(
        particles(), folder, dtype=settings.dtype, provenance=provenance, volumes_per_shard=_VOLUMES_PER_SHARD
    )


def select_densities(settings: SimulateSettings) -> tuple[Density, ...]:
    """The densities that `settings.classes` names (or counts), from the phantoms or the folder of templates.

    Raises:
        DataError: a name is unknown, fewer exist than asked for, or one does not fit the box.
    """
    available: dict[str, Callable[[], Density]]
    if settings.templates is None:
        available = {name: lambda name=name: phantom(name) for name in PHANTOMS}  # type: ignore[misc]
        source = "phantoms"
    else:
        templates = load_templates(Path(settings.templates))
        available = {name: lambda name=name: templates[name] for name in templates}  # type: ignore[misc]
        source = f"maps in {settings.templates}"
    if isinstance(settings.classes, int):
        names = list(available)[: settings.classes]
        if len(names) < settings.classes:
            raise DataError(f"simulate.classes: asks for {settings.classes}, there are {len(available)} {source}")
    else:
        names = list(settings.classes)
    for name in names:
        if name not in available:
            raise DataError(f"simulate.classes: {unknown_name('class', name, available)}")
    if len(names) < 2 or len(set(names)) != len(names):
        raise DataError(f"simulate.classes: needs two or more different classes, found {names}")
    densities = tuple(available[name]() for name in names)
    for density in densities:
        _check_fits(density, settings)
    return densities


@dataclass(frozen=True)
class Scene:
    """All that a particle's volume depends on, besides its number."""

    settings: SimulateSettings
    densities: tuple[Density, ...]

    def particle(self, number: int) -> Particle:
        """Simulate particle `number`: classes take turns, and each class's particles go to the tomograms in turn."""
        settings = self.settings
        density = self.densities[number % len(self.densities)]
        tomogram = number // len(self.densities) % sum(settings.tomograms)
        rng = np.random.default_rng(derive_seed(settings.seed, "particle", number))
        signal, crowd, noise = self.parts(density, tomogram, rng)
        volume = (signal + crowd + noise).astype(np.float64)
        volume = (volume - volume.mean()) / volume.std()
        return Particle(
            particle_id=f"{self.tomogram_name(tomogram)}-{number:06d}",
            label=density.name,
            tomogram=self.tomogram_name(tomogram),
            split=self.split(tomogram),
            volume_DHW=volume.astype(np.float32),
            voxel_size_angstrom=settings.voxel_size_angstrom,
            snr=float("inf") if settings.snr == "infinite" else settings.snr,
        )

    def parts(self, density: Density, tomogram: int, rng: np.random.Generator) -> tuple[Volume, Volume, Volume]:
        """The signal, the neighbours and the noise of one volume, each as it stands in it before normalization."""
        settings = self.settings
        side, voxel = settings.side, settings.voxel_size_angstrom
        shift = rng.uniform(-1, 1, 3) * settings.shift_fraction * side * voxel
        signal = self._imaged(density.render(side, voxel, _random_rotation(rng), shift), tomogram)
        crowd: Volume = np.zeros_like(signal)
        count = int(rng.integers(0, settings.neighbours + 1))
        if count:
            crowd = self._imaged(self._neighbours(density, shift, count, rng), tomogram)
        noise: Volume = np.zeros_like(signal)
        if settings.snr != "infinite":
            white = rng.standard_normal((side, side, side), dtype=np.float32)
            noise = _filtered(white, self._wedge)
            noise = noise * np.float32(np.sqrt(signal.var() / settings.snr / noise.var()))
        return signal, crowd, noise

    def tomogram_name(self, tomogram: int) -> str:
        """The name of tomogram number `tomogram`."""
        return f"tomogram_{tomogram:03d}"

    def split(self, tomogram: int) -> str:
        """The split that tomogram number `tomogram` is dealt to."""
        bounds = np.cumsum(self.settings.tomograms)
        return SPLITS[int(np.searchsorted(bounds, tomogram, side="right"))]

    def defocus_um(self, tomogram: int) -> float:
        """The underfocus of tomogram number `tomogram`."""
        rng = np.random.default_rng(derive_seed(self.settings.seed, "defocus", tomogram))
        return float(rng.uniform(*self.settings.defocus_range_um))

    def _neighbours(self, density: Density, shift: Any, count: int, rng: np.random.Generator) -> Volume:
        settings = self.settings
        shape = (settings.side,) * 3
        total: Volume = np.zeros(shape, dtype=np.float32)
        for _ in range(count):
            other = self.densities[int(rng.integers(len(self.densities)))]
            direction = rng.normal(size=3)
            direction /= np.linalg.norm(direction)
            distance = rng.uniform(0.8, 1.1) * (density.radius_angstrom + other.radius_angstrom)
            total += other.render(
                settings.side, settings.voxel_size_angstrom, _random_rotation(rng), shift + distance * direction
            )
        return total

    def _imaged(self, density: Volume, tomogram: int) -> Volume:
        if not self.settings.ctf:
            return _filtered(density, self._wedge)
        return _filtered(density, self._wedge * _contrast_transfer(self.settings, self.defocus_um(tomogram)))

    @cached_property
    def _wedge(self) -> Volume:
        return wedge(self.settings.side, self.settings.tilt_range_degrees, self.settings.tilt_step_degrees)


@lru_cache(maxsize=64)
def _contrast_transfer(settings: SimulateSettings, defocus_um: float) -> Volume:
    return contrast_transfer(
        settings.side,
        settings.voxel_size_angstrom,
        defocus_um=defocus_um,
        voltage_kv=settings.voltage_kv,
        spherical_aberration_mm=settings.spherical_aberration_mm,
        amplitude_contrast=settings.amplitude_contrast,
        b_factor_square_angstrom=settings.b_factor_square_angstrom,
    )


def _filtered(volume: Volume, multiplier: Volume) -> Volume:
    filtered: Volume = scipy.fft.irfftn(scipy.fft.rfftn(volume) * multiplier, s=volume.shape)
    return filtered


def _random_rotation(rng: np.random.Generator) -> Any:
    return Rotation.random(rng=rng).as_matrix()


def _check_fits(density: Density, settings: SimulateSettings) -> None:
    """Refuse a box that cuts off more than a tenth of the particle in its first pose."""
    side, voxel = settings.side, settings.voxel_size_angstrom
    roomy = 2 * int(np.ceil(density.radius_angstrom / voxel)) + side
    whole = density.render(roomy, voxel, np.eye(3), (0, 0, 0)).sum()
    kept = density.render(side, voxel, np.eye(3), (0, 0, 0)).sum() / whole
    if kept < 0.9:
        raise DataError(
            f"simulate.side: {density.name!r} is about {2 * density.radius_angstrom:.0f} Å across and does not fit "
            f"a box of {side} voxels of {voxel:g} Å; take a larger side or larger voxels"
        )
