from __future__ import annotations

from typer.testing import CliRunner

from studytool.cli import app
from studytool.errors import StudytoolError


def test_a_line_for_each_thing_and_an_error_where_something_has_to_be_mended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = CliRunner().invoke(app, ["doctor"])
    assert good.exit_code == 0, good.output
    lines = good.output.splitlines()
    assert all(line.split()[0] in ("ok", "warn") for line in lines)
    assert any("torch" in line for line in lines)

    study = tmp_path / "x.yaml"
    study.write_text("name: x\ndata: {path: none}\ntracking: {uri: 'http://127.0.0.1:9'}\n")
    bad = CliRunner().invoke(app, ["doctor", str(study)])
    assert bad.exit_code == 1
    assert isinstance(bad.exception, StudytoolError)
    assert str(bad.exception).startswith("2 of ")
    assert "fail  data" in bad.output
    assert "fail  mlflow" in bad.output
