"""Named splits of a dataset: stored beside the shards, read back by name; `studytool.data.splitting` makes them.

    DIR/splits/NAME.json      which dataset, how it was made, and the part of every volume, in the order of the shards

A split by fractions or counts is named in a study file as `data: {path: DIR, split: NAME}`, fold 0 of one into five
folds as `split: NAME/0`. The split that came with the data is called "stored".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from studytool.data.columns import columns
from studytool.data.dataset import Dataset
from studytool.data.manifest import Manifest
from studytool.data.particles import STORED
from studytool.errors import DataError
from studytool.files import write_json

FORMAT_VERSION = 1
MAX_FOLDS = 10
_FOLDER = "splits"
_MAX_BYTES = 256 * 1024 * 1024
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
UNUSED = "."
LETTERS = {"t": "train", "v": "val", "e": "test", UNUSED: ""}
DIGITS = "0123456789"  # of folds


@dataclass(frozen=True)
class Recipe:
    """How to split: `sizes` for train, val and test, as fractions of 1 or as counts of volumes, or so many `folds`.

    Sizes that leave some volumes over leave them unused. Of `folds`, fold i takes part i for test, the next for val.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["fractions", "counts", "folds"]
    sizes: tuple[float, ...] = ()
    folds: Annotated[int, Field(ge=0, le=MAX_FOLDS)] = 0
    seed: int = 0

    @property
    def usual_name(self) -> str:
        """The name of such a split where the user gives none."""
        if self.kind != "folds":
            return f"seed{self.seed}"
        return f"kfold{self.folds}" + (f"-seed{self.seed}" if self.seed else "")


