from __future__ import annotations

import json
import logging
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from studytool.errors import WeightsError
from studytool.files import whole_file
from studytool.results import Cost, EpochResult, Scores
from studytool.spec import TrialSpec
from studytool.training.checkpoint import DAMAGED, LAST, PREVIOUS, TrialState, load_last, save_last
from studytool.training.trained import BestRecord, save_record

MakeTrial = Callable[..., TrialSpec]
PRINT = "f" * 64


def result(epoch: int) -> EpochResult:
    scores = Scores(3, 0.1 * epoch, 1.0, 1.0, 1.0, None, ((1, 0), (0, 2)))
    return EpochResult(epoch, 3 * epoch, 0.3, 1e-3, scores, Cost(train_seconds=1.5 * epoch, samples=9), 1, 0.7)


def state(epochs: int) -> TrialState:
    generator = torch.Generator().manual_seed(epochs)
    model = {"a": torch.randn(3, 5, generator=generator), "b": torch.tensor(epochs)}
    updater = {"optimizer": {"state": {0: {"step": torch.tensor(4.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]}}
    return TrialState(tuple(map(result, range(1, epochs + 1))), False, model, updater)


def same(one: TrialState, other: TrialState) -> bool:
    assert one.updater == other.updater
    return one.epochs == other.epochs and all(torch.equal(one.model[name], other.model[name]) for name in one.model)


def test_what_is_saved_comes_back(make_trial: MakeTrial, tmp_path: Path):
    trial = make_trial()
    assert load_last(tmp_path, trial, PRINT) is None
    save_last(tmp_path, state(2), trial, PRINT)
    loaded = load_last(tmp_path, trial, PRINT)
    assert loaded is not None
    assert same(loaded, state(2))


def test_it_holds_plain_values_only(make_trial: MakeTrial, tmp_path: Path):
    save_last(tmp_path, state(2), make_trial(), PRINT)
    content = torch.load(tmp_path / LAST, weights_only=True)
    assert content["config_hash"] == make_trial().config_hash(PRINT)
    assert content["data_fingerprint"] == PRINT
    assert len(json.loads(content["epochs"])) == 2


def test_the_generation_before_is_kept_and_used(
    make_trial: MakeTrial, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trial = make_trial()
    for epochs in (1, 2, 3):
        save_last(tmp_path, state(epochs), trial, PRINT)
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        loaded = load_last(tmp_path, trial, PRINT)
    assert loaded is not None
    assert same(loaded, state(2))
    assert "last.pt is damaged" in caplog.text
    assert (tmp_path / DAMAGED).exists()
    # The next checkpoint may not push the good generation out for the damaged one.
    save_last(tmp_path, state(3), trial, PRINT)
    (tmp_path / LAST).unlink()
    loaded = load_last(tmp_path, trial, PRINT)
    assert loaded is not None
    assert same(loaded, state(2))


@pytest.mark.parametrize(("damaged", "left"), [(False, 2), (True, 1)])
def test_a_write_that_is_killed_leaves_a_good_generation(
    make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool, left: int
):
    trial = make_trial()
    for epochs in (1, 2):
        save_last(tmp_path, state(epochs), trial, PRINT)
    if damaged:
        (tmp_path / LAST).write_bytes(b"")
        assert load_last(tmp_path, trial, PRINT) is not None

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save_last(tmp_path, state(3), trial, PRINT)
    loaded = load_last(tmp_path, trial, PRINT)
    assert loaded is not None
    assert same(loaded, state(left))


def test_both_damaged_is_an_error_not_a_fresh_start(make_trial: MakeTrial, tmp_path: Path):
    trial = make_trial()
    for epochs in (1, 2):
        save_last(tmp_path, state(epochs), trial, PRINT)
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=r"last\.pt is damaged .* remove .* to train the trial from the start"):
        load_last(tmp_path, trial, PRINT)


def test_what_came_of_another_trial_is_not_written_over(
    make_trial: MakeTrial, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    result = state(1).epochs[0]
    record = BestRecord(make_trial(), ("a", "b"), (12, 12, 12), 10.0, PRINT, "float32", result)
    save_record(tmp_path, record)
    assert load_last(tmp_path, make_trial(number=7, accumulate=4), PRINT) is None
    assert "no last.pt beside its best.json to go on from; training from the start" in caplog.text
    with pytest.raises(
        WeightsError, match=r"best\.json: made with train\.batch_size = 8, now 4; choose another folder"
    ):
        load_last(tmp_path, make_trial(batch_size=4), PRINT)
    with pytest.raises(WeightsError, match=r"best\.json: made with another dataset or split"):
        load_last(tmp_path, make_trial(), "e" * 64)
    (tmp_path / "best.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"best\.json is damaged .*; remove .* to train the trial from the start"):
        load_last(tmp_path, make_trial(), PRINT)


def test_every_flipped_bit_and_every_cut_is_noticed_or_harmless(make_trial: MakeTrial, tmp_path: Path):
    trial = make_trial()
    save_last(tmp_path, state(2), trial, PRINT)
    path = tmp_path / LAST
    whole = path.read_bytes()
    rng = random.Random(0)
    noticed = 0
    damages = [("flip", rng.randrange(len(whole))) for _ in range(250)]
    damages += [("cut", rng.randrange(len(whole))) for _ in range(50)]
    for kind, at in damages:
        flipped = bytes([whole[at] ^ (1 << rng.randrange(8))])
        path.write_bytes(whole[:at] + (flipped + whole[at + 1 :] if kind == "flip" else b""))
        try:
            loaded = load_last(tmp_path, trial, PRINT)
        except WeightsError:
            noticed += 1
            continue
        assert loaded is not None, (kind, at)
        assert same(loaded, state(2)), (kind, at)
    # The rest is padding and time stamps.
    assert noticed > 150


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_no_code_is_run(make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for write in (lambda p: torch.save({"model": Evil()}, p), lambda p: p.write_bytes(pickle.dumps(Evil()))):
        write(tmp_path / LAST)
        with pytest.raises(WeightsError, match="damaged or"):
            load_last(tmp_path, make_trial(), PRINT)
        assert not (tmp_path / "touched").exists()


def test_another_torch_file_is_no_checkpoint(make_trial: MakeTrial, tmp_path: Path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / LAST)
    with pytest.raises(WeightsError, match="no checkpoint of this version of studytool"):
        load_last(tmp_path, make_trial(), PRINT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.02}, r"made with train.learning_rate = 0.01, now 0.02"),
        ({"freeze": "stem"}, r"made with model.freeze = 'none', now 'stem'"),
        ({"seed": 2}, r"made with seed = 1, now 2"),
        ({"phase": "confirm"}, r"made with phase = 'search', now 'confirm'"),
        ({"select": "last"}, r"made with metric.select = 'best', now 'last'"),
    ],
)
def test_the_state_of_another_trial_is_refused(
    make_trial: MakeTrial, tmp_path: Path, changes: dict[str, object], message: str
):
    save_last(tmp_path, state(1), make_trial(), PRINT)
    with pytest.raises(WeightsError, match=message):
        load_last(tmp_path, make_trial(**changes), PRINT)


def test_the_state_on_another_dataset_is_refused(make_trial: MakeTrial, tmp_path: Path):
    save_last(tmp_path, state(1), make_trial(), PRINT)
    with pytest.raises(WeightsError, match="made with another dataset"):
        load_last(tmp_path, make_trial(), "e" * 64)


def test_a_moved_dataset_and_a_renamed_study_are_the_same_trial(make_trial: MakeTrial, tmp_path: Path):
    save_last(tmp_path, state(1), make_trial(), PRINT)
    assert load_last(tmp_path, make_trial(data_path="elsewhere", study="new", number=7), PRINT) is not None
    assert load_last(tmp_path, make_trial(data_split="renamed"), PRINT) is not None  # its content is in the fingerprint


def test_what_a_killed_trial_was_writing_is_removed(make_trial: MakeTrial, tmp_path: Path):
    leftovers = [tmp_path / f".{name}.x1.part" for name in ("last.pt", "best.safetensors", "best.json")]
    other = tmp_path / ".record.json.x1.part"
    for path in (*leftovers, other):
        path.write_text("half")
    assert load_last(tmp_path, make_trial(), PRINT) is None
    assert [path.exists() for path in leftovers] == [False] * 3
    assert other.exists(), "the driver's own file, which it may be writing at this moment"


def test_leftovers_have_the_names_of_unfinished_files(tmp_path: Path):
    with whole_file(tmp_path / LAST) as temporary:
        assert temporary.match(f".{LAST}.*.part")
        temporary.write_text("x")
