from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from studytool.errors import WeightsError
from studytool.models.adapt import StagedModel
from studytool.models.build import build_model
from studytool.results import Cost, EpochResult, Scores
from studytool.spec import TrialSpec
from studytool.training import trained
from studytool.training.trained import BestRecord, load_trained, save_best, save_record

MakeTrial = Callable[..., TrialSpec]


@pytest.fixture
def saved(make_trial: MakeTrial, tmp_path: Path) -> tuple[StagedModel, BestRecord, Path]:
    """A network with channels last whose backbone was frozen and pre-trained; the files of its fourth epoch."""
    trial = make_trial(freeze="stage1", time_axis="y", dropout=0.3)
    model = build_model(trial.model, num_classes=3, volume_shape_dhw=(10, 11, 12), seed=5)
    model.to(memory_format=torch.channels_last_3d)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.25)
    scores = Scores(3, 0.1, 1.0, 1.0, 1.0, 0.5, ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    result = EpochResult(4, 12, 0.3, 1e-3, scores, Cost(), 4, 1.0)
    record = BestRecord(
        trial=trial.model_copy(update={"model": trial.model.model_copy(update={"init": "kinetics400"})}),
        classes=("ball", "rod", "sheet"),
        volume_shape_dhw=(10, 11, 12),
        voxel_size_angstrom=13.5,
        data_fingerprint="f" * 64,
        precision="float32",
        result=result,
    )
    save_best(tmp_path, model, record)
    return model, record, tmp_path


def test_the_network_comes_back_as_it_was_without_its_pretrained_weights(saved: tuple[StagedModel, BestRecord, Path]):
    model, record, folder = saved
    trained = load_trained(folder)
    assert trained.classes == record.classes
    assert trained.trial == record.trial
    assert trained.record.result == record.result
    assert (trained.record.volume_shape_dhw, trained.record.voxel_size_angstrom) == ((10, 11, 12), 13.5)
    assert not trained.model.training
    x = torch.randn(2, 1, 10, 11, 12)
    with torch.no_grad():
        torch.testing.assert_close(trained.model(x), model.eval()(x))


def test_no_folder_of_a_trial(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"no best\.json there"):
        load_trained(tmp_path)


def test_a_flipped_bit_in_the_weights(saved: tuple[StagedModel, BestRecord, Path]):
    folder = saved[2]
    weights = folder / "best.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(WeightsError, match=r"best\.safetensors is damaged: its SHA-256"):
        load_trained(folder)


def test_weights_that_are_replaced_while_they_are_read(
    saved: tuple[StagedModel, BestRecord, Path], monkeypatch: pytest.MonkeyPatch
):
    model, record, folder = saved
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    read = trained.read_with_sha256

    def read_and_replace(path: Path) -> tuple[bytes, str]:
        found = read(path)
        torch.nn.init.zeros_(model.head.get_submodule("linear").weight)
        save_best(folder, model, record)
        return found

    monkeypatch.setattr(trained, "read_with_sha256", read_and_replace)
    loaded = load_trained(folder).model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.items())


def test_weights_that_are_gone(saved: tuple[StagedModel, BestRecord, Path]):
    folder = saved[2]
    (folder / "best.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"best\.safetensors is missing"):
        load_trained(folder)


def change(folder: Path, **values: object) -> None:
    path = folder / "best.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 99}, "format 99 is not of this version"),
        ({"volume_shape_dhw": [1, 2]}, r"best\.json is damaged"),
        ({"trial": {"study": "x"}}, "its trial is not one of this version"),
        ({"result": None}, r"best\.json is damaged"),
        ({"classes": ["one", "two"]}, "does not fit training_nets:convolutional"),
    ],
)
def test_a_record_that_does_not_fit(
    saved: tuple[StagedModel, BestRecord, Path], values: dict[str, object], message: str
):
    change(saved[2], **values)
    with pytest.raises(WeightsError, match=message) as caught:
        load_trained(saved[2])
    assert "\n" not in str(caught.value)


def test_a_torn_record(saved: tuple[StagedModel, BestRecord, Path]):
    path = saved[2] / "best.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(WeightsError, match=r"best\.json is damaged"):
        load_trained(saved[2])


def test_weights_that_are_not_written_yet(saved: tuple[StagedModel, BestRecord, Path]):
    save_record(saved[2], saved[1])
    with pytest.raises(WeightsError, match="has not ended, and its weights are not written yet"):
        load_trained(saved[2])
