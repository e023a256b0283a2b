"""What one trial leaves for the next: nothing that changes a bit of it, and nothing out of date."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training_data import particles, write

from studytool.errors import DataError
from studytool.models.build import build_model
from studytool.results import Cost, EpochResult
from studytool.settings import ModelSettings
from studytool.spec import TrialSpec
from studytool.training import kept as kept_module
from studytool.training.kept import Kept
from studytool.training.loop import train_trial

MakeTrial = Callable[..., TrialSpec]
SHAPE = (12, 12, 12)


def run(trial: TrialSpec, folder: Path, kept: Kept | None = None) -> tuple[list[EpochResult], bytes]:
    """A trial's results without what they cost, and its weights."""
    results = [replace(r, cost=Cost()) for r in train_trial(trial, folder, kept=kept)]
    return results, (folder / "best.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"augment": ("turns", "shift", "noise"), "dropout": 0.2, "phase": "confirm"},
        {"freeze": "gradual", "gradual_epochs": 1, "ema": 0.9, "channels_last": "off"},
        {"freeze": "stage1", "frozen_batchnorm": "train", "accumulate": 2},
    ],
    ids=["augmented", "gradual and averaged", "frozen"],
)
def test_a_trial_after_others_equals_one_in_a_fresh_process_to_the_last_bit(
    make_trial: MakeTrial, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    trial = make_trial(**changes)
    alone = run(trial, tmp_path / "alone")
    kept = Kept()
    run(make_trial(**{**changes, "learning_rate": 0.1}), tmp_path / "before", kept)
    run(make_trial(**{**changes, "backbone": "training_nets:patches"}), tmp_path / "another", kept)
    next(walk := train_trial(make_trial(**changes, number=3), tmp_path / "pruned", kept=kept))
    walk.close()
    monkeypatch.setattr(kept_module, "build_model", lambda *_a, **_k: pytest.fail("a network was built again"))
    monkeypatch.setattr(kept_module, "open_dataset", lambda *_a, **_k: pytest.fail("the dataset was opened again"))
    assert run(trial, tmp_path / "after", kept) == alone


def test_a_dataset_that_was_made_anew_is_opened_anew(make_trial: MakeTrial, tmp_path: Path):
    data, kept = write(tmp_path / "data", particles()), Kept()
    trial = make_trial(data_path=str(data))
    first = run(trial, tmp_path / "first", kept)
    shutil.rmtree(data)
    changed = [replace(p, volume_DHW=p.volume_DHW[::-1].copy()) for p in particles()]
    write(data, changed)
    second = run(trial, tmp_path / "second", kept)
    assert second == run(trial, tmp_path / "alone")
    assert second != first


def test_a_lost_shard_is_noticed(tmp_path: Path):
    data, kept = write(tmp_path / "data", particles()), Kept()
    assert kept.dataset(data, "stored") is kept.dataset(data, "stored")
    next(data.glob("*.parquet")).unlink()
    with pytest.raises(DataError, match="missing, though the manifest lists it"):
        kept.dataset(data, "stored")


def test_weights_that_were_replaced_are_read_anew(make_trial: MakeTrial, tmp_path: Path):
    run(make_trial(max_epochs=1), tmp_path / "source")
    file, kept = tmp_path / "mine.safetensors", Kept()
    shutil.copy(tmp_path / "source" / "best.safetensors", file)
    settings = ModelSettings(backbone="training_nets:convolutional", init=f"checkpoint:{file}")

    def stem() -> torch.Tensor:
        model = kept.network(settings, num_classes=3, volume_shape_dhw=SHAPE, seed=1)
        return next(model.stages["stem"].parameters()).detach()

    before = stem()
    assert torch.equal(stem(), before)
    save_file({name: 2 * t if t.is_floating_point() else t for name, t in load_file(file).items()}, file)
    assert torch.equal(stem(), 2 * before)


@pytest.mark.parametrize(
    ("backbone", "init", "times"),
    [("r2plus1d_tiny", "file", 1), ("r2plus1d_tiny", "random", 2), ("training_nets:convolutional", "file", 2)],
)
def test_weights_from_a_file_are_read_once_for_all_seeds(
    make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str, init: str, times: int
):
    run(make_trial(max_epochs=1, backbone=backbone), tmp_path / "source")
    shutil.copy(tmp_path / "source" / "best.safetensors", file := tmp_path / "mine.safetensors")
    settings = ModelSettings(backbone=backbone, init=f"checkpoint:{file}" if init == "file" else init, freeze="stage1")
    given: dict[str, Any] = {"num_classes": 3, "volume_shape_dhw": SHAPE}
    expected, kept, built = [build_model(settings, **given, seed=seed) for seed in (1, 2)], Kept(), []
    monkeypatch.setattr(kept_module, "build_model", lambda *a, **k: built.append(1) or build_model(*a, **k))
    for seed in (1, 2, 1, 2):
        model, alone = kept.network(settings, **given, seed=seed), expected[seed - 1]
        assert list(model.state_dict()) == list(alone.state_dict())
        assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in alone.parameters()]
    assert len(built) == times
    assert not torch.equal(
        expected[0].state_dict()["head.linear.weight"], expected[1].state_dict()["head.linear.weight"]
    )


def test_what_is_trained_is_never_what_is_kept():
    settings, kept = ModelSettings(backbone="training_nets:convolutional"), Kept()
    for _ in range(3):
        model = kept.network(settings, num_classes=3, volume_shape_dhw=SHAPE, seed=1)
        assert not any(bool((p == 7).any()) for p in model.parameters())
        for parameter in model.parameters():
            parameter.data.fill_(7)


def test_no_more_is_kept_than_it_may():
    settings = [ModelSettings(backbone="training_nets:convolutional", dropout=d / 10) for d in range(4)]
    size = kept_module._size_bytes(Kept().network(settings[0], num_classes=3, volume_shape_dhw=SHAPE, seed=1))
    for most, left in [(0, 0), (size - 1, 0), (2 * size, 2)]:
        kept = Kept(most_bytes=most)
        for chosen in settings:
            kept.network(chosen, num_classes=3, volume_shape_dhw=SHAPE, seed=1)
        assert len(kept._networks) == left


def test_a_network_with_a_function_that_knows_it_is_not_copied():
    plain = nn.Sequential(nn.Linear(2, 2))
    knowing = nn.Sequential(nn.Linear(2, 2))
    knowing.register_forward_hook(lambda *_: knowing[0].weight.sum() and None)
    assert kept_module._can_be_copied(plain)
    assert not kept_module._can_be_copied(knowing)
