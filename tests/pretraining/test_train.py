from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from studytool.errors import DataError, TrainingError
from studytool.files import sha256_of
from studytool.models.backbones import BACKBONES
from studytool.models.build import build_model
from studytool.models.weights import SHIPPED, weights_path
from studytool.pretraining import sources
from studytool.pretraining.sources import GeneratedClips
from studytool.pretraining.train import PretrainProgress, pretrain
from studytool.settings import ModelSettings

CLIP = (8, 12, 12)
SHAPE = (24, 24, 24)


@pytest.fixture(autouse=True)
def _few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_HELD_OUT_CLIPS", 32)


def _features(init: str, backbone: str = "r2plus1d_tiny") -> torch.Tensor:
    model = build_model(ModelSettings(backbone=backbone, init=init), num_classes=3, volume_shape_dhw=SHAPE, seed=1)
    volumes = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval().features(volumes)


def test_the_weights_and_card_are_written_and_are_repeatable(tmp_path: Path) -> None:
    progress: list[PretrainProgress] = []
    cards = [
        pretrain(
            out=tmp_path / name / "w.safetensors", clips=24, clip_thw=CLIP, batch_size=8, on_progress=progress.append
        )
        for name in ("a", "b")
    ]
    assert cards[0] == json.loads((tmp_path / "a" / "w.json").read_text())
    assert cards[0]["sha256"] == cards[1]["sha256"] == sha256_of(tmp_path / "a" / "w.safetensors")
    assert set(cards[0]["held_out_accuracy"]) == {"shape", "motion", "all"}
    assert [(p.step, p.steps) for p in progress] == [(3, 3), (3, 3)]


def test_a_pre_trained_checkpoint_starts_a_trial_of_its_backbone(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    pretrain(out=path, clips=8, clip_thw=CLIP, batch_size=4)
    model = build_model(
        ModelSettings(backbone="r2plus1d_tiny", init=f"checkpoint:{path}"),
        num_classes=3,
        volume_shape_dhw=SHAPE,
        seed=1,
    )
    assert model.load_report.share == 1.0
    stored = load_file(path)["stages.stage2.layers.0.weight"]
    assert stored.dtype == torch.float16
    assert torch.equal(model.state_dict()["stages.stage2.layers.0.weight"], stored.float())


def test_it_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batch again and again is learnt by heart."""
    [batch] = GeneratedClips(16, clip_thw=CLIP, seed=0).batches(1, 16)
    monkeypatch.setattr(GeneratedClips, "batches", lambda self, epoch, size: iter([batch]))
    monkeypatch.setattr(GeneratedClips, "held_out", lambda self, size: iter([batch]))
    card = pretrain(out=tmp_path / "w.safetensors", clips=16, clip_thw=CLIP, batch_size=16, epochs=30)
    assert card["held_out_accuracy"]["all"] > 0.8


def test_a_loss_that_is_not_finite_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        GeneratedClips,
        "batches",
        lambda self, epoch, size: iter([(torch.full((4, 1, *CLIP), torch.nan), torch.zeros(4, 2).long())]),
    )
    with pytest.raises(TrainingError, match="epoch 1, step 1: the loss is nan"):
        pretrain(out=tmp_path / "w.safetensors", clips=4, clip_thw=CLIP, batch_size=4)
    assert not (tmp_path / "w.safetensors").exists()


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has to end in \.safetensors"):
        pretrain(out=tmp_path / "w.pt", clips=8)
    with pytest.raises(DataError, match="1 clips are too few"):
        pretrain(out=tmp_path / "w.safetensors", clips=1)


def test_the_shipped_checkpoint_is_what_its_card_says() -> None:
    path = weights_path("r2plus1d_tiny", "motion")
    assert path is not None
    assert path.parent == SHIPPED
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["sha256"] == sha256_of(path) == BACKBONES["r2plus1d_tiny"].weights["motion"].digest
    assert path.stat().st_size == card["bytes"] <= 2_000_000
    assert card["parameters"] <= 600_000
    accuracy = card["held_out_accuracy"]
    assert all(accuracy[name] > 2 / len(classes) for name, classes in card["questions"].items())


@pytest.mark.slow
def test_the_shipped_checkpoint_names_motions_as_its_card_says() -> None:
    """Its features, without a head of their own, tell held-out clips apart far better than shuffled weights do."""
    accuracy = {}
    [train_batch] = GeneratedClips(256, clip_thw=SHAPE, seed=11).batches(1, 256)
    [test_batch] = GeneratedClips(128, clip_thw=SHAPE, seed=12).batches(1, 128)
    for init in ("motion", "shuffled"):
        model = build_model(
            ModelSettings(backbone="r2plus1d_tiny", init=init), num_classes=3, volume_shape_dhw=SHAPE, seed=1
        ).eval()
        with torch.no_grad():
            features, others = (model.features(batch[0]).double() for batch in (train_batch, test_batch))
        mean, deviation = features.mean(0), features.std(0) + 1e-6
        features, others = (features - mean) / deviation, (others - mean) / deviation
        truth = torch.nn.functional.one_hot(train_batch[1][:, 0], 8).double()
        weights = torch.linalg.solve(features.T @ features + 30 * torch.eye(features.shape[1]), features.T @ truth)
        accuracy[init] = float(((others @ weights).argmax(1) == test_batch[1][:, 0]).double().mean())
    assert accuracy["motion"] > 0.45
    assert accuracy["motion"] > accuracy["shuffled"] + 0.15


def test_motion_is_loaded_whole_and_shuffled_has_its_statistics() -> None:
    models = {
        init: build_model(
            ModelSettings(backbone="r2plus1d_tiny", init=init), num_classes=3, volume_shape_dhw=SHAPE, seed=1
        )
        for init in ("motion", "shuffled")
    }
    for model in models.values():
        assert model.load_report.share == 1.0
        assert model.load_report.check == "published"
        assert not model.load_report.missing
    name = "stages.stage1.layers.0.weight"
    motion, shuffled = (models[init].state_dict()[name].flatten() for init in ("motion", "shuffled"))
    assert not torch.equal(motion, shuffled)
    assert torch.equal(motion.sort().values, shuffled.sort().values)
    assert not torch.allclose(_features("motion"), _features("shuffled"))
