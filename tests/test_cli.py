"""The command line: quick to answer, one line for what the user can mend, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "ray", "mlflow", "pyarrow", "pandas", "optuna", "pydantic", "rich", "numpy")


def studytool(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "studytool.cli", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        check=False,
    )


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "sys.argv = ['studytool', '--help']\n"
        "from studytool.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "run" in done.stdout
    assert done.stdout.strip().endswith("LOADED []")


def test_what_the_user_can_mend_is_one_line_and_exit_code_1(tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\ndata: {path: d}\ntrain: {epochs: 3}\n")
    done = studytool("run", "a.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("studytool: a.yaml:3: train.epochs: unknown key 'epochs'")
    assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.end_to_end
def test_a_missing_dataset_is_named_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\ndata: {path: absent}\n")
    done = studytool("run", "a.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert "absent" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize("words", [["rnu", "a.yaml"], ["run"], ["run", "a.yaml", "--sett", "x=1"]])
def test_wrong_usage_is_exit_code_2(tmp_path, words):
    assert studytool(*words, cwd=tmp_path).returncode == 2


@pytest.mark.end_to_end
def test_missing_weights_stop_the_study_before_its_first_trial(tmp_path, monkeypatch):
    """Kinetics weights that are neither cached nor to be had: one line that says which file to put where."""
    monkeypatch.setenv("STUDYTOOL_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    text = (ROOT / "search_spaces" / "r2plus1d.yaml").read_text()
    (tmp_path / "r.yaml").write_text(text)
    small = ["data.simulate.volumes_per_class=10"]
    done = studytool("run", "r.yaml", *(word for text in small for word in ("--set", text)), cwd=tmp_path)
    assert done.returncode == 1
    assert "r2plus1d_18-91a641e6.pth" in done.stderr
    assert str(tmp_path / "weights") in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "studies").exists()


@pytest.mark.end_to_end
def test_a_dataset_simulated_in_another_way_is_not_used(tmp_path):
    small = "volumes_per_class: 10, classes: 2, side: 16, voxel_size_angstrom: 20.0"
    (tmp_path / "a.yaml").write_text(f"name: a\ndata: {{path: d, simulate: {{{small}}}}}\n")
    assert studytool("data", "simulate", "a.yaml", cwd=tmp_path).returncode == 0
    assert studytool("data", "verify", "d", cwd=tmp_path).returncode == 0
    done = studytool("run", "a.yaml", "--set", "data.simulate.snr=0.7", cwd=tmp_path)
    assert done.returncode == 1
    assert "d: was simulated with snr = 0.1, data.simulate.snr now says 0.7" in done.stderr
    assert not (tmp_path / "studies").exists()


@pytest.mark.end_to_end
def test_an_output_folder_that_cannot_be_made_is_one_line(tmp_path):
    small = "volumes_per_class: 10, classes: 2, side: 16, voxel_size_angstrom: 20.0"
    (tmp_path / "a.yaml").write_text(f"name: a\ndata: {{path: d, simulate: {{{small}}}}}\n")
    (tmp_path / "file").write_text("in the way")
    done = studytool("run", "a.yaml", "--set", "output=file", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("file/a: Not a directory\n")
    assert done.stderr.count("\n") == 1
