from __future__ import annotations

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from studytool import remote
from studytool.errors import DataError
from studytool.remote import is_remote, open_remote

CONTENT = bytes(range(256)) * 4096 * 12  # 12 MiB: more than one piece


@pytest.fixture
def unreliable():
    """A loopback web server with ranges that breaks off after 5 MiB as often as `failures` says."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body):
            if not self.path.endswith("shard"):
                self.send_error(404)
                return
            first, last = 0, len(CONTENT) - 1
            asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if server.ranges else None
            if asked:
                first, last = int(asked[1]), min(last, int(asked[2] or last))
            self.send_response(206 if asked else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
            self.end_headers()
            if not body:
                return
            if server.failures:
                server.failures -= 1
                self.wfile.write(CONTENT[first : first + 1000])
                self.close_connection = True
                return
            self.wfile.write(CONTENT[first : last + 1])

        def log_message(self, *_words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.failures = 0
    server.ranges = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def address(server):
    return f"http://127.0.0.1:{server.server_port}/data"


def test_what_is_an_address():
    assert is_remote("s3://bucket/data")
    assert not is_remote("/data/set")
    assert not is_remote("data")


def test_a_folder_at_an_address(tmp_path):
    (tmp_path / "data" / "splits").mkdir(parents=True)
    (tmp_path / "data" / "a").write_bytes(b"hello")
    (tmp_path / "data" / "splits" / "b.json").write_bytes(b"{}")
    folder = open_remote(f"file://{tmp_path}/data/")
    assert folder.read("a", most_bytes=5) == b"hello"
    assert folder.names("splits") == ("b.json",)
    assert folder.names("nothing") == ()
    folder.fetch("a", tmp_path / "copy", sha256=hashlib.sha256(b"hello").hexdigest())
    assert (tmp_path / "copy").read_bytes() == b"hello"
    with pytest.raises(DataError, match="data/c: there is no such file"):
        folder.fetch("c", tmp_path / "c")
    with pytest.raises(DataError, match=r"data/a: its SHA-256 is 2cf24dba5fb0…, it should be ffff"):
        folder.fetch("a", tmp_path / "wrong", sha256=64 * "f")
    with pytest.raises(DataError, match="5 bytes; at most 4"):
        folder.read("a", most_bytes=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "data"]


def test_an_outage_in_the_middle_of_a_file_is_waited_out(unreliable, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_AFTER_SECONDS", (0.01, 0.01))
    folder = open_remote(address(unreliable))
    unreliable.failures = 2
    folder.fetch("shard", tmp_path / "shard", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "shard").read_bytes() == CONTENT


def test_a_longer_outage_is_one_line_and_leaves_nothing(unreliable, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_AFTER_SECONDS", (0.01,))
    folder = open_remote(address(unreliable))
    unreliable.failures = 1000
    with pytest.raises(DataError, match=r"^http://.*/data/shard: cannot be read: .+") as caught:
        folder.fetch("shard", tmp_path / "shard")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_server_that_cannot_send_part_of_a_file_is_one_line(unreliable, tmp_path):
    unreliable.ranges = False
    with pytest.raises(DataError, match="shard: cannot be read in parts"):
        open_remote(address(unreliable)).fetch("shard", tmp_path / "shard")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("s3://key:secret@bucket/data", "s3://…: an address may not hold a key"),
        ("nonsense://x/y", "nonsense"),
    ],
)
def test_an_address_that_cannot_be_used(bad, message):
    with pytest.raises(DataError, match=message) as caught:
        open_remote(bad)
    assert "secret" not in str(caught.value)
