"""What one trial leaves for the next one in the same process: the dataset, opened, and networks before training."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

from studytool.data.manifest import MANIFEST_NAME
from studytool.data.remote_copy import local_copy
from studytool.data.shards import Dataset, open_dataset
from studytool.models.adapt import StagedModel, make_head
from studytool.models.build import build_model, depends_on_seed
from studytool.models.weights import weights_path
from studytool.settings import ModelSettings
from studytool.spec import TrialSpec

MOST_BYTES = 512 * 1024 * 1024
"""Of the weights of all networks kept; a network with more is built anew for each trial."""

State = tuple[tuple[str, int, int, int], ...]


class Kept:
    """The dataset that was opened last, and copies of the networks that were built last, up to a number of bytes.

    What it gives is equal to the last bit to what is opened or built anew, and is opened or built anew where a file
    that it came from is another one than then, or was changed. With `most_bytes` 0 no network is kept.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._dataset: tuple[Any, Dataset] | None = None
        self._networks: OrderedDict[Any, StagedModel] = OrderedDict()

    def dataset_of(self, trial: TrialSpec) -> Dataset:
        """What a trial reads, without the shards that it leaves out, copied to this machine if it is at an address."""
        return self.dataset(local_copy(trial.data_path, leave_out=trial.data_leave_out), trial.data_split)

    def dataset(self, folder: Path, split: str) -> Dataset:
        """As `open_dataset`."""
        key = (folder, split, _state([folder / MANIFEST_NAME, *folder.glob("*.parquet"), *folder.glob("splits/*")]))
        if self._dataset is None or self._dataset[0] != key:
            self._dataset = None  # not two at a time
            self._dataset = (key, open_dataset(folder, split))
        return self._dataset[1]

    def network(
        self, settings: ModelSettings, *, num_classes: int, volume_shape_dhw: tuple[int, int, int], seed: int
    ) -> StagedModel:
        """As `build_model`."""
        path = weights_path(settings.backbone, settings.init)
        files = [path, path.with_name(f"{path.name}.sha256")] if path else []
        kind = (settings.model_dump_json(), num_classes, volume_shape_dhw, _state(files))
        for key in ((kind, seed), (kind, None)):
            if key in self._networks:
                self._networks.move_to_end(key)
                model = copy.deepcopy(self._networks[key])
                model.head = make_head(model.num_features, num_classes, settings.dropout, seed)
                return model
        model = build_model(settings, num_classes=num_classes, volume_shape_dhw=volume_shape_dhw, seed=seed)
        if _size_bytes(model) <= self._most_bytes and _can_be_copied(model):
            self._networks[kind, seed if depends_on_seed(model) else None] = copy.deepcopy(model)
            while sum(map(_size_bytes, self._networks.values())) > self._most_bytes:
                self._networks.popitem(last=False)
        return model


def _state(paths: Iterable[Path]) -> State:
    """What changes when one of the files is written to, replaced or removed."""
    found = [(path, path.stat()) for path in sorted(paths) if path.is_file()]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found)


def _size_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _can_be_copied(model: nn.Module) -> bool:
    """Whether no module holds a function of its own, which may know the network that was copied, not the copy."""
    held = (value for module in model.modules() for value in vars(module).values())
    flat = (part for value in held for part in (value.values() if isinstance(value, dict) else [value]))
    return not any(isinstance(part, FunctionType) and part.__closure__ for part in flat)
