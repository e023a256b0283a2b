"""Folders as the CryoET Data Portal has them, downloaded: RUN/Reconstructions/VoxelSpacing*/{Tomograms,Annotations}.

Points of the portal (`.ndjson`, a JSON object a line) count voxels of their VoxelSpacing from 0, as copick and the
portal's own client take them. A JSON file beside tomograms and points says what they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from studytool.data.readers.omezarr import read_json
from studytool.data.readers.runs import Points, RunPicks, RunTomogram
from studytool.data.readers.tables import lines_of_text
from studytool.errors import DataError

_SPACING = re.compile(r"VoxelSpacing(\d{1,6}(?:\.\d{1,9})?)")
_SHAPE = re.compile(r"_(orientedpoint|point|instancesegmentation|instancepoint)$", re.IGNORECASE)


def portal_runs(path: Path) -> list[Path]:
    """The runs in a folder, which is one itself or holds them; none where it is something else."""
    if not path.is_dir():
        return []
    folders = [path] if (path / "Reconstructions").is_dir() else sorted(path.iterdir())
    return [run for run in folders if not run.name.startswith(".") and any(_spacings(run))]


def portal_tomograms(run: Path) -> list[RunTomogram]:
    """The tomograms of a run: of one that is there as MRC and as Zarr, the MRC file."""
    tomograms = []
    for spacing_angstrom, spacing in _spacings(run):
        for folder in _folders(spacing / "Tomograms"):
            volumes = {path.stem: path for ending in ("zarr", "mrc") for path in sorted(folder.glob(f"*.{ending}"))}
            facts = _metadata(folder, "reconstruction_method")
            method, processing = facts.get("reconstruction_method"), facts.get("processing")
            kind = f"{method}-{processing}".lower() if method and processing else folder.name
            alignment = str(facts.get("alignment_metadata_path") or "")
            tomograms += [
                RunTomogram(run.name, spacing_angstrom, (kind, folder.name, stem), path, alignment)
                for stem, path in volumes.items()
            ]
    return tomograms


def portal_picks(run: Path) -> list[RunPicks]:
    """The point annotations of a run; of one that has points with and without orientations, those with."""
    picks: dict[tuple[Path, str], RunPicks] = {}
    for spacing_angstrom, spacing in _spacings(run):
        folder = spacing / "Annotations"
        for file in sorted(folder.glob("**/*.ndjson")):  # "orientedpoint" comes before "point"
            name = _SHAPE.sub("", file.stem)
            facts = _facts_of(file, name)
            about = facts.get("annotation_object")
            label = about.get("name") if isinstance(about, dict) else None
            number = file.parent.relative_to(folder).as_posix()
            picks.setdefault(
                (file.parent, name),
                RunPicks(
                    run=run.name,
                    label=str(label or re.sub(r"-\d+(\.\d+)*$", "", name)),
                    by=number if number != "." else name,
                    path=file,
                    load=partial(_points_angstrom, file, spacing_angstrom),
                    spacing_angstrom=spacing_angstrom,
                    alignment=str(facts.get("alignment_metadata_path") or ""),
                ),
            )
    return list(picks.values())


def _spacings(run: Path) -> Iterator[tuple[float, Path]]:
    for folder in _folders(run / "Reconstructions"):
        match = _SPACING.fullmatch(folder.name)
        if match and float(match[1]) > 0 and (folder / "Tomograms").is_dir():
            yield float(match[1]), folder


def _folders(path: Path) -> list[Path]:
    return [folder for folder in sorted(path.iterdir()) if folder.is_dir()] if path.is_dir() else []


def _metadata(folder: Path, key: str) -> dict[str, Any]:
    """The first JSON object in a folder that has `key`."""
    for file in sorted(folder.glob("*.json")):
        facts = read_json(file)
        if key in facts:
            return facts
    return {}


def _facts_of(points: Path, name: str) -> dict[str, Any]:
    """What is written about an annotation, in the file of its name or the only one in its folder."""
    exact = points.with_name(f"{name}.json")
    if exact.is_file():
        return read_json(exact)
    beside = [facts for facts in map(read_json, sorted(points.parent.glob("*.json"))) if "annotation_object" in facts]
    return beside[0] if len(beside) == 1 else {}


def _points_angstrom(file: Path, spacing_angstrom: float) -> Points:
    points = []
    for number, line in lines_of_text(file):
        if not line:
            continue
        try:
            location = json.loads(line)["location"]
            points.append([float(location[axis]) for axis in "zyx"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{file}, line {number}: {line[:60]!r} is no point, which has a location with x, y and z"
            ) from error
    return np.array(points, dtype=np.float64).reshape(-1, 3) * spacing_angstrom
