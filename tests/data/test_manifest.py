from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from studytool.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, fingerprint_of, read_manifest, write_manifest
from studytool.errors import DataError


@pytest.fixture
def manifest():
    shards = (ShardEntry("part-00000.parquet", 5, 999, "a" * 64), ShardEntry("part-00001.parquet", 2, 400, "b" * 64))
    return Manifest(
        format_version=1,
        fingerprint=fingerprint_of(shards),
        classes=("apoferritin", "ribosome"),
        counts={"apoferritin": {"train": 3, "": 1}, "ribosome": {"train": 2, "test": 1}},
        tomograms=("t0",),
        shape_dhw=(8, 6, 4),
        dtype="float16",
        voxel_size_angstrom=10.0,
        shards=shards,
        provenance={"snr": "infinite", "nested": {"a": [1, 2.5, None]}},
    )


def test_what_is_written_is_read(tmp_path, manifest):
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_derived_numbers(manifest):
    assert manifest.num_volumes == 7
    assert manifest.volume_bytes == 8 * 6 * 4 * 2
    assert manifest.split_counts() == {"train": 5, "test": 1, "": 1}


def test_fingerprint_depends_on_shards_and_their_order(manifest):
    assert fingerprint_of(manifest.shards) != fingerprint_of(manifest.shards[::-1])
    assert len(manifest.fingerprint) == 64


SHARD = {"name": "part.parquet", "rows": 7, "bytes": 1, "sha256": "a" * 64}
BROKEN = {
    "format_version is 2": {"format_version": 2},
    "format_version is '1'": {"format_version": "1"},
    "colour": {"colour": "red"},
    "dtype": {"dtype": "float64"},
    "shape_dhw": {"shape_dhw": [8, 6]},
    "has to be positive": {"shape_dhw": [8, 6, 0]},
    "voxel_size_angstrom": {"voxel_size_angstrom": 0},
    "classes have to be sorted": {"classes": ["ribosome", "apoferritin"]},
    "other classes": {"counts": {"apoferritin": {"train": 7}}},
    "unknown split 'dev'": {"counts": {"apoferritin": {"dev": 4}, "ribosome": {"train": 3}}},
    "counts add up to 8": {"counts": {"apoferritin": {"train": 5}, "ribosome": {"train": 3}}},
    "fingerprint does not belong": {"fingerprint": "c" * 64},
    "'../part.parquet' is not a plain name": {
        "shards": [{"name": "../part.parquet", "rows": 7, "bytes": 1, "sha256": "a" * 64}]
    },
    "sha256": {"shards": [{"name": "part.parquet", "rows": 7, "bytes": 1, "sha256": "zz"}]},
    "rows": {"shards": [{"name": "part.parquet", "rows": -7, "bytes": 1, "sha256": "a" * 64}]},
    "shards have to be listed": {"shards": []},
}


@pytest.mark.parametrize("expected", BROKEN)
def test_contradictions_are_refused_in_one_line(tmp_path, manifest, expected):
    content = {**asdict(manifest), **BROKEN[expected]}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path)
    message = str(caught.value)
    assert expected in message
    assert MANIFEST_NAME in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"format_version": NaN}', b"[" * 100_000])
def test_what_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(DataError, match=MANIFEST_NAME):
        read_manifest(tmp_path)


def test_missing_folder_and_missing_manifest_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a finished studytool dataset"):
        read_manifest(tmp_path)
