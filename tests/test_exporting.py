from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from trained_trial import train_small_trial

from studytool.data.shards import open_dataset
from studytool.errors import DataError, StudytoolError
from studytool.exporting import FORMATS, TOLERANCE, Deployed, export_trial
from studytool.predict import predict_dataset
from studytool.training.calibration import Calibration, with_temperature, write_calibration
from studytool.training.trained import read_best


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exporting")


@pytest.fixture(scope="module")
def trial(home: Path) -> Path:
    """A trial on volumes whose contrast was inverted at their import."""
    folder = train_small_trial(home, inverted=True, filter="dog", low_pass_angstrom=25.0, high_pass_angstrom=100.0)
    # A temperature that does not depend on how much so small a network has learned.
    write_calibration(folder, Calibration(0.5, 16, 0.7, 0.6, 0.5, 0.1, read_best(folder).sha256))
    return folder


def raw_volumes(home: Path) -> np.ndarray:
    """The test split's volumes as the lab had them: dark particles, with an offset and a scale."""
    dataset = open_dataset(home / "data")
    rows = dataset.rows("test")
    stored = np.empty((len(rows), *dataset.manifest.shape_dhw), np.float16)
    dataset.gather(rows, stored)
    return (40 - 12.5 * stored.astype(np.float32))[:, None]


def check(trial: Path, home: Path, run) -> None:
    """The exported file gives for raw volumes, one or many, what `predict` gives for the imported ones."""
    wanted = with_temperature(predict_dataset(trial, home / "data", "test", device="cpu").probabilities, 0.5)
    raw = raw_volumes(home)
    assert np.ptp(wanted[:, 0]) > 50 * TOLERANCE, "the volumes do not all look the same to the network"
    np.testing.assert_allclose(run(raw), wanted, atol=TOLERANCE)
    np.testing.assert_allclose(run(raw[3:4]), wanted[3:4], atol=TOLERANCE)


@pytest.mark.parametrize(
    "name",
    [
        "exported-program",
        "torchscript",
        pytest.param("onnx", marks=pytest.mark.slow),
        pytest.param("mlflow", marks=pytest.mark.slow),
    ],
)
def test_raw_volumes_go_in_and_the_same_probabilities_come_out(trial: Path, home: Path, tmp_path: Path, name: str):
    for package in FORMATS[name].packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the optional package {package} is not installed")
    if name == "onnx":
        with pytest.raises(StudytoolError, match="the filter dog of this trial cannot be written as onnx"):
            export_trial(trial, name, tmp_path / "network")
        home = tmp_path.with_name("plain")
        trial = train_small_trial(home, inverted=True)
        write_calibration(trial, Calibration(0.5, 16, 0.7, 0.6, 0.5, 0.1, read_best(trial).sha256))
    out = tmp_path / "network"
    lines = export_trial(trial, name, out)
    assert "inverted as at the import" in lines[0]
    check(trial, home, FORMATS[name].open(out))
    card = json.loads((tmp_path / "network.json").read_text())
    assert card["classes"] == ["ball", "long rod"]
    assert card["inverts_contrast"]
    assert card["voxel_size_angstrom"] == 10.0
    assert 0 <= card["largest_difference"] <= card["tolerance"] == TOLERANCE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network", "network.json"]


def test_the_contrast_is_the_users_to_say(trial: Path, home: Path, tmp_path: Path):
    assert "as the training data has it" in export_trial(trial, "torchscript", tmp_path / "a.pt", invert=False)[0]
    run = FORMATS["torchscript"].open(tmp_path / "a.pt")
    check(trial, home, lambda raw: run(-raw))


def test_a_trial_of_few_digits_is_exported_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trial = train_small_trial(tmp_path / "home", precision="bfloat16")
    # So small a network differs by little; here it is made more.
    write_calibration(trial, Calibration(0.003, 16, 0.7, 0.6, 0.5, 0.1, read_best(trial).sha256))
    monkeypatch.setattr("studytool.exporting.TOLERANCE", 2e-5)
    assert "checked on 8 volumes" in export_trial(trial, "torchscript", tmp_path / "a.pt")[1]


@pytest.mark.parametrize("name", ["exported-program", "torchscript"])
def test_one_volume_to_check_on_is_enough(trial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr("studytool.exporting._CHECKED", 1)
    assert "checked on 1 volumes" in export_trial(trial, name, tmp_path / "a")[1]
    assert FORMATS[name].open(tmp_path / "a")(np.zeros((5, 1, 16, 16, 16), np.float32)).shape == (5, 2)


def test_neither_the_trial_nor_what_is_there_is_written_over(trial: Path, tmp_path: Path):
    def files():
        return {path: path.read_bytes() for folder in (trial, tmp_path) for path in folder.rglob("*") if path.is_file()}

    (tmp_path / "a.pt").write_text("somebody's network")
    (tmp_path / "b.pt.json").write_text("somebody's notes")
    before = files()
    for form in FORMATS:
        if not all(importlib.util.find_spec(package) for package in FORMATS[form].packages):
            continue
        for name in ("best", "best.safetensors", "calibration", "new.pt"):
            with pytest.raises(DataError, match="is in the trial's own folder"):
                export_trial(trial, form, trial / name)
        for name, there in (("a.pt", r"a\.pt"), ("b.pt", r"b\.pt\.json")):
            with pytest.raises(DataError, match=f"{there}: exists already; choose another name, or remove it"):
                export_trial(trial, form, tmp_path / name)
    assert files() == before


def test_a_file_that_gives_other_numbers_gets_no_name(trial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    forward = Deployed.forward
    monkeypatch.setattr(Deployed, "forward", lambda self, volumes: forward(self, volumes**3))
    with pytest.raises(DataError, match="not written: the exported file's probabilities differ by"):
        export_trial(trial, "torchscript", tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_one_line(trial: Path, tmp_path: Path):
    with pytest.raises(DataError, match="unknown format 'onxx'; did you mean 'onnx'"):
        export_trial(trial, "onxx", tmp_path / "a")
    with pytest.raises(DataError, match="exists already"):
        export_trial(trial, "mlflow", tmp_path)
    with pytest.raises(StudytoolError, match=r"no best\.json there"):
        export_trial(tmp_path, "torchscript", tmp_path / "a.pt")
