"""A split made anew: whole tomograms, every class in every part where that can be, by fractions, counts or folds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studytool.data.assign import assign_groups
from studytool.data.dataset import Dataset
from studytool.data.leakage import check_leakage, identical_volumes, units
from studytool.data.particles import STORED
from studytool.data.scan import OnProgress
from studytool.data.splits import DIGITS, LETTERS, MAX_FOLDS, NAME_PATTERN, UNUSED, NamedSplit, Recipe
from studytool.errors import DataError

# What a class costs that is missing in a part: more than any deviation from the wanted sizes, in train the most.
_MISSING, _MISSING_IN_TRAIN = 1e4, 1e6


def make_split(dataset: Dataset, recipe: Recipe, name: str, *, on_progress: OnProgress | None = None) -> NamedSplit:
    """Split a dataset anew, whatever its splits are, and check the result with the guard against leaks.

    `on_progress(done, total)` counts the volumes that are read to be compared with one another.

    Raises:
        DataError: the recipe cannot be followed, or a part would be empty; the message says which and why.
    """
    if not NAME_PATTERN.fullmatch(name) or name == STORED:
        raise DataError(f"--name {name!r}: has to be 1 to 64 letters, digits, '.', '_' or '-', and not {STORED!r}")
    parts = _parts(dataset, recipe)
    identical = identical_volumes(dataset, on_progress=on_progress)
    unit = units(dataset, identical)
    counts = np.zeros((int(unit.max()) + 1, len(dataset.manifest.classes)), np.int64)
    np.add.at(counts, (unit, dataset.labels), 1)
    weights = [0.0 if part == UNUSED else _MISSING_IN_TRAIN if part == "t" else _MISSING for part in parts]
    chosen = assign_groups(counts, list(parts.values()), weights, seed=recipe.seed)
    outcome = _Outcome(dataset, counts, tuple(part for part in parts if part != UNUSED), np.array(list(parts))[chosen])
    outcome.check()
    letters = outcome.letters[unit]
    report = check_leakage(dataset, parts=np.where(letters == UNUSED, "", letters), identical=identical)
    notes = (*report.notes, *outcome.notes(), *_repeats(dataset, identical))
    return NamedSplit(name, dataset.manifest.fingerprint, recipe, notes, "".join(letters.tolist()))


def _parts(dataset: Dataset, recipe: Recipe) -> Mapping[str, float]:
    """The letter of each part and its fraction; they add up to 1."""
    if recipe.kind == "folds":
        if not 3 <= recipe.folds <= MAX_FOLDS:
            raise DataError(f"--folds {recipe.folds}: has to be 3 (train, val, test) to {MAX_FOLDS}")
        return dict.fromkeys(DIGITS[: recipe.folds], 1 / recipe.folds)
    sizes, total = recipe.sizes, len(dataset)
    said = f"--{recipe.kind} {','.join(f'{size:g}' for size in sizes)}"
    if len(sizes) != 3 or not all(0 <= size < math.inf for size in sizes) or min(sizes[:2]) == 0:
        raise DataError(f"{said}: has to be three numbers, for train, val and test, of which only test's may be 0")
    if recipe.kind == "counts":
        if sum(sizes) > total:
            raise DataError(f"{said}: {sum(sizes):g} volumes are asked for, {dataset.folder} has {total}")
        sizes = tuple(size / total for size in sizes)
    elif sum(sizes) > 1 + 1e-6:
        raise DataError(f"{said}: add up to {sum(sizes):g}; they are parts of 1, such as 0.6,0.2,0.2")
    rest = 1 - sum(sizes)
    parts = dict(zip("tve", sizes, strict=True)) | {UNUSED: rest if rest > 1e-6 else 0.0}
    whole = sum(parts.values())
    return {letter: size / whole for letter, size in parts.items() if size > 0}


@dataclass(frozen=True)
class _Outcome:
    """What became of the groups: `counts` of each [G, C], the `needed` parts, and the letter of each group's part."""

    dataset: Dataset
    counts: np.ndarray[Any, Any]
    needed: tuple[str, ...]
    letters: np.ndarray[Any, Any]

    def check(self) -> None:
        """Refuse an empty part. A class that is missing in train would have been given to it before any other part."""
        for part in self.needed:
            missing = self._missing(part)
            if len(missing) == self.counts.shape[1]:
                scarce = "; ".join(self._why(label) for label in missing[:3])
                raise DataError(
                    f"{self.dataset.folder}: {len(self.counts)} {self._groups(len(self.counts))} cannot be split into "
                    f"{len(self.needed)} parts, as each stands in one only: {_part_name(part)} would have no volume "
                    f"of {scarce}"
                )

    def notes(self) -> list[str]:
        return [
            f"{_part_name(part)} has no volume of {self._why(label)}."
            for part in self.needed
            for label in self._missing(part)
        ]

    def _missing(self, part: str) -> list[int]:
        return [int(label) for label in np.flatnonzero(self.counts[self.letters == part].sum(axis=0) == 0)]

    def _why(self, label: int) -> str:
        name, found = self.dataset.manifest.classes[label], int(np.count_nonzero(self.counts[:, label]))
        if found < len(self.needed):
            return f"{name!r} (it occurs in {found} {self._groups(found)}, and every part needs one)"
        return f"{name!r} (where it occurs is needed in other parts, for other classes)"

    def _groups(self, count: int) -> str:
        """What is split whole: tomograms or, where they are not known, volumes with those they share something with."""
        known = (self.dataset.tomograms != "").all()
        return ("tomogram" if known else "independent volume") + ("" if count == 1 else "s")


def _repeats(dataset: Dataset, identical: Sequence[Sequence[int]]) -> list[str]:
    if not identical:
        return []
    one, other = (str(dataset.particle_ids[row]) for row in identical[0][:2])
    count = sum(map(len, identical))
    return [f"{count} volumes occur more than once, such as {one!r} and {other!r}; these stand in the same part."]


def _part_name(letter: str) -> str:
    return f"fold {letter}" if letter in DIGITS else LETTERS[letter]
