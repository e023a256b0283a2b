from __future__ import annotations

import importlib.util
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_data import particles, write

from studytool.data.cachefolder import locked
from studytool.data.shards import open_dataset
from studytool.errors import DiskFullError
from studytool.models.adapt import Freezing
from studytool.models.backbones import BACKBONES
from studytool.models.build import build_model
from studytool.models.freeze import freeze
from studytool.results import EpochResult
from studytool.settings import InputSettings, ModelSettings
from studytool.spec import TrialSpec
from studytool.training.cut import find_cut
from studytool.training.features import CachedFeed, FeatureCache
from studytool.training.inputs import Feed
from studytool.training.loop import train_trial
from studytool.training.meter import CostMeter

MakeTrial = Callable[..., TrialSpec]
CPU = torch.device("cpu")
PLAIN = InputSettings(augment=())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDYTOOL_CACHE", str(tmp_path / "cache"))


def entries(tmp_path: Path) -> set[Path]:
    return {path for path in (tmp_path / "cache" / "features").iterdir() if path.is_dir()}


def make_cache(folder: Path, meter: CostMeter | None = None, **settings: object) -> FeatureCache:
    """The cache of a small frozen network on the dataset in `folder`."""
    dataset = open_dataset(folder)
    chosen = ModelSettings(**{"backbone": "training_nets:convolutional", "freeze": "stage1", **settings})
    model = build_model(chosen, num_classes=3, volume_shape_dhw=dataset.manifest.shape_dhw, seed=1)
    cut = find_cut(model, CPU)
    assert cut is not None
    return FeatureCache(model, cut, dataset, "float32", torch.contiguous_format, meter or CostMeter(CPU))


def cached_like(trial: TrialSpec) -> TrialSpec:
    return trial.model_copy(update={"cache": "auto"})


def curves(results: list[EpochResult]) -> list[float]:
    return [value for r in results for value in (r.train_loss, r.val.loss, r.val.balanced_accuracy)]


@pytest.mark.parametrize("point", ["stage1", "stage2", "backbone"])
@pytest.mark.parametrize("views", [None, 2])
def test_a_cached_trial_learns_the_same(make_trial: MakeTrial, tmp_path: Path, point: str, views: int | None):
    augment = () if views is None else ("turns", "shift", "noise")
    trial = make_trial(freeze=point, augment=augment, views=views, phase="confirm", dropout=0.2, max_epochs=4)
    plain = list(train_trial(trial, tmp_path / "plain"))
    cached = list(train_trial(cached_like(trial), tmp_path / "cached"))
    assert curves(cached) == pytest.approx(curves(plain), rel=1e-5)
    test, plain_test = cached[-1].test, plain[-1].test
    assert test is not None
    assert plain_test is not None
    assert test.confusion == plain_test.confusion
    assert test.loss == pytest.approx(plain_test.loss, rel=1e-5)
    assert len(entries(tmp_path)) == (views or 1) + 2  # train, val, test
    assert cached[-1].cost.samples == plain[-1].cost.samples


def test_validation_alone_is_kept_where_training_is_augmented_anew(make_trial: MakeTrial, tmp_path: Path):
    trial = make_trial(freeze="stage1")
    plain = list(train_trial(trial, tmp_path / "plain"))
    cached = list(train_trial(cached_like(trial), tmp_path / "cached"))
    assert [r.train_loss for r in cached] == [r.train_loss for r in plain]
    assert curves(cached) == pytest.approx(curves(plain), rel=1e-5)
    assert len(entries(tmp_path)) == 1


def test_the_first_trial_fills_and_the_others_read(make_trial: MakeTrial, tmp_path: Path):
    trials = [make_trial(freeze="stage1", augment=(), learning_rate=rate) for rate in (0.01, 0.02)]
    first, second = (
        list(train_trial(cached_like(trial), tmp_path / str(number)))[-1].cost for number, trial in enumerate(trials)
    )
    plain = list(train_trial(trials[1], tmp_path / "plain"))[-1].cost
    assert first.cache_fill_seconds > 10 * second.cache_fill_seconds  # which waited for nobody
    assert min(first.cache_saved_seconds, second.cache_saved_seconds) > 0
    assert second.flops < first.flops < plain.flops
    # The frozen part ran once over 21 + 12 volumes instead of three times.
    assert plain.flops - first.flops == pytest.approx(2 * (first.flops - second.flops))


