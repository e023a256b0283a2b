from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from studytool.errors import DataError, WeightsError
from studytool.models import backbones
from studytool.models.backbones import BACKBONES, Backbone, WeightsFile
from studytool.models.weights import (
    check_file,
    fetch_checkpoint,
    fetch_weights,
    list_weights,
    missing_weights,
    record_digest,
    weights_folder,
    weights_path,
)

CONTENT = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT; `cut` ends the first answer early, `resumes` says whether it honours Range."""

    cut: int | None = None
    resumes = True
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.asked.append(wanted)
        if self.path == "/absent.pth":
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.resumes else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        stop = self.server.cut
        self.server.cut = None
        self.wfile.write(CONTENT[start:stop])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STUDYTOOL_WEIGHTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def published(server: Server, monkeypatch: pytest.MonkeyPatch) -> WeightsFile:
    return publish(monkeypatch, WeightsFile("net.pth", f"http://127.0.0.1:{server.server_port}/net.pth", DIGEST[:8]))


def publish(monkeypatch: pytest.MonkeyPatch, file: WeightsFile) -> WeightsFile:
    """Have the table name `file` as the Kinetics-400 weights of x3d_s."""
    facts = {**vars(BACKBONES["x3d_s"]), "weights": {"kinetics400": file}}
    monkeypatch.setattr(backbones, "BACKBONES", {"x3d_s": Backbone(**facts)})
    return file


def test_the_folder_is_that_of_the_variable_or_that_of_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights_folder() == folder
    monkeypatch.delenv("STUDYTOOL_WEIGHTS")
    monkeypatch.setenv("TORCH_HOME", str(folder / "home"))
    assert weights_folder() == folder / "home" / "hub" / "checkpoints"


def test_missing_files_are_named_with_what_to_do(folder: Path) -> None:
    assert missing_weights("r2plus1d_18", "random") is None
    for init in ("kinetics400", "shuffled"):
        message = missing_weights("r2plus1d_18", init)
        assert message is not None
        assert str(folder / "r2plus1d_18-91a641e6.pth") in message
        assert "studytool weights fetch r2plus1d_18" in message
        assert "https://download.pytorch.org/models/r2plus1d_18-91a641e6.pth" in message
        assert "\n" not in message
    assert "`studytool weights fetch r3d_18 --init imagenet_inflated`" in (
        missing_weights("r3d_18", "imagenet_inflated") or ""
    )
    by_hand = missing_weights("r3d_34", "kinetics400")
    assert by_hand is not None
    assert "download resnet-34-kinetics.pth from https://github.com/kenshohara" in by_hand
    (folder / "resnet-34-kinetics.pth").touch()
    assert missing_weights("r3d_34", "kinetics400") is None


def test_a_checkpoint_may_have_an_address(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "best.safetensors").write_bytes(b"weights")
    init = f"checkpoint:file://{tmp_path}/there/best.safetensors"
    fetch_checkpoint(init)
    path = weights_path("r3d_18", init)
    assert path is not None
    assert path.parent == folder
    assert path.read_bytes() == b"weights"
    assert missing_weights("r3d_18", init) is None
    with pytest.raises(DataError, match=r"there/none.safetensors: there is no such file"):
        fetch_checkpoint(init.replace("best", "none"))
    fetch_checkpoint("random")
    fetch_checkpoint("checkpoint:a/local/file")


def test_a_checkpoint_is_a_file_or_a_trials_folder(folder: Path) -> None:
    init = f"checkpoint:{folder / 'trial'}"
    assert "there is no file" in (missing_weights("x3d_s", init) or "")
    (folder / "trial").mkdir()
    assert weights_path("x3d_s", init) == folder / "trial" / "best.safetensors"
    (folder / "trial" / "best.safetensors").touch()
    assert missing_weights("x3d_s", init) is None


def test_a_file_is_fetched_checked_and_recorded(published: WeightsFile, folder: Path, server: Server) -> None:
    progress: list[tuple[int, int | None]] = []
    path = fetch_weights("x3d_s", "kinetics400", lambda done, total: progress.append((done, total)))
    assert path == folder / "net.pth"
    assert path.read_bytes() == CONTENT
    assert progress[-1] == (len(CONTENT), len(CONTENT))
    assert check_file(path, published).state == "published"
    assert sorted(p.name for p in folder.iterdir()) == ["net.pth", "net.pth.sha256"]
    assert fetch_weights("x3d_s", "kinetics400") == path
    assert server.asked == [None]


def test_an_interrupted_download_goes_on_where_it_stopped(published: WeightsFile, folder: Path, server: Server) -> None:
    server.cut = 1_000_000
    with pytest.raises(WeightsError, match=r"the connection ended after 1000000 of 1280000 bytes; run the command"):
        fetch_weights("x3d_s", "kinetics400")
    assert [p.name for p in folder.iterdir()] == ["net.pth.part"]
    path = fetch_weights("x3d_s", "kinetics400")
    assert path is not None
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-"]


def test_a_server_that_cannot_resume_sends_all_again(published: WeightsFile, folder: Path, server: Server) -> None:
    (folder / "net.pth.part").write_bytes(b"x" * 100)
    server.resumes = False
    path = fetch_weights("x3d_s", "kinetics400")
    assert path is not None
    assert path.read_bytes() == CONTENT


def test_a_download_that_was_whole_is_only_renamed(published: WeightsFile, folder: Path, server: Server) -> None:
    (folder / "net.pth.part").write_bytes(CONTENT)
    path = fetch_weights("x3d_s", "kinetics400")
    assert path is not None
    assert path.read_bytes() == CONTENT


def test_another_file_than_the_published_one_is_refused_and_removed(
    published: WeightsFile, folder: Path, server: Server
) -> None:
    (folder / "net.pth.part").write_bytes(b"x" * 100)
    with pytest.raises(WeightsError, match="its SHA-256 is"):
        fetch_weights("x3d_s", "kinetics400")
    assert list(folder.iterdir()) == []


def test_what_cannot_be_fetched_is_said(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, WeightsFile("absent.pth", f"http://127.0.0.1:{server.server_port}/absent.pth"))
    with pytest.raises(WeightsError, match=r"absent.pth: HTTP Error 404.*copy the file to"):
        fetch_weights("x3d_s", "kinetics400")
    publish(monkeypatch, WeightsFile("hand.pth", "", page="https://example.org/page"))
    with pytest.raises(WeightsError, match=r"download hand\.pth from https://example\.org/page and put it there"):
        fetch_weights("x3d_s", "kinetics400")
    assert fetch_weights("x3d_s", "random") is None


def test_the_digest_decides(folder: Path) -> None:
    path = folder / "net.pth"
    path.write_bytes(CONTENT)
    assert check_file(path, WeightsFile("net.pth", "", DIGEST)).state == "published"
    assert check_file(path, WeightsFile("net.pth", "", "")).state == "unchecked"
    with pytest.raises(WeightsError, match="the published file's begins with 00000000"):
        check_file(path, WeightsFile("net.pth", "", "00000000"))
    record_digest(path)
    assert check_file(path, WeightsFile("net.pth", "", "00000000")).state == "recorded"
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(WeightsError, match=r"but net.pth.sha256 says"):
        check_file(path, WeightsFile("net.pth", "", ""))


def test_the_list_says_the_state_of_every_file(folder: Path) -> None:
    (folder / "r3d_18-b3b3357e.pth").write_bytes(b"damaged")
    (folder / "X3D_S.pyth").write_bytes(b"whatever")
    states = {(row.backbone, row.init): row.state for row in list_weights(("r3d_18", "x3d_s"))}
    assert "SHA-256" in states["r3d_18", "kinetics400"]
    assert states["r3d_18", "imagenet_inflated"] == "missing"
    assert states["x3d_s", "kinetics400"] == "unchecked"
