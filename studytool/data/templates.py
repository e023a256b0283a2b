"""Densities from MRC maps, to simulate from: a class per file, centred, of mean density 1 inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from studytool.data.readers.mrc import read_mrc
from studytool.errors import DataError

_ENDINGS = (".mrc", ".map", ".rec", ".mrc.gz", ".map.gz", ".mrc.bz2", ".map.bz2")
_MARGIN = 4  # voxels of solvent kept around the particle, so that interpolation does not see an edge
_INSIDE = 0.1  # of the highest density; what is lower counts as solvent

Volume = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Template:
    """A map with its centre of mass: `density_DHW` (z, y, x) is zero outside the particle, of mean 1 inside."""

    name: str
    density_DHW: Volume
    voxel_size_angstrom: float
    centre_zyx: tuple[float, float, float]
    radius_angstrom: float

    def render(
        self, side: int, voxel_size_angstrom: float, rotation: Any, offset_xyz_angstrom: ArrayLike = (0, 0, 0)
    ) -> Volume:
        """Density [side, side, side] (z, y, x) after the 3 x 3 `rotation` about the centre of mass and the offset.

        Turned, moved and rescaled in one cubic interpolation; a map finer than the voxels is smoothed to them before.
        """
        scale = voxel_size_angstrom / self.voxel_size_angstrom
        source = self.density_DHW
        if scale > 1:
            source = ndimage.gaussian_filter(source, 0.4 * np.sqrt(scale**2 - 1))
        backward = rotation[::-1, ::-1].T * scale  # from an output voxel (z, y, x) to the map
        middle = (side - 1) / 2 + np.asarray(offset_xyz_angstrom)[::-1] / voxel_size_angstrom
        rendered: Volume = ndimage.affine_transform(
            source, backward, self.centre_zyx - backward @ middle, output_shape=(side,) * 3, order=3, mode="constant"
        )
        return rendered


def load_templates(folder: Path) -> Mapping[str, Template]:
    """Every map in `folder` by its name without ending, sorted.

    Raises:
        DataError: there is no folder or no map, two files have one name, a map cannot be read, its voxel size is not
            known, or it has no density above zero.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of templates")
    templates: dict[str, Template] = {}
    for path in sorted(folder.iterdir()):
        ending = next((ending for ending in _ENDINGS if path.name.lower().endswith(ending)), None)
        if ending is None or not path.is_file():
            continue
        name = path.name[: -len(ending)]
        if name in templates:
            raise DataError(f"{path}: a second template called {name!r}; each class needs one map")
        templates[name] = _load(name, path)
    if not templates:
        raise DataError(f"{folder}: no map found; templates end in {', '.join(_ENDINGS)}")
    return templates


def _load(name: str, path: Path) -> Template:
    mrc = read_mrc(path)
    if mrc.voxel_size_angstrom is None:
        raise DataError(
            f"{path}: its header has no usable voxel size (found {mrc.voxel_size_zyx_angstrom}); set it, for example "
            "with `alterheader` of IMOD"
        )
    volume = mrc.volume_DHW
    if volume.max() <= 0:
        raise DataError(f"{path}: no density above zero; templates have bright particles on a background of zero")
    inside = volume > _INSIDE * volume.max()
    density = np.where(inside, volume / volume[inside].mean(), 0).astype(np.float32)
    (box,) = ndimage.find_objects(inside.astype(np.int8))
    density, inside = (
        np.pad(part[box], _MARGIN) for part in (density, inside)
    )  # the solvent around it only costs time
    places = np.argwhere(inside)
    centre = np.average(places, axis=0, weights=density[inside])
    radius = np.sqrt(((places - centre) ** 2).sum(axis=1).max()) * mrc.voxel_size_angstrom
    z, y, x = map(float, centre)
    return Template(name, density, mrc.voxel_size_angstrom, (z, y, x), float(radius))
