from __future__ import annotations

import importlib.metadata
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from studytool.doctor import places
from studytool.doctor.examine import Wanted, compare_versions, examine, paths_of_one_machine, wanted_by
from studytool.doctor.finding import Finding

ROOT = Path(__file__).parents[2]


def one(findings) -> Finding:
    (finding,) = findings
    return finding


def test_this_machine_can_run_a_study(tmp_path):
    found = examine(Wanted(output=str(tmp_path / "studies")))
    by_name = {finding.what: finding for finding in found.findings}
    assert {"python", "packages", "torch", "disk", "clock", "output", "weights"} <= set(by_name)
    assert [finding for finding in found.findings if finding.state == "fail"] == []
    assert found.versions["torch"] == importlib.metadata.version("torch")
    assert list(tmp_path.iterdir()) == []


def test_every_line_that_is_not_ok_says_what_to_do(tmp_path):
    wanted = Wanted(
        output=str(tmp_path), data=str(tmp_path / "none"), tracking_uri="http://127.0.0.1:9", weights=(("r3d_18", "x"),)
    )
    for finding in examine(wanted).findings:
        assert "\n" not in str(finding)
        assert finding.mend or finding.state == "ok"


def test_what_looking_at_raises_is_a_finding(tmp_path):
    finding = {f.what: f for f in examine(Wanted(output=str(tmp_path), weights=(("no_such", "x"),))).findings}[
        "weights"
    ]
    assert finding.state == "fail"
    assert "no_such" in finding.found


def test_a_study_says_what_it_needs():
    wanted = wanted_by(ROOT / "search_spaces/r2plus1d.yaml", ["output=/shared/studies"])
    assert wanted.output == "/shared/studies/r2plus1d"
    assert wanted.weights == (("r2plus1d_18", "kinetics400"), ("r2plus1d_18", "random"))
    assert wanted.data_can_be_made
    assert wanted.tracking_uri == "sqlite:///mlflow.db"


def test_missing_weights_are_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDYTOOL_WEIGHTS", str(tmp_path))
    finding = one(places.look_at_weights([("r2plus1d_18", "kinetics400"), ("r2plus1d_18", "random")]))
    assert finding.state == "fail"
    assert str(tmp_path) in finding.found
    assert "studytool weights fetch r2plus1d_18" in finding.mend


@pytest.mark.parametrize(
    ("made", "simulated", "state"), [(True, False, "ok"), (False, True, "ok"), (False, False, "fail")]
)
def test_data(tmp_path, made, simulated, state):
    if made:
        (tmp_path / "manifest.json").write_text("{}")
    assert one(places.look_at_data(str(tmp_path), can_be_made=simulated)).state == state


def test_an_output_that_cannot_be_written_to():
    finding = one(places.look_at_output("/proc/studies"))
    assert finding.state == "fail"
    assert "/proc" in finding.found


def test_an_output_at_an_address_is_written_read_and_deleted(tmp_path):
    assert one(places.look_at_output(tmp_path.as_uri())).state == "ok"
    assert list(tmp_path.iterdir()) == []
    assert one(places.look_at_output((tmp_path / "none").as_uri())).state == "fail"


def test_mlflow_that_answers_and_one_that_does_not(tmp_path):
    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
            self.wfile.write(b"OK")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        assert one(places.look_at_mlflow(uri)).state == "ok"
        server.shutdown()
    assert one(places.look_at_mlflow(uri)).state == "fail"
    assert one(places.look_at_mlflow(f"sqlite:///{tmp_path}/x/mlflow.db")).state == "ok"
    assert one(places.look_at_mlflow("sqlite:////proc/mlflow.db")).state == "fail"


def test_nodes_with_other_versions_are_named():
    same = {"a": {"torch": "2.15.0", "ray": "2.60.0"}, "b": {"torch": "2.15.0", "ray": "2.60.0"}}
    assert compare_versions(same).state == "ok"
    finding = compare_versions({**same, "c": {"torch": "2.14.0"}})
    assert finding.state == "fail"
    assert "torch (2.14.0, 2.15.0)" in finding.found
    assert "ray (2.60.0, missing)" in finding.found


def test_relative_paths_do_not_work_on_several_nodes():
    wanted = Wanted(output="studies/x", data="s3://bucket/data")
    assert [finding.what for finding in paths_of_one_machine(wanted)] == ["output"]
    assert paths_of_one_machine(Wanted(output="/shared/x", data="/shared/data")) == ()
