"""`last.pt`: all that a stopped trial needs to go on, whole or not there, with the generation before it beside it.

It is written with `torch.save` and holds tensors, numbers and strings only. Nobody has to trust it: its checksums are
verified, nothing in it is run, and a trial never goes on from the state of another one. Parameters that stay frozen are
not in it: most of a network would be written again and again, and be the same.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from studytool.errors import WeightsError
from studytool.files import disk_full_explained, whole_file
from studytool.models.adapt import StagedModel
from studytool.models.freeze import frozen_parameters
from studytool.results import EpochResult, epoch_from_dict, to_dict
from studytool.settings import HANDLING
from studytool.spec import TrialSpec
from studytool.training.trained import RECORD, read_best

LAST = "last.pt"
PREVIOUS = "last.pt.previous"
DAMAGED = "last.pt.damaged"
FORMAT = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialState:
    """A trial after some epochs. A finished one needs its results only, so `model` and `updater` are empty.

    `selected` has the weights of the selected epoch, unless that is the last one. `frozen` is the `fingerprint` of the
    parameters that both lack.
    """

    epochs: tuple[EpochResult, ...]
    finished: bool
    model: dict[str, torch.Tensor]
    updater: dict[str, Any]
    selected: dict[str, torch.Tensor] = field(default_factory=dict)
    frozen: str = ""


def fingerprint(model: nn.Module, names: Collection[str]) -> str:
    """Tells these parameters from others of the same names and shapes, by sums of their bits; of none it is empty.

    It notices weights that were replaced by chance or by mistake; `studytool.models.weights` those tampered with.
    """
    parameters = dict(model.named_parameters())
    sums = {name: _sum_of_bits(parameters[name]) for name in sorted(names)}
    return f"{zlib.crc32(json.dumps(sums).encode()):08x}" if sums else ""


def _sum_of_bits(parameter: nn.Parameter) -> int:
    # In the order in which they lie in memory, which is quickest and may be another one when the trial is resumed.
    numbers = parameter.detach().cpu().as_strided((parameter.numel(),), (1,))
    return int(numbers.view(_INTEGERS[numbers.itemsize]).numpy().sum(dtype=np.int64))


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def restore_model(model: StagedModel, state: TrialState, folder: Path) -> None:
    """Put the state of a trial in `folder` into its model, as it was built for the trial.

    Raises:
        WeightsError: the state's is another network, or was trained on other frozen weights.
    """
    # Before anything is loaded: trials that are trained together share what is frozen, running statistics too.
    names = model.state_dict().keys()
    missing, unknown = names - state.model.keys(), state.model.keys() - names
    if unknown or not missing <= frozen_parameters(model) or fingerprint(model, missing) != state.frozen:
        raise WeightsError(
            f"{folder / LAST}: was trained on other weights than those the network now has; put the earlier ones back, "
            f"or remove {folder} to train the trial from the start"
        )
    model.load_state_dict(state.model, strict=False)


def save_last(folder: Path, state: TrialState, trial: TrialSpec, data_fingerprint: str) -> None:
    """Write `last.pt`, over the generation before it; the one that was there becomes the generation before it."""
    content = {
        "format": FORMAT,
        "trial": trial.model_dump_json(),
        "data_fingerprint": data_fingerprint,
        "config_hash": trial.config_hash(data_fingerprint),
        "epochs": json.dumps([to_dict(epoch) for epoch in state.epochs], allow_nan=False),
        **{name: getattr(state, name) for name in _STATE},
    }
    last = folder / LAST
    # Where there is no `last.pt`, as it was damaged, the generation before it is all there is.
    with whole_file(last, over=folder / PREVIOUS if last.exists() else None) as temporary:
        with temporary.open("r+b") as file:
            torch.save(content, file)
            file.truncate()
        if last.exists():
            last.replace(folder / PREVIOUS)


def repeat_last(folder: Path) -> None:
    """Make a copy of `last.pt` the generation before it; what the disk holds of the copy does not matter yet."""
    copy = folder / f".{LAST}.copy.part"
    with disk_full_explained(copy):
        shutil.copyfile(folder / LAST, copy)
    copy.replace(folder / PREVIOUS)


def load_last(folder: Path, trial: TrialSpec, data_fingerprint: str) -> TrialState | None:
    """The state to go on from; None where none was written yet.

    A damaged `last.pt` is put aside, with a warning, for the generation before it.

    Raises:
        WeightsError: the state is of another trial or another dataset, or nothing of it can be read although it is
            there: a trial is never silently begun again.
    """
    _remove_unfinished(folder)
    problems: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            content = _read(path)
        except WeightsError as error:
            problems.append(str(error))
            continue
        _check_same_trial(path, content, trial, data_fingerprint)
        if problems:
            (folder / LAST).replace(folder / DAMAGED)
            _log.warning("%s; going on from %s, some epochs earlier; kept as %s", problems[0], PREVIOUS, DAMAGED)
        return _state(path, content)
    if problems:
        raise WeightsError(
            f"{problems[0]}, and no good {PREVIOUS} is left; remove {folder} to train the trial from the start"
        )
    if (folder / RECORD).exists():
        # This trial's, if it was stopped before its last state was written, and was too short for an earlier one.
        try:
            best = read_best(folder)
        except WeightsError as error:
            raise WeightsError(f"{error}; remove {folder} to train the trial from the start") from error
        content = {"data_fingerprint": best.data_fingerprint, "trial": best.trial.model_dump_json()}
        _check_same_trial(folder / RECORD, content, trial, data_fingerprint)
        _log.warning("%s: no %s beside its %s to go on from; training from the start", folder, LAST, RECORD)
    return None


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed trial was writing; see `studytool.files.whole_file` for the names."""
    for name in (LAST, "best.safetensors", "best.json"):
        for unfinished in folder.glob(f".{name}.*.part"):
            unfinished.unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            # torch itself does not look at the checksums: a flipped bit would become a changed weight.
            torn = archive.testzip()
        if torn is not None:
            raise WeightsError(f"{path} is damaged (checksum of {torn})")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} is damaged or no checkpoint of studytool ({type(error).__name__})") from error
    except (zipfile.BadZipFile, zlib.error, struct.error) as error:
        raise WeightsError(f"{path} is damaged or cut off ({error})") from error
    if not isinstance(content, dict) or content.keys() != _KEYS or content["format"] != FORMAT:
        raise WeightsError(f"{path} is no checkpoint of this version of studytool (format {FORMAT})")
    return content


