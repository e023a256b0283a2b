from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest

from studytool.data.importing import import_dataset
from studytool.data.manifest import MANIFEST_NAME
from studytool.data.readers.shardset import recognize
from studytool.data.readers.source import ReadOptions
from studytool.data.shards import open_dataset
from studytool.errors import DataError
from studytool.settings import ImportSettings

NOTHING_SAID = ReadOptions()


def test_everything_that_is_known_is_kept(dataset_folder, volumes, tmp_path):
    source = recognize(dataset_folder, NOTHING_SAID)
    settings = ImportSettings(normalize="none", exclude=("0012",))
    manifest = import_dataset(source, tmp_path / "out", settings, workers=1)
    before, after = open_dataset(dataset_folder), open_dataset(tmp_path / "out")
    kept = np.flatnonzero(before.labels != 0)
    assert manifest.classes == ("apoferritin", "ribosome")
    assert manifest.voxel_size_angstrom == 13.5
    for name in ("particle_ids", "tomograms", "splits", "snr", "positions_zyx"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name)[kept])
    np.testing.assert_array_equal(after.labels, before.labels[kept] - 1)
    stored = np.zeros((len(kept), 6, 6, 6), np.float16)
    after.gather(np.arange(len(kept)), stored)
    np.testing.assert_array_equal(stored, volumes[kept])
    assert manifest.provenance["source"]["provenance"] == {"made": "here"}
    assert source.notes == ()


def test_positions_follow_the_voxel_size(dataset_folder, tmp_path):
    source = recognize(dataset_folder, NOTHING_SAID)
    import_dataset(source, tmp_path / "out", ImportSettings(rescale_to_angstrom=27.0), workers=1)
    positions = open_dataset(tmp_path / "out").positions_zyx[4]
    np.testing.assert_allclose(positions, [2, 4, 0.25])


def test_a_source_travels_to_other_processes(dataset_folder, volumes):
    source = pickle.loads(pickle.dumps(recognize(dataset_folder, NOTHING_SAID)))
    np.testing.assert_array_equal(source.read(source.entries[450]).volume_DHW, volumes[450].astype(np.float32))


def test_damage_does_not_get_a_new_checksum(dataset_folder, tmp_path):
    shutil.copytree(dataset_folder, tmp_path / "copy")
    path = tmp_path / "copy" / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    content[int(open_dataset(tmp_path / "copy")._starts[500])] ^= 1
    path.write_bytes(content)
    source = recognize(tmp_path / "copy", NOTHING_SAID)
    source.read(source.entries[399])
    with pytest.raises(DataError, match=r"part-00001.parquet: its checksum differs"):
        source.read(source.entries[400])


def test_other_folders_are_none_and_broken_datasets_are_refused(dataset_folder, tmp_path):
    assert recognize(tmp_path, NOTHING_SAID) is None
    (tmp_path / MANIFEST_NAME).write_text('{"name": "a browser extension"}')
    assert recognize(tmp_path, NOTHING_SAID) is None
    shutil.copytree(dataset_folder, tmp_path / "copy")
    content = json.loads((tmp_path / "copy" / MANIFEST_NAME).read_text())
    (tmp_path / "copy" / MANIFEST_NAME).write_text(json.dumps({**content, "format_version": 2}))
    with pytest.raises(DataError, match="format_version is 2"):
        recognize(tmp_path / "copy", NOTHING_SAID)
