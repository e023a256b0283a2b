"""A dataset -> one MRC file per particle in a folder per class, and a STAR file in the manner of RELION 3."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np

from studytool.data.dataset import Dataset
from studytool.data.partial import whole_folder
from studytool.data.scan import OnProgress, scan
from studytool.data.voxels import widened

STAR_NAME = "particles.star"
LABEL_COLUMN, SPLIT_COLUMN, ID_COLUMN, SNR_COLUMN = "studytoolLabel", "studytoolSplit", "studytoolId", "studytoolSnr"
_NOT_IN_FILE_NAMES = re.compile(r"[^A-Za-z0-9._+-]+")
# A STAR file has no way to write these inside of a text.
_NOT_IN_STAR = re.compile(r"[\"'#\x00-\x1f\x7f]|[^\S ]")
_LONGEST_NAME = 100


def export_dataset(
    dataset: Dataset, folder: Path, *, half: bool = False, on_progress: OnProgress | None = None
) -> Path:
    """Write the dataset as `folder`/CLASS/PARTICLE.mrc and `folder`/particles.star, whole or not at all.

    Files have mode 2 (float32), or with `half` mode 12 (float16), and the voxel size in the header. The STAR file names
    them relative to itself; labels, ids and splits are in columns of studytool's own. Where a name cannot stand in a
    file name or a STAR file, "_" replaces what cannot, and a number keeps names different.

    Returns:
        The path of the STAR file.

    Raises:
        DataError: the folder exists already, or a volume cannot be read.
    """
    labels = [dataset.manifest.classes[label] for label in dataset.labels.tolist()]
    folders = file_names(dataset.manifest.classes)
    stems = file_names(dataset.particle_ids.tolist())
    paths = [f"{folders[label]}/{stems[name]}.mrc" for label, name in zip(labels, dataset.particle_ids, strict=True)]
    kind = np.float16 if half else np.float32
    with whole_folder(folder) as temporary:
        for name in sorted({folders[label] for label in labels}):
            (temporary / name).mkdir()
        for rows, volumes in scan(dataset, on_progress=on_progress):
            for row, volume in zip(rows.tolist(), volumes, strict=True):
                with mrcfile.new(temporary / paths[row], data=widened(volume).astype(kind)) as file:
                    file.voxel_size = dataset.manifest.voxel_size_angstrom
        _write_star(temporary / STAR_NAME, dataset, labels, paths)
    return folder / STAR_NAME


def _write_star(path: Path, dataset: Dataset, labels: list[str], image_names: list[str]) -> None:
    import pandas as pd
    import starfile

    in_star = star_names(dataset.manifest.classes)
    ids = star_names(dataset.particle_ids.tolist())
    columns: dict[str, Any] = {"rlnImageName": image_names}
    if (dataset.tomograms != "").any():
        tomograms = star_names(sorted({*dataset.tomograms.tolist()} - {""})) | {"": ""}
        columns["rlnMicrographName"] = [tomograms[name] for name in dataset.tomograms.tolist()]
    columns["rlnPixelSize"] = dataset.manifest.voxel_size_angstrom
    if np.isfinite(dataset.positions_zyx).all():
        columns |= {f"rlnCoordinate{axis}": dataset.positions_zyx[:, 2 - i] for i, axis in enumerate("XYZ")}
    columns[LABEL_COLUMN] = [in_star[label] for label in labels]
    columns[SPLIT_COLUMN] = dataset.splits
    columns[ID_COLUMN] = [ids[name] for name in dataset.particle_ids.tolist()]
    if not np.isnan(dataset.snr).any():
        columns[SNR_COLUMN] = dataset.snr
    starfile.write({"particles": pd.DataFrame(columns)}, path, float_format="%.9g")


def file_names(names: Iterable[str]) -> dict[str, str]:
    """A name for each that every file system takes; no two are the same, not even where case does not count."""
    plain = {name: _NOT_IN_FILE_NAMES.sub("_", name)[:_LONGEST_NAME].lstrip(".") or "_" for name in names}
    return _different(plain, same_if=str.lower, taken={STAR_NAME})


def star_names(names: Iterable[str], *, spaces: bool = True) -> dict[str, str]:
    """Each name without what a STAR file cannot hold, or `spaces` outside of quotation marks; no two are the same."""
    plain = {name: _NOT_IN_STAR.sub("_", name if spaces else name.replace(" ", "_")) for name in names}
    return _different(plain, same_if=str, taken=set())


def _different(plain_of: Mapping[str, str], *, same_if: Callable[[str], str], taken: set[str]) -> dict[str, str]:
    """Number those of the plain names that are taken, or the same as one before."""
    result: dict[str, str] = {}
    times: Counter[str] = Counter()
    for name, plain in plain_of.items():
        candidate = plain
        while same_if(candidate) in taken:
            times[same_if(plain)] += 1
            candidate = f"{plain}-{times[same_if(plain)] + 1}"
        taken.add(same_if(candidate))
        result[name] = candidate
    return result