_STATE = ("finished", "model", "updater", "selected", "frozen")
_KEYS = {"format", "trial", "data_fingerprint", "config_hash", "epochs", *_STATE}


def _state(path: Path, content: dict[str, Any]) -> TrialState:
    try:
        epochs = tuple(epoch_from_dict(epoch) for epoch in json.loads(content["epochs"]))
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path}: its results cannot be read ({error})") from error
    return TrialState(epochs, **{name: content[name] for name in _STATE})


def _check_same_trial(path: Path, content: dict[str, Any], trial: TrialSpec, data_fingerprint: str) -> None:
    """Refuse a state that was made by another trial, with the first difference."""
    ask = "choose another folder, or remove this one to train the trial from the start"
    if content["data_fingerprint"] != data_fingerprint:
        raise WeightsError(
            f"{path}: made with another dataset or split (fingerprint {content['data_fingerprint'][:12]}, "
            f"{trial.data_path} now has {data_fingerprint[:12]}); {ask}"
        )
    try:
        # A setting that a version before this one did not know yet has its default.
        stored = TrialSpec.model_validate_json(content["trial"])
    except ValidationError as error:
        raise WeightsError(f"{path}: made with a configuration of another version of studytool; {ask}") from error
    before, now = (_flat(json.loads(spec.model_dump_json())) for spec in (stored, trial))
    for name in sorted({*before, *now} - _MAY_CHANGE):
        if before.get(name) != now.get(name):
            raise WeightsError(
                f"{path}: made with {name} = {before.get(name, 'unset')!r}, now {now.get(name, 'unset')!r}; {ask}"
            )


_MAY_CHANGE = {"study", "arm", "number", "source", "data_path", "data_split", "data_leave_out", "on_damage", "cache"}
"""What says which trial it is but not what it computes; with the phase, what `TrialSpec.config_hash` leaves out."""
_MAY_CHANGE |= {f"train.{name}" for name in HANDLING} | {"train.accumulate"}
"""And what may be another one when a trial is tried again that ran out of memory: in how many parts it computes."""


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
