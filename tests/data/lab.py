"""MRC files as a lab brings them, and the import from end to end, for the tests of both."""

from __future__ import annotations

import mrcfile
import numpy as np
import pytest

from studytool.data.importing import import_dataset, plan_import, recognize
from studytool.data.readers.source import ReadOptions
from studytool.data.shards import open_dataset
from studytool.errors import DataError
from studytool.settings import ImportSettings

KEEP = {"normalize": "none", "dtype": "float32"}


def volume(number, shape=(6, 6, 6)):
    return np.random.default_rng(number).standard_normal(shape).astype(np.float32)


def write_mrc(path, data, voxel_size=10.0, patch=None, **header):
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(data)
        mrc.set_volume()
        mrc.voxel_size = voxel_size
        for name, value in header.items():
            mrc.header[name] = value
    if patch:
        content = bytearray(path.read_bytes())
        for at, value in patch.items():
            content[at : at + len(value)] = value
        path.write_bytes(content)
    return path


def make_lab(folder):
    """Two classes of five volumes; `0012` is a name, not a number."""
    for number in range(10):
        write_mrc(folder / ("ribosome", "0012")[number % 2] / f"p{number:02d}.mrc", volume(number))
    return folder


def run(source, out, options=None, workers=1, on_progress=None, skip_bad=False, **changes):
    found, settings = recognize(source, options or ReadOptions()), ImportSettings(**changes)
    return import_dataset(found, out, settings, skip_bad=skip_bad, workers=workers, on_progress=on_progress)


def plan(source, options=None, skip_bad=False, **changes):
    return plan_import(recognize(source, options or ReadOptions()), ImportSettings(**changes), skip_bad=skip_bad)


def load(folder):
    dataset = open_dataset(folder)
    volumes = np.zeros((len(dataset), *dataset.manifest.shape_dhw), dataset.manifest.dtype)
    dataset.gather(np.arange(len(dataset)), volumes)
    names = [dataset.manifest.classes[label] for label in dataset.labels]
    return dataset, dict(zip(dataset.particle_ids.tolist(), volumes, strict=True)), names


def refused(call, *words):
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    return message
