from __future__ import annotations

import json
import os
import socket
import threading
import time

import pytest
from s3_server import KEYS, s3_client, s3_server

from studytool.errors import StudytoolError
from studytool.remote import RemoteFolder, open_remote
from studytool.study import storage
from studytool.study.storage import LEASE, Lease, Storage, fresh_workplace, holder_of


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    with pytest.MonkeyPatch.context() as patch, s3_server(port, tmp_path_factory.mktemp("s3") / "log"):
        for name, value in environment.items():
            patch.setenv(name, value)
        s3_client(port).create_dir("bucket")
        yield


@pytest.fixture
def address(s3, request, monkeypatch) -> str:
    monkeypatch.setattr(storage, "RENEW_SECONDS", 0.3)
    monkeypatch.setattr(storage, "LEASE_SECONDS", 2.0)
    return f"s3://bucket/studies/{request.node.name}"


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_working_copy_becomes_what_is_at_the_address(address, tmp_path):
    here, there = Storage(address, tmp_path / "here"), Storage(address, tmp_path / "there")
    for name in ("study.json", "trials/a/record.json", "trials/a/last.pt"):
        write(here.folder, name, name)
    here.push("study.json", "trials/a/last.pt", "trials/a/record.json", "trials/a/never-written")
    write(there.folder, "trials/old/record.json", "of an earlier study")
    write(there.folder, "mlflow/1/artifact", "stays")
    there.pull(without=["last.pt*"])
    found = {path.relative_to(there.folder).as_posix() for path in there.folder.rglob("*") if path.is_file()}
    assert found == {"study.json", "trials/a/record.json", "mlflow/1/artifact"}
    write(here.folder, "study.json", "study.jsoN")  # as long as before
    time.sleep(1.1)  # S3 tells seconds
    here.push("study.json")
    there.pull()
    assert (there.folder / "study.json").read_text() == "study.jsoN"
    here.remove("trials/a", ["last.pt*"])
    there.pull()
    assert sorted(path.name for path in (there.folder / "trials/a").iterdir()) == ["record.json"]


def test_what_was_trained_alone_on_this_machine_stays_there(address, tmp_path):
    copy = Storage(address, tmp_path)
    write(tmp_path, "single/best.json", "of studytool train")
    copy.push_all()
    copy.pull()
    assert (tmp_path / "single/best.json").is_file()
    write(tmp_path, "study.json", "{}")
    copy.push_all()
    assert open_remote(address).files().keys() == {"study.json"}


def test_a_driver_that_was_cut_off_in_a_push_does_not_write_over_the_next_one(tmp_path, monkeypatch, s3):
    monkeypatch.setattr(storage, "RENEW_SECONDS", 60.0)  # it does not notice by itself
    monkeypatch.setattr(storage, "LEASE_SECONDS", 1.0)
    address = "s3://bucket/studies/cut-off"
    lease = Lease(address)
    cut_off = Storage(address, tmp_path, before_retry=lease.look_and_check)
    write(tmp_path, "record.json", "epoch 1")
    cut_off.push("record.json")
    put = RemoteFolder.put

    def fail_once(*_words):
        monkeypatch.setattr(RemoteFolder, "put", put)
        (tmp_path / LEASE).write_text(json.dumps({"driver": "the next one, process 1", "id": "x"}))
        open_remote(address).put(tmp_path / LEASE, LEASE)
        raise ConnectionResetError("cut off")

    write(tmp_path, "record.json", "epoch 2")
    monkeypatch.setattr(RemoteFolder, "put", fail_once)
    with pytest.raises(StudytoolError, match=r"running in another process \(the next one, process 1\)"):
        cut_off.push("record.json")
    assert open_remote(address).read("record.json", most_bytes=100) == b"epoch 1"
    lease.close()
    assert holder_of(address)[0] == "the next one, process 1"


def test_a_worker_begins_with_what_the_address_has_of_its_trial(address, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDYTOOL_CACHE", str(tmp_path / "cache"))
    first = fresh_workplace(address, "t")
    write(first.folder, "last.pt", "epoch 1")
    first.push("last.pt")
    write(first.folder, "last.pt", "epoch 2, which was never pushed")
    assert (fresh_workplace(address, "t").folder / "last.pt").read_text() == "epoch 1"


def test_a_push_waits_for_the_end_of_an_outage(address, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        there = Storage("s3://bucket/study", tmp_path)
    write(tmp_path, "record.json", "whole")
    pushing = threading.Thread(target=there.push, args=["record.json"])
    pushing.start()
    time.sleep(2)
    assert pushing.is_alive()
    with s3_server(port, tmp_path / "log"):
        server = s3_client(port)
        server.create_dir("bucket")
        pushing.join(timeout=60)
        assert not pushing.is_alive()
        assert server.get_file_info("bucket/study/record.json").size == 5


def test_one_driver_at_a_time(address):
    lease = Lease(address)
    driver, seconds_ago = holder_of(address)
    assert driver == f"{socket.gethostname()}, process {os.getpid()}"
    assert -5 < seconds_ago < 60
    with pytest.raises(StudytoolError, match=rf"running in another process \(.*{os.getpid()}\)"):
        Lease(address)
    lease.check()
    lease.close()
    assert holder_of(address) is None
    Lease(address).close()


def test_the_lease_of_a_driver_that_was_killed_ends_by_itself(address, tmp_path):
    (tmp_path / LEASE).write_text(json.dumps({"driver": "another machine, process 1", "id": "x"}))
    open_remote(address).put(tmp_path / LEASE, LEASE)
    Lease(address).close()


def test_a_driver_that_was_cut_off_does_not_write_over_the_next_one(address, tmp_path):
    lease = Lease(address)
    (tmp_path / LEASE).write_text(json.dumps({"driver": "another machine, process 1", "id": "x"}))
    open_remote(address).put(tmp_path / LEASE, LEASE)
    with pytest.raises(StudytoolError, match="another machine, process 1"):
        check_for_ten_seconds(lease)
    lease.close()
    assert holder_of(address) is not None


def check_for_ten_seconds(lease):
    for _ in range(100):
        lease.check()
        time.sleep(0.1)
