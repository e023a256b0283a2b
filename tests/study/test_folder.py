from __future__ import annotations

import pytest
from fabricated_study import YAML, make_manifest, make_spec, make_trials
from rich.console import Console

from studytool.errors import StudytoolError
from studytool.report import page
from studytool.spec import load_study
from studytool.study.folder import find_study, keep_study, read_environment
from studytool.study.reporting import REPORT_LOG, dataset_if_here, results_of, try_report
from studytool.study.tracking import Tracker


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_spec(tmp_path)


def test_a_kept_study_is_the_same_study(spec, tmp_path):
    keep_study(spec, {"command": "studytool run"})
    found = find_study(str(spec.folder))
    elsewhere = {"data": {"path"}, "tracking": True}
    assert found.model_dump(exclude=elsewhere) == spec.model_dump(exclude=elsewhere)
    # From any folder it is the same dataset and store.
    assert found.data.path == str(tmp_path / "data" / "small")
    assert found.tracking.uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert read_environment(spec.folder) == {"command": "studytool run"}


@pytest.mark.parametrize("name", ["quickstart", "paper", "transformers"])
def test_every_kind_of_study_file_can_be_kept(name, tmp_path, request):
    path = request.config.rootpath / "search_spaces" / f"{name}.yaml"
    spec = load_study(path, [f"output={tmp_path}"])
    keep_study(spec, {})
    found = find_study(str(spec.folder))
    assert found.list_arms() == spec.list_arms()
    assert found.search == spec.search


def test_a_study_is_found_by_file_folder_name_and_experiment(spec, tmp_path):
    keep_study(spec, {})
    with Tracker("sqlite:///mlflow.db", spec) as tracker:
        tracker.open_study(YAML, {}, make_manifest(tmp_path))
        tracker.log_report([tmp_path / "study.yaml"])
    assert [path.name for path in spec.folder.glob("mlflow/*/artifacts/report/*")] == ["study.yaml"]
    for text in ("study.yaml", str(spec.folder), "fabricated"):
        assert find_study(text).name == "fabricated"
    moved = spec.folder.rename(tmp_path / "moved")
    assert find_study(str(moved)).folder == moved
    with pytest.raises(StudytoolError, match="no MLflow experiment of that name"):
        find_study("fabricated")  # the folder that the experiment names is gone


def test_an_experiment_leads_to_its_folder_from_anywhere(spec, tmp_path, monkeypatch):
    keep_study(spec, {})
    with Tracker("sqlite:///mlflow.db", spec) as tracker:
        tracker.open_study(YAML, {}, make_manifest(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = find_study("fabricated", tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert found.folder == spec.folder
    with pytest.raises(StudytoolError, match="no MLflow experiment of that name"):
        find_study("fabricated")
    assert list((tmp_path / "elsewhere").iterdir()) == [], "no store is made by asking"


def test_a_study_that_is_not_there_is_one_line(spec, tmp_path):
    with pytest.raises(StudytoolError, match="no such study file"):
        find_study("nothing.yaml")
    spec.folder.mkdir(parents=True)
    with pytest.raises(StudytoolError, match=r"holds no study.yaml"):
        find_study(str(spec.folder))
    with pytest.raises(StudytoolError, match="no trial has begun"):
        results_of(spec)
    assert dataset_if_here(spec) is None


def test_a_report_that_fails_is_a_line_and_a_log(spec, monkeypatch, capsys):
    records = [record for _, record in make_trials(spec)]

    def fail(*_arguments: object) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(page, "_html", fail)
    spec.folder.mkdir(parents=True)
    assert try_report(spec, records, None, Console(width=200), embed=False) == ()
    out = capsys.readouterr().out
    assert out.splitlines() == [
        f"no report could be written, see {spec.folder / REPORT_LOG}; the study itself is whole"
    ]
    log = (spec.folder / REPORT_LOG).read_text()
    assert "ZeroDivisionError: on purpose" in log
    assert "Traceback" in log