@dataclass(frozen=True)
class NamedSplit:
    """A split as it is stored: `assignment` has a letter (t, v, e: train, val, test) or a fold's digit for every row.

    `fingerprint` is that of the dataset; `notes` are what its user has to know, such as classes missing in a part.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    fingerprint: str
    recipe: Recipe
    notes: tuple[str, ...]
    assignment: str

    @property
    def study_names(self) -> tuple[str, ...]:
        """The names under which a study file can use it."""
        if self.recipe.kind != "folds":
            return (self.name,)
        return tuple(f"{self.name}/{fold}" for fold in range(self.recipe.folds))

    def splits(self, fold: int | None = None) -> NDArray[np.str_]:
        """ "train", "val", "test" or "" for every row [N]; of folds, one has to be named."""
        codes = np.frombuffer(self.assignment.encode("ascii"), np.uint8)
        meaning = np.full(128, "", dtype="<U5")
        if self.recipe.kind == "folds":
            assert fold is not None
            for part in range(self.recipe.folds):
                after = (part - fold) % self.recipe.folds
                meaning[ord(DIGITS[part])] = {0: "test", 1: "val"}.get(after, "train")
        else:
            for letter, split in LETTERS.items():
                meaning[ord(letter)] = split
        return np.asarray(meaning[codes])


def read_recipe(*, fractions: str | None, counts: str | None, folds: int | None, seed: int) -> Recipe:
    """The recipe that a command line gives; fractions 0.6,0.2,0.2 if it gives none.

    Raises:
        DataError: more than one is given, or one is not made of numbers.
    """
    given = [f"--{key}" for key, value in (("fractions", fractions), ("counts", counts), ("folds", folds)) if value]
    if len(given) > 1:
        raise DataError(f"{' and '.join(given)}: give one of them")
    if folds is not None:
        return Recipe("folds", folds=folds, seed=seed)
    kind: Literal["fractions", "counts"] = "fractions" if counts is None else "counts"
    text = counts or fractions or "0.6,0.2,0.2"
    try:
        return Recipe(kind, tuple(map(float if counts is None else int, text.split(","))), seed=seed)
    except ValueError:
        raise DataError(f"--{kind} {text!r}: has to be three numbers, such as 0.6,0.2,0.2 or 300,100,100") from None


def store_split(folder: Path, split: NamedSplit) -> Path:
    """Write a split into the dataset's folder, whole or not at all; the same one may be there already.

    Raises:
        DataError: another split of this name is there.
    """
    path = _path(folder, split.name)
    if path.exists():
        there = _read(path)
        if there == split:
            return path
        raise DataError(f"{path}: another split of this name exists already; choose another --name, or remove it")
    content = json.loads(json.dumps(asdict(split)))
    write_json(path, {"format_version": FORMAT_VERSION, "sha256": _digest(content), "content": content})
    return path


def list_splits(folder: Path) -> tuple[NamedSplit, ...]:
    """All splits that are stored with a dataset, by name (DataError for one that is damaged)."""
    paths = sorted((folder / _FOLDER).glob("*.json"))
    return tuple(_read(path) for path in paths if NAME_PATTERN.fullmatch(path.stem))


def read_split(folder: Path, manifest: Manifest, name: str) -> tuple[NDArray[np.str_], str]:
    """The split of every row [N] by a study file's name (not "stored"), and a fingerprint of data and split together.

    Raises:
        DataError: there is no such split, it lacks or has folds, it is damaged, or it was made for other data.
    """
    plain, slash, fold_text = name.partition("/")
    path = _path(folder, plain)
    if not NAME_PATTERN.fullmatch(plain) or not path.is_file():
        known = ", ".join([STORED, *(_first_to_last(split.study_names) for split in list_splits(folder))])
        raise DataError(f"{folder}: unknown split {name!r}; there are: {known}; `studytool data split` makes others")
    split = _read(path)
    if split.fingerprint != manifest.fingerprint or len(split.assignment) != manifest.num_volumes:
        raise DataError(f"{path}: was made for other data than there are now; remove it and split anew")
    if bool(slash) != (split.recipe.kind == "folds") or (slash and name not in split.study_names):
        raise DataError(f"{path}: {name!r} is not one of its names: {_first_to_last(split.study_names)}")
    splits = split.splits(int(fold_text) if slash else None)
    text = manifest.fingerprint + "\n" + "".join((part[:2] or "-") for part in splits.tolist())
    return splits, hashlib.sha256(text.encode()).hexdigest()


def split_text(dataset: Dataset, split: NamedSplit, path: Path) -> str:
    """How many volumes of each class a split has where, what has to be known of it, and how a study uses it."""
    folds = split.recipe.kind == "folds"
    letters = np.array(list(split.assignment))
    parts = list(DIGITS[: split.recipe.folds]) if folds else [*"tve", *([UNUSED] if UNUSED in split.assignment else [])]
    head = ("class", *(f"fold {part}" if folds else LETTERS[part] or "unused" for part in parts))
    rows = [
        (name, *(str(np.count_nonzero((dataset.labels == label) & (letters == part))) for part in parts))
        for label, name in enumerate(dataset.manifest.classes)
    ]
    uses = [f"in a study file: data: {{path: {dataset.folder}, split: {name}}}" for name in split.study_names[:1]]
    others = [f"the other folds: {', '.join(split.study_names[1:])}"] if folds else []
    return "\n".join([str(path), *columns(head, rows), *(f"note: {n}" for n in split.notes), *uses, *others]) + "\n"


def _first_to_last(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _path(folder: Path, name: str) -> Path:
    return folder / _FOLDER / f"{name}.json"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_ADAPTER = TypeAdapter(NamedSplit)


def _read(path: Path) -> NamedSplit:
    """Read a split and check it against its checksum and itself."""
    again = "remove it and split anew"
    if path.stat().st_size > _MAX_BYTES:
        raise DataError(f"{path}: {path.stat().st_size} bytes; a split has at most {_MAX_BYTES}; {again}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{path}: format_version is {stored['format_version']!r}, this studytool reads {FORMAT_VERSION}; "
                "install a newer studytool, or split anew"
            )
        if stored["sha256"] != _digest(stored["content"]):
            raise DataError(f"{path}: its checksum does not match, it is damaged or was edited; {again}")
        split = _ADAPTER.validate_python(stored["content"])
    except ValidationError as error:
        raise DataError(f"{path}: {error.errors()[0]['msg'].lower()}; {again}") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}); {again}") from error
    allowed = set(DIGITS[: split.recipe.folds]) if split.recipe.kind == "folds" else set(LETTERS)
    if split.name != path.stem or not set(split.assignment) <= allowed:
        raise DataError(f"{path}: is not the split its name says, or has unknown parts; {again}")
    return split
