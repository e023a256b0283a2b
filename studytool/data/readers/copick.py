"""copick projects on this machine, and downloads of the CryoET Data Portal, cut into boxes.

A project's configuration comes from a stranger and names the file systems that copick opens; only folders of this
machine are let through, without any options for them.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from studytool.data.readers.boxes import BoxSource
from studytool.data.readers.omezarr import MAX_JSON_BYTES, read_json
from studytool.data.readers.portal import portal_picks, portal_runs, portal_tomograms
from studytool.data.readers.runs import Points, RunPicks, RunTomogram, source_of_runs
from studytool.data.readers.source import ReadOptions
from studytool.data.readers.tomogramfiles import require_inside
from studytool.errors import DataError

_HEAD_BYTES = 65536
_FILES_TRIED = 50
_LOCAL = re.compile(r"(?:local|file)://")
_GET_A_COPY = "copy it here first (`copick sync`, or the portal's download) and name the folder"


def recognize(path: Path, options: ReadOptions) -> BoxSource | None:
    """A copick configuration or the folder that holds one, or runs as the CryoET Data Portal lays them out.

    The run is the group, the object the label; points count Å from the centre of the first voxel, in copick with the
    shift of their transformation.

    Raises:
        DataError: the project is not on this machine or cannot be read, or several tomograms or annotations could be
            meant and the options do not choose.
    """
    if options.tomograms is not None or options.coordinates is not None:
        return None
    config = _config_in(path)
    if config is not None:
        return _project(config, options)
    runs = portal_runs(path)
    if not runs:
        return None
    tomograms = [tomogram for run in runs for tomogram in portal_tomograms(run)]
    picks = [pick for run in runs for pick in portal_picks(run)]
    return source_of_runs("CryoET Data Portal runs", path, tomograms, picks, options)


def _config_in(path: Path) -> Path | None:
    if path.is_file():
        return path if _is_config(path) else None
    if not path.is_dir():
        return None
    configs = [file for file in itertools.islice(sorted(path.glob("*.json")), _FILES_TRIED) if _is_config(file)]
    if len(configs) > 1:
        raise DataError(f"{path}: {len(configs)} copick configurations ({configs[0].name}, …); name the file of one")
    if not configs and (path / "ExperimentRuns").is_dir():
        raise DataError(f"{path}: looks like a copick project without its configuration; name that file (.json)")
    return configs[0] if configs else None


def _is_config(path: Path) -> bool:
    """Whether a file is JSON with the keys of a copick configuration, which stand near its beginning or not at all."""
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        return False
    with path.open("rb") as file:
        if not file.read(_HEAD_BYTES).lstrip().startswith(b"{"):
            return False
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return "pickable_objects" in config and bool({"overlay_root", "static_root", "config_type"} & config.keys())


def _project(config_path: Path, options: ReadOptions) -> BoxSource:
    try:
        from copick.impl.filesystem import CopickConfigFSSpec, CopickRootFSSpec
    except ImportError as error:
        raise DataError(
            f"{config_path}: a copick project, which needs a package more: pip install 'studytool[copick]'"
        ) from error
    config = read_json(config_path)
    kind = config.get("config_type", "filesystem")
    if kind != "filesystem":
        raise DataError(f"{config_path}: a project of the type {str(kind)[:40]!r}, which is elsewhere; {_GET_A_COPY}")
    allowed = Path(os.path.realpath(options.root or config_path.parent))
    roots = {
        key: str(_local_folder(config_path, key, config[key], allowed))
        for key in ("overlay_root", "static_root")
        if config.get(key) is not None
    }
    with _one_line(config_path):
        root = CopickRootFSSpec(CopickConfigFSSpec(pickable_objects=config["pickable_objects"], **roots))
        tomograms = [tomogram for run in root.runs for tomogram in _tomograms(run)]
        picks = [_picks(run, pick) for run in root.runs for pick in run.picks]
    return source_of_runs("copick project", config_path.absolute().parent, tomograms, picks, options)


def _local_folder(config: Path, key: str, url: Any, allowed: Path) -> Path:
    """The folder that a root of the configuration names; relative ones count from the configuration."""
    text = url if isinstance(url, str) else ""
    name = _LOCAL.sub("", text, count=1)
    folder = Path(os.path.realpath(config.parent / name.replace("\0", "")))
    if not name or any(mark in f"{name} {folder}" for mark in ("://", "::", "\0")):
        raise DataError(f"{config}: {key} is {str(url)[:80]!r}, which is no folder of this machine; {_GET_A_COPY}")
    if not folder.is_dir():
        raise DataError(f"{config}: {key} is {folder}, which is not there; correct it in the configuration")
    require_inside(folder, allowed)
    return folder


def _tomograms(run: Any) -> Iterator[RunTomogram]:
    for spacing in run.voxel_spacings:
        for tomogram in spacing.tomograms:
            path = Path(tomogram.static_path if tomogram.read_only else tomogram.overlay_path)
            yield RunTomogram(run.name, float(spacing.voxel_size), (tomogram.tomo_type,), path)


def _picks(run: Any, pick: Any) -> RunPicks:
    path = Path(pick.path)
    by = f"{pick.user_id}/{pick.session_id}"
    return RunPicks(run.name, pick.pickable_object_name, by, path, partial(_points_angstrom, pick, path))


def _points_angstrom(pick: Any, path: Path) -> Points:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise DataError(f"{path}: {path.stat().st_size} bytes of JSON; {MAX_JSON_BYTES} are taken")
    with _one_line(path):
        content = pick.load()
        points = [
            np.array([point.location.z, point.location.y, point.location.x]) + point.transformation[2::-1, 3]
            for point in content.points or []
        ]
    unit = getattr(content, "unit", "angstrom")
    if unit != "angstrom":
        raise DataError(f"{path}: points in {unit!r}; copick has them in angstrom")
    return np.array(points, dtype=np.float64).reshape(-1, 3)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What copick and pydantic raise over a file or folder that is not as they want it, as one line."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError, RecursionError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"{path}: not as copick writes it: {' '.join(lines)[:200]}") from error
