"""Unlabelled volumes of any source -> the form that a network was trained on: box, voxel size, contrast, rounding.

What was done to the training volumes stands in their dataset's manifest; a trained network keeps it (`Preparation`), so
that volumes it is to label can be treated alike, and a difference is said and not silent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from studytool.data.conform import conform, uncropped_shape
from studytool.data.importplan import SAME_VOXEL_SIZE, known_voxel_size, read_checked
from studytool.data.manifest import Manifest
from studytool.data.readers.source import Entry, ReadVolume, Source
from studytool.data.voxels import store
from studytool.errors import DataError
from studytool.settings import Dtype, ImportSettings

Array = np.ndarray[Any, Any]

_BALL, _RIM = 0.25, 0.42  # of the side, from the middle: where a particle is, and where it is not
_SURE = 4.0  # standard errors


@dataclass(frozen=True)
class Preparation:
    """What the volumes of a dataset are, and what was done to make them so.

    `origin` is "import", "simulation" or "" where it is not known. `inverted`, `transpose` and `rescaled` are those of
    its import, with that of the dataset it was imported from, if it was one. `normalize` is "standard" where every
    volume has mean 0 and deviation 1.
    """

    shape_dhw: tuple[int, int, int]
    voxel_size_angstrom: float
    dtype: Dtype
    origin: str = ""
    inverted: bool = False
    transpose: str | None = None
    rescaled: bool = False
    normalize: Literal["none", "standard"] = "none"


def preparation_of(manifest: Manifest) -> Preparation:
    """How the volumes of a dataset came to be what they are."""
    steps = list(_imports(manifest.provenance))
    return Preparation(
        shape_dhw=manifest.shape_dhw,
        voxel_size_angstrom=manifest.voxel_size_angstrom,
        dtype=manifest.dtype,
        origin=str(manifest.provenance.get("kind", "")),
        inverted=sum(bool(step.get("invert")) for step in steps) % 2 == 1,
        transpose=next((step["transpose"] for step in steps if step.get("transpose")), None),
        rescaled=any(step.get("rescale_to_angstrom") for step in steps),
        normalize="standard" if any(step.get("normalize") == "standard" for step in steps) else "none",
    )


@dataclass(frozen=True)
class Preparer:
    """Reads a volume of a source and makes it like the training volumes; can be sent to other processes.

    `settings` say what is done to every volume; see `prepare`. What is not the user's or the import's choice (box,
    voxel size) is done where a volume needs it. `inverted`: their contrast was inverted before.
    """

    source: Source
    entries: Sequence[Entry]
    wanted: Preparation
    settings: ImportSettings
    inverted: bool = False

    def __call__(self, number: int) -> Array:
        """The volume [D, H, W] in the dtype of the training volumes; float32 where float16 might not hold its values.

        Raises:
            DataError: it cannot be read, its voxel size is not known, or it cannot be brought to the wanted form.
        """
        entry = self.entries[number]
        read, _ = read_checked(self.source, entry)
        volume, _ = conform(read.volume_DHW, *self._steps(entry, read))
        if volume.shape != self.wanted.shape_dhw:
            found, wanted = (" x ".join(map(str, shape)) for shape in (volume.shape, self.wanted.shape_dhw))
            raise DataError(f"{entry.origin}: {found} voxels, the network takes {wanted}; cut the volumes so")
        stored = np.empty(volume.shape, self.dtype)
        store(volume, stored, entry.particle_id)
        return stored

    @property
    def dtype(self) -> Dtype:
        """That of the training volumes, but float16 only for volumes of mean 0 and deviation 1.

        A lab's own scale may be one of which float16 keeps next to nothing: 20000 and a little, or 1e-8.
        """
        wanted = self.wanted
        return "float32" if wanted.dtype == "float16" and wanted.normalize == "none" else wanted.dtype

    def what_is_done(self, number: int = 0) -> str:
        """One line on what becomes of a volume to be like those of the training, and what is done otherwise."""
        entry = self.entries[number]
        read, _ = read_checked(self.source, entry)
        voxel_size, settings = self._steps(entry, read)
        found = " x ".join(map(str, read.volume_DHW.shape))
        done = []
        if settings.transpose is not None:
            done.append(f"axes {settings.transpose}")
        if settings.rescale_to_angstrom is not None and abs(voxel_size / settings.rescale_to_angstrom - 1) > 1e-4:
            done.append(f"rescaled to {settings.rescale_to_angstrom:g} Å")
        before = uncropped_shape(_shape(read), voxel_size, settings)
        if before != self.wanted.shape_dhw:
            verb = "padded" if any(b < w for b, w in zip(before, self.wanted.shape_dhw, strict=True)) else "cropped"
            done.append(f"{verb} to {' x '.join(map(str, self.wanted.shape_dhw))}")
        if settings.invert:
            done.append("contrast inverted")
        if (settings.invert != self.inverted) != self.wanted.inverted:
            done.append(f"unlike the training volumes, which were {'' if self.wanted.inverted else 'not '}inverted")
        if settings.normalize == "standard":
            done.append("mean 0 and deviation 1")
        return f"{found} voxels of {voxel_size:g} Å: {', '.join(done) or 'taken as they are'}"

    def _steps(self, entry: Entry, read: ReadVolume) -> tuple[float, ImportSettings]:
        """The voxel size of a volume, and the settings with the rescaling and cropping that it needs."""
        wanted = self.wanted
        voxel_size = known_voxel_size(entry, read.voxel_size_angstrom, self.settings)
        changes: dict[str, Any] = {}
        if wanted.rescaled or abs(voxel_size / wanted.voxel_size_angstrom - 1) > SAME_VOXEL_SIZE:
            changes["rescale_to_angstrom"] = wanted.voxel_size_angstrom
        settings = self.settings.model_copy(update=changes)
        if len(set(wanted.shape_dhw)) == 1 and uncropped_shape(_shape(read), voxel_size, settings) != wanted.shape_dhw:
            settings = settings.model_copy(update={"box": wanted.shape_dhw[0]})
        return voxel_size, settings


def prepare(
    source: Source,
    wanted: Preparation,
    *,
    raw: bool,
    inverted: bool = False,
    voxel_size_angstrom: float | None = None,
    invert: bool | None = None,
    transpose: str | None = None,
) -> Preparer:
    """How the volumes of a source become like those of training.

    `raw`: they are as a lab has them, so that the inversion and the order of axes of the training volumes' import are
    right for them too; volumes out of a studytool dataset have that behind them, and `inverted` says whether their
    contrast was inverted. `invert` and `transpose` overrule it.

    Raises:
        DataError: the source holds no particles.
    """
    if not source.entries:
        raise DataError(f"{source.kind}: holds no particles")
    settings = ImportSettings(
        voxel_size_angstrom=voxel_size_angstrom,
        invert=(wanted.inverted and raw) if invert is None else invert,
        transpose=transpose if transpose is not None else wanted.transpose if raw else None,
        normalize=wanted.normalize,
    )
    return Preparer(source, source.entries, wanted, settings, inverted)


@dataclass(frozen=True)
class Contrast:
    """How much brighter the middle of volumes is than their rim, in deviations: mean over volumes, standard error."""

    mean: float
    error: float

    @property
    def sign(self) -> int:
        """+1 bright particles, -1 dark ones, 0 where it cannot be told."""
        return int(np.sign(self.mean)) if abs(self.mean) > _SURE * self.error else 0


def contrast_of(volumes: Array) -> Contrast:
    """The contrast of float volumes [N, D, H, W]; with fewer than two the error is infinite."""
    axes = [(np.arange(side) - side // 2) / side for side in volumes.shape[1:]]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt(z**2 + y**2 + x**2)
    flat = volumes.reshape(len(volumes), -1).astype(np.float32)
    inside, outside = (radius < _BALL).ravel(), (radius > _RIM).ravel()
    deviation = flat.std(axis=1)
    difference = flat[:, inside].mean(axis=1) - flat[:, outside].mean(axis=1)
    values = np.divide(difference, deviation, out=np.zeros_like(difference), where=deviation > 0)
    if len(values) < 2:
        return Contrast(float(values.mean()) if len(values) else 0.0, float("inf"))
    return Contrast(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def _shape(read: ReadVolume) -> tuple[int, int, int]:
    depth, height, width = read.volume_DHW.shape
    return depth, height, width


def _imports(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of the imports a dataset went through, the first one first."""
    if provenance.get("kind") != "import":
        return []
    source = provenance.get("source", {})
    earlier = source.get("provenance", {}) if isinstance(source, Mapping) else {}
    return [*(_imports(earlier) if isinstance(earlier, Mapping) else []), provenance.get("settings", {})]
