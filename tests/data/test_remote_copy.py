from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from mlflow_server import free_port
from s3_server import KEYS, s3_server

from studytool.data.particles import Particle
from studytool.data.remote_copy import local_copy
from studytool.data.shards import open_dataset, write_dataset
from studytool.errors import DataError


def write(folder, seed=0, count=40):
    rng = np.random.default_rng(seed)
    particles = [
        Particle(f"p{i}", "ab"[i % 2], f"t{i % 4}", ("train", "val", "test", "train")[i % 4],
                 rng.normal(size=(8, 8, 8)).astype(np.float32), 10.0)
        for i in range(count)
    ]  # fmt: skip
    write_dataset(particles, folder, dtype="float32", provenance={}, volumes_per_shard=16)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDYTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "datasets"


def volumes(folder):
    dataset = open_dataset(folder)
    out = np.empty((len(dataset), 8, 8, 8), np.float32)
    dataset.gather(np.arange(len(dataset)), out)
    return out


def test_a_path_is_used_where_it_is(tmp_path, cache):
    assert local_copy(str(tmp_path / "data")) == tmp_path / "data"
    assert not cache.exists()


def test_a_dataset_at_an_address_is_copied_once(tmp_path, cache):
    here = write(tmp_path / "data")
    (here / "splits").mkdir()
    (here / "splits" / "a.json").write_text("{}")
    copy = local_copy(f"file://{here}")
    assert np.array_equal(volumes(copy), volumes(here))
    assert (copy / "splits" / "a.json").read_text() == "{}"
    times = {path.name: path.stat().st_mtime_ns for path in copy.glob("*.parquet")}
    (here / "splits" / "b.json").write_text("{}")
    assert local_copy(f"file://{here}", look_again=True) == copy
    assert {path.name: path.stat().st_mtime_ns for path in copy.glob("*.parquet")} == times
    assert (copy / "splits" / "b.json").exists(), "splits made since are fetched"


def test_a_copy_that_is_there_needs_no_server(tmp_path, cache):
    here = write(tmp_path / "data")
    copy = local_copy(f"file://{here}")
    shutil.rmtree(here)
    assert local_copy(f"file://{here}/") == copy
    with pytest.raises(DataError, match="there is no such file"):
        local_copy(f"file://{here}", look_again=True)
    write(here, seed=1)
    assert local_copy(f"file://{here}", look_again=True) != copy


def test_a_damaged_shard_is_refused_and_not_kept(tmp_path, cache):
    here = write(tmp_path / "data")
    shard = here / "part-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"part-00001\.parquet: its SHA-256 is"):
        local_copy(f"file://{here}")
    [folder] = [path for path in cache.iterdir() if path.is_dir()]
    assert not (folder / "part-00001.parquet").exists()
    assert not (folder / "manifest.json").exists()


def test_a_hostile_manifest_is_refused_before_anything_is_fetched(tmp_path, cache):
    here = write(tmp_path / "data")
    manifest = json.loads((here / "manifest.json").read_text())
    manifest["shards"][0]["name"] = "../../escape.parquet"
    (here / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"^file://.*manifest.json: .*not a plain name"):
        local_copy(f"file://{here}")
    assert not list(cache.glob("*/*.parquet"))


def test_an_interrupted_copy_goes_on(tmp_path, cache):
    here = write(tmp_path / "data")
    hidden = tmp_path / "part-00002.parquet"
    (here / "part-00002.parquet").rename(hidden)
    with pytest.raises(DataError, match=r"part-00002\.parquet: there is no such file"):
        local_copy(f"file://{here}")
    [folder] = [path for path in cache.iterdir() if path.is_dir()]
    before = (folder / "part-00000.parquet").stat().st_mtime_ns
    hidden.rename(here / "part-00002.parquet")
    (folder / ".part-00002.parquet.abc.part").write_bytes(b"of a process that was killed")
    assert np.array_equal(volumes(local_copy(f"file://{here}")), volumes(here))
    assert (folder / "part-00000.parquet").stat().st_mtime_ns == before
    assert not list(folder.glob(".*"))


def test_what_was_used_longest_ago_makes_room(tmp_path, cache, monkeypatch):
    datasets = [write(tmp_path / f"data{i}", seed=i) for i in range(3)]
    size = sum(path.stat().st_size for path in datasets[0].iterdir())
    monkeypatch.setenv("STUDYTOOL_CACHE_GB", str(2.5 * size / 1e9))
    first, second = (local_copy(f"file://{folder}") for folder in datasets[:2])
    os.utime(second, (1, 1))
    third = local_copy(f"file://{datasets[2]}")
    assert first.exists()
    assert third.exists()
    assert not second.exists()


def test_a_dataset_larger_than_the_cache_is_one_line(tmp_path, cache, monkeypatch):
    here = write(tmp_path / "data")
    monkeypatch.setenv("STUDYTOOL_CACHE_GB", "1e-6")
    with pytest.raises(DataError, match="STUDYTOOL_CACHE_GB"):
        local_copy(f"file://{here}")
    monkeypatch.setenv("STUDYTOOL_CACHE_GB", "much")
    with pytest.raises(DataError, match="STUDYTOOL_CACHE_GB is 'much'"):
        local_copy(f"file://{here}")


_FETCH = "import sys; from studytool.data.remote_copy import local_copy; print(local_copy(sys.argv[1]))"


@pytest.mark.end_to_end
def test_several_processes_share_one_copy_from_a_real_s3_server(tmp_path, cache, monkeypatch):
    here = write(tmp_path / "data", count=400)
    port = free_port()
    environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with s3_server(port, tmp_path / "server.log"):
        from pyarrow import fs

        s3 = fs.S3FileSystem(allow_bucket_creation=True, endpoint_override=environment["AWS_ENDPOINT_URL"])
        s3.create_dir("bucket")
        fs.copy_files(str(here), "bucket/folder/data", destination_filesystem=s3)
        processes = [
            subprocess.Popen([sys.executable, "-c", _FETCH, "s3://bucket/folder/data"], stdout=subprocess.PIPE)
            for _ in range(2)
        ]
        answers = {process.communicate(timeout=100)[0].decode().strip() for process in processes}
        [copy] = answers
        assert np.array_equal(volumes(local_copy("s3://bucket/folder/data", look_again=True)), volumes(here))
        log = (tmp_path / "server.log").read_text()
        assert log.count("GET /bucket/folder/data/part-00003.parquet") == 1, "fetched once, by one of them"
        shutil.rmtree(copy)
        over_http = local_copy(f"{environment['AWS_ENDPOINT_URL']}/bucket/folder/data")
        assert np.array_equal(volumes(over_http), volumes(here))
        with pytest.raises(DataError, match=r"s3://bucket/other/manifest\.json: there is no such file"):
            local_copy("s3://bucket/other")