def test_an_entry_that_is_there_needs_no_room(make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trial = cached_like(make_trial(freeze="stage1", augment=()))
    first = list(train_trial(trial, tmp_path / "first"))[-1].cost
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    second = list(train_trial(trial, tmp_path / "second"))[-1].cost
    assert second.cache_saved_seconds == pytest.approx(first.cache_saved_seconds)
    shutil.rmtree(tmp_path / "cache")
    third = list(train_trial(trial, tmp_path / "third"))[-1].cost
    assert third.cache_saved_seconds == 0
    assert not list((tmp_path / "cache" / "features").iterdir())


def test_waiting_for_another_trial_that_fills_is_the_caches_cost(dataset_folder: Path):
    meter = CostMeter(CPU)
    cache = make_cache(dataset_folder, meter)
    rows = cache.dataset.rows("val")
    entry, _ = cache.entry(rows, PLAIN, None, "evaluate")
    spent = meter.cache_fill_seconds
    waiting = make_cache(dataset_folder, meter)
    with locked(entry.folder):
        thread = threading.Thread(target=waiting.entry, args=(rows, PLAIN, None, "evaluate"))
        thread.start()
        time.sleep(0.5)
    thread.join()
    assert meter.cache_fill_seconds - spent == pytest.approx(meter.seconds("data"), abs=0.3)
    assert meter.cache_fill_seconds - spent > 0.3


def test_an_entry_that_cannot_be_replaced_costs_time_and_not_the_trial(
    make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trial = make_trial(freeze="stage1", augment=())
    plain = list(train_trial(trial, tmp_path / "plain"))
    list(train_trial(cached_like(trial), tmp_path / "first"))
    for entry in entries(tmp_path):
        (entry / "manifest.json").write_text("damaged")
    # As on NFS, which keeps a file under another name while someone reads it.
    monkeypatch.setattr("studytool.training.features.shutil.rmtree", lambda *_args, **_options: None)
    assert curves(list(train_trial(cached_like(trial), tmp_path / "second"))) == pytest.approx(curves(plain), rel=1e-5)


def test_a_resumed_trial_goes_on_to_the_last_bit(make_trial: MakeTrial, tmp_path: Path):
    trial = cached_like(make_trial(freeze="stage1", augment=("turns",), views=3, dropout=0.3))
    whole = list(train_trial(trial, tmp_path / "whole"))
    run = train_trial(trial, tmp_path / "stopped")
    next(run)
    run.close()
    resumed = list(train_trial(trial, tmp_path / "stopped"))
    assert curves(resumed) == curves(whole)


def test_the_views_of_a_volume_are_the_same_in_every_trial_and_epoch(dataset_folder: Path):
    dataset = open_dataset(dataset_folder)
    settings = InputSettings(augment=("turns", "noise"), views=2)

    def volumes(seed: int, epoch: int) -> dict[bytes, int]:
        feed = Feed(
            dataset,
            dataset.rows("train"),
            settings,
            batch_size=5,
            training=True,
            seed=seed,
            device=CPU,
            memory_format=torch.contiguous_format,
            meter=CostMeter(CPU),
        )
        return {
            v.numpy().tobytes(): int(label)
            for vs, labels in feed.epoch(epoch)
            for v, label in zip(vs, labels, strict=True)
        }

    assert volumes(1, 1) == volumes(2, 3)
    assert not set(volumes(1, 1)) & set(volumes(1, 2))


def test_an_entry_is_found_again_only_for_the_same(dataset_folder: Path, tmp_path: Path):
    rows = open_dataset(dataset_folder).rows("val")
    make_cache(dataset_folder).entry(rows, PLAIN, None, "train")
    [one] = entries(tmp_path)
    make_cache(dataset_folder).entry(rows, PLAIN, None, "train")
    assert entries(tmp_path) == {one}
    others = [
        lambda: make_cache(dataset_folder).entry(rows[1:], PLAIN, None, "train"),
        lambda: make_cache(dataset_folder).entry(rows, PLAIN, 0, "train"),
        lambda: make_cache(dataset_folder).entry(rows, PLAIN.model_copy(update={"normalize": "none"}), None, "train"),
        lambda: make_cache(dataset_folder, time_axis="y").entry(rows, PLAIN, None, "train"),
        lambda: make_cache(dataset_folder, freeze="stage2").entry(rows, PLAIN, None, "train"),
        lambda: make_cache(write(tmp_path / "other", particles(seed=9))).entry(rows, PLAIN, None, "train"),
    ]
    for number, other in enumerate(others, start=2):
        other()
        assert len(entries(tmp_path)) == number


def test_other_weights_are_another_entry(dataset_folder: Path, tmp_path: Path):
    rows = open_dataset(dataset_folder).rows("val")
    cache = make_cache(dataset_folder)
    cache.entry(rows, PLAIN, None, "train")
    with torch.no_grad():
        next(cache._model.parameters()).add_(1e-6)
    changed = FeatureCache(cache._model, cache.cut, cache.dataset, "float32", torch.contiguous_format, CostMeter(CPU))
    changed.entry(rows, PLAIN, None, "train")
    assert len(entries(tmp_path)) == 2


def test_another_network_with_the_same_weights_is_another_entry(
    make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(tmp_path)
    code = "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Sequential(nn.Conv3d(1, 4, 3), nn.{}()))\n"
    for module, activation in {"with_relu": "ReLU", "with_tanh": "Tanh"}.items():
        (tmp_path / f"{module}.py").write_text(code.format(activation))
        trial = make_trial(backbone=f"{module}:net", freeze="backbone", augment=())
        plain = list(train_trial(trial, tmp_path / f"{module}-plain"))
        cached = list(train_trial(cached_like(trial), tmp_path / module))
        assert cached[-1].cost.cache_fill_seconds > 0
        assert curves(cached) == pytest.approx(curves(plain), rel=1e-5)


def test_an_edited_network_is_another_entry(dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = make_cache(dataset_folder)
    rows = cache.dataset.rows("val")
    before = cache._name(rows, PLAIN, None)
    edited = tmp_path / "training_nets.py"
    edited.write_text("# edited")
    monkeypatch.setattr(sys.modules["training_nets"], "__file__", str(edited))
    assert make_cache(dataset_folder)._name(rows, PLAIN, None) != before


def _remove(folder: Path) -> None:
    shutil.rmtree(folder)


def _put_a_file_in_its_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


@pytest.mark.parametrize("augment", [(), ("turns", "noise")])
@pytest.mark.parametrize("spoil", [_remove, _put_a_file_in_its_place])
def test_a_cache_that_goes_away_costs_no_trial(
    make_trial: MakeTrial, tmp_path: Path, spoil: Callable[[Path], None], augment: tuple[str, ...]
):
    trial = make_trial(freeze="stage1", augment=augment, views=3 if augment else None, max_epochs=4)
    plain = curves(list(train_trial(trial, tmp_path / "plain")))
    results = []
    for result in train_trial(cached_like(trial), tmp_path / "cached"):
        results.append(result)
        if result.epoch == 1:
            spoil(tmp_path / "cache" / "features")
    assert curves(results) == pytest.approx(plain, rel=1e-5)


def test_without_a_folder_for_it_nothing_is_kept(
    make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STUDYTOOL_CACHE", str(tmp_path / "file"))
    trial = make_trial(freeze="stage1", augment=())
    cached = list(train_trial(cached_like(trial), tmp_path / "cached"))
    assert curves(cached) == curves(list(train_trial(trial, tmp_path / "plain")))


def test_a_full_disk_stops_no_trial(make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_particles: object, folder: Path, **_: object) -> None:
        raise DiskFullError(folder)

    monkeypatch.setattr("studytool.training.features.write_dataset", full)
    trial = make_trial(freeze="stage1", augment=())
    cached = list(train_trial(cached_like(trial), tmp_path / "cached"))
    assert curves(cached) == pytest.approx(curves(list(train_trial(trial, tmp_path / "plain"))), rel=1e-5)


def test_a_damaged_entry_is_made_again(dataset_folder: Path, tmp_path: Path):
    rows = open_dataset(dataset_folder).rows("val")
    entry, _ = make_cache(dataset_folder).entry(rows, PLAIN, None, "train")
    before = np.empty((len(rows), *entry.manifest.shape_dhw), np.float32)
    entry.gather(np.arange(len(rows)), before)
    [folder] = entries(tmp_path)
    shard = next(folder.glob("*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 4
    shard.write_bytes(content)
    meter = CostMeter(CPU)
    again, _ = make_cache(dataset_folder, meter).entry(rows, PLAIN, None, "train")
    assert meter.cache_fill_seconds > 0
    after = np.empty_like(before)
    again.gather(np.arange(len(rows)), after)
    assert (after == before).all()


def test_two_trials_that_want_the_same_entry_at_once_make_it_once(dataset_folder: Path):
    rows = open_dataset(dataset_folder).rows("train")
    meters = [CostMeter(CPU) for _ in range(4)]
    caches = [make_cache(dataset_folder, meter) for meter in meters]
    threads = [threading.Thread(target=cache.entry, args=(rows, PLAIN, None, "train")) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(meter.total().flops > 0 for meter in meters) == 1


def test_what_finds_no_room_is_computed_each_time(
    make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STUDYTOOL_CACHE_GB", "0.000001")
    trial = make_trial(freeze="stage1", augment=())
    cached = list(train_trial(cached_like(trial), tmp_path / "cached"))
    assert curves(cached) == curves(list(train_trial(trial, tmp_path / "plain")))
    assert not entries(tmp_path)


def test_entries_used_longest_ago_make_room(dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = open_dataset(dataset_folder)
    train, val = dataset.rows("train"), dataset.rows("val")
    cache = make_cache(dataset_folder)
    cache.entry(train, PLAIN, None, "train")
    [first] = entries(tmp_path)
    size = sum(path.stat().st_size for path in first.iterdir())
    monkeypatch.setenv("STUDYTOOL_CACHE_GB", str(1.2 * size / 1e9))
    cache.entry(val, PLAIN, None, "evaluate")
    [left] = entries(tmp_path)
    assert left != first


@pytest.mark.parametrize(
    "changes",
    [{"freeze": "none"}, {"freeze": "norm_only"}, {"freeze": "gradual"}, {"frozen_batchnorm": "train"}],
    ids=lambda changes: next(iter(changes.values())),
)
def test_nothing_is_cut_where_the_frozen_part_changes(changes: dict[str, str]):
    settings = ModelSettings(**{"backbone": "training_nets:convolutional", "freeze": "stage1", **changes})
    model = build_model(settings, num_classes=3, volume_shape_dhw=(12, 12, 12), seed=1)
    assert find_cut(model, CPU) is None


def test_a_stem_is_not_worth_keeping_on_a_gpu():
    settings = ModelSettings(backbone="r2plus1d_18", freeze="stem")
    model = build_model(settings, num_classes=3, volume_shape_dhw=(32, 32, 32), seed=1)
    assert find_cut(model, CPU) is not None
    assert find_cut(model, torch.device("cuda")) is None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "r2plus1d_tiny" else [pytest.mark.slow]) for name in BACKBONES]
)
def test_every_backbone_and_freeze_point_gives_the_same_loss_and_gradients(name: str, tmp_path: Path):
    """From what a cache holds as from the volumes: 1e-5 in float32."""
    backbone = BACKBONES[name]
    if backbone.package and importlib.util.find_spec(backbone.package) is None:
        pytest.skip(f"the optional package {backbone.package} is not installed")
    folder = write(tmp_path / "data", particles(counts={"train": 1, "val": 1}))
    dataset = open_dataset(folder)
    rows = dataset.rows("train")
    volumes = torch.zeros(len(rows), 1, *dataset.manifest.shape_dhw, dtype=torch.float16)
    dataset.gather(rows, volumes)
    labels = torch.from_numpy(dataset.labels[rows])
    settings = ModelSettings(backbone=name)
    model = build_model(settings, num_classes=3, volume_shape_dhw=dataset.manifest.shape_dhw, seed=1)
    unnormalized = InputSettings(augment=(), normalize="none")
    for point in (*backbone.stages, "backbone"):
        model.freezing = Freezing(point, 2, 0.75)
        freeze(model)
        cut = find_cut(model, CPU)
        if cut is None:  # a stem that only cuts patches
            assert point == "stem"
            continue
        cache = FeatureCache(model, cut, dataset, "float32", torch.contiguous_format, CostMeter(CPU))
        feed = CachedFeed(cache, rows, unnormalized, batch_size=len(rows), training=False, seed=0)
        [(activations, cached_labels)] = feed.epoch(0)
        assert (cached_labels == labels).all()
        model.eval()
        found = []
        for inputs, after in ((volumes.float(), None), (activations, feed.after)):
            model.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs, after=after), labels)
            loss.backward()
            norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
            found.append((loss.item(), norms))
        assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
        assert found[1][1] == pytest.approx(found[0][1], rel=1e-4, abs=1e-6)
