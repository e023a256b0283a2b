"""What an import would do, before it does it: which particles, which of them not and why, which box and voxel size."""

from __future__ import annotations

import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from studytool.data.conform import conformed_shape, uncropped_shape
from studytool.data.readers.source import Entry, ReadVolume, Source, require_finite
from studytool.errors import DataError, unknown_name
from studytool.settings import ImportSettings

SAME_VOXEL_SIZE = 0.01  # headers that differ by less differ by rounding
_LOOKED_AT = 16
_MOST_VOXELS = 512**3  # of a volume, so that what is being made of it fits into memory
_LONGEST_NAME = 255
_LONGEST_ID = 4096


@dataclass(frozen=True)
class ImportPlan:
    """The particles that would be imported, in their order, with counts, and what is left out: reason -> number.

    `found_shape_dhw` and `found_voxel_size_angstrom` are those of the volume of `first`, `shape_dhw` and
    `voxel_size_angstrom` what it becomes; `looked_at` volumes were read to find out, the others will be held against
    them during the import. `bad` says what is wrong with those that cannot be read and are to be skipped.
    """

    kind: str
    notes: tuple[str, ...]
    entries: tuple[Entry, ...]
    counts: Mapping[str, int]
    tomograms: Mapping[str, int]
    splits: Mapping[str, int]
    dropped: Mapping[str, int]
    looked_at: int
    bad: tuple[str, ...]
    oddities: Mapping[str, Mapping[str, Any]]
    first: Entry
    found_shape_dhw: tuple[int, int, int]
    found_voxel_size_angstrom: float
    shape_dhw: tuple[int, int, int]
    voxel_size_angstrom: float


def import_settings(**values: Any) -> ImportSettings:
    """Settings from the options of the command line.

    Raises:
        DataError: names the first option that is wrong.
    """
    try:
        return ImportSettings(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else ""
        option = "--" + name.removesuffix("_angstrom").replace("_to", "").replace("_", "-") + ": "
        reason = problem["msg"].removeprefix("Value error, ")
        raise DataError(f"{option if name else ''}{reason[:1].lower()}{reason[1:]}") from error


def plan_lines(plan: ImportPlan) -> list[str]:
    """What `--dry-run` prints."""
    sides = " x ".join(map(str, plan.found_shape_dhw))
    lines = [f"{len(plan.entries)} volumes of {len(plan.counts)} classes would be imported"]
    lines += [f"  {name}: {count}" for name, count in plan.counts.items()]
    lines.append(f"tomograms: {len(plan.tomograms)}" if plan.tomograms else "tomograms: not known")
    lines += [f"  {name or 'not known'}: {count}" for name, count in plan.tomograms.items()]
    if plan.splits:
        lines.append("splits: " + ", ".join(f"{name or 'none'} {count}" for name, count in plan.splits.items()))
    lines += [f"left out: {count} {reason}" for reason, count in plan.dropped.items()]
    lines.append(f"box: {sides} voxels of {plan.found_voxel_size_angstrom:g} Å (of {plan.looked_at} volumes looked at)")
    if (plan.shape_dhw, plan.voxel_size_angstrom) != (plan.found_shape_dhw, plan.found_voxel_size_angstrom):
        lines.append(f"becomes: {' x '.join(map(str, plan.shape_dhw))} voxels of {plan.voxel_size_angstrom:g} Å")
    lines += [f"skipped: {reason}" for reason in plan.bad]
    return lines + oddity_lines(plan.oddities)


def oddity_lines(oddities: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each kind of oddity, with the first file that has it and the number of others."""
    lines = []
    for oddity in oddities.values():
        others = oddity["files"] - 1
        lines.append(f"warning: {oddity['first']}" + (f" (as in {others} others)" if others else ""))
    return lines


def skipped_lines(provenance: Mapping[str, Any], folder: Path) -> list[str]:
    """How many volumes an import with --skip-bad has left out, and what is wrong with the first."""
    skipped = provenance.get("skipped")
    if skipped is None:
        return []
    lines = [f"skipped: {reason}" for reason in skipped["first"]]
    return [*lines, f"skipped in all: {skipped['volumes']}; all of them stand in {folder / skipped['file']}"]


def plan_import(source: Source, settings: ImportSettings, *, skip_bad: bool = False) -> ImportPlan:
    """Choose the particles, look at some of their volumes, and say what would become of them.

    With `skip_bad` volumes that cannot be read or are not finite do not hinder, unless that is so of all looked at.

    Raises:
        DataError: no particle is left, a class to include or exclude is not there, an id occurs twice, a tomogram
            stands in two splits, no voxel size is known, or volumes differ in voxel size or box and nothing says what
            to do about it.
    """
    entries, dropped = _chosen(source, settings)
    _check_names(entries)
    _check_ids(entries)
    _check_splits(entries)
    oddities: dict[str, dict[str, Any]] = {}
    seen, bad = [], []
    for entry in _spread(entries):
        try:
            volume, odd = read_checked(source, entry)
        except DataError as error:
            if not skip_bad:
                raise
            bad.append(str(error))
            continue
        count_oddities(oddities, odd)
        seen.append((entry, volume))
    if not seen:
        raise DataError(f"{bad[0]} (--skip-bad: so it is with all {len(bad)} volumes looked at)")
    first_entry, first = seen[0]
    voxel_size = known_voxel_size(first_entry, first.voxel_size_angstrom, settings)
    depth, height, width = first.volume_DHW.shape
    _check_size(first_entry, (depth, height, width), voxel_size, settings)
    for entry, volume in seen[1:]:
        check_alike(entry, volume, first_entry, voxel_size, (depth, height, width), settings)
    target = settings.rescale_to_angstrom
    return ImportPlan(
        kind=source.kind,
        notes=tuple(source.notes),
        entries=entries,
        counts=_counted(entry.label for entry in entries),
        tomograms=_counted(entry.tomogram for entry in entries),
        splits=_counted(entry.split for entry in entries),
        dropped=dropped,
        looked_at=len(seen) + len(bad),
        bad=tuple(bad),
        oddities=oddities,
        first=first_entry,
        found_shape_dhw=(depth, height, width),
        found_voxel_size_angstrom=voxel_size,
        shape_dhw=conformed_shape((depth, height, width), voxel_size, settings),
        voxel_size_angstrom=voxel_size if target is None else target,
    )


def read_checked(source: Source, entry: Entry) -> tuple[ReadVolume, tuple[str, ...]]:
    """The volume of an entry, and what was odd about its file.

    Raises:
        DataError: it cannot be read, is no volume, or has voxels that are not finite.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = source.read(entry)
    volume = read.volume_DHW
    if volume.ndim != 3 or not volume.size:
        raise DataError(f"{entry.origin}: an array of shape {list(volume.shape)}, not a volume")
    lowest, highest = volume.min(), volume.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        require_finite(entry.origin, volume)
    odd = [str(warning.message) for warning in caught]
    if lowest == highest:
        odd.append(f"{entry.origin}: every voxel has the same value, so that there is nothing to see in this volume")
    return read, tuple(odd)


def count_oddities(oddities: dict[str, dict[str, Any]], messages: Iterable[str]) -> None:
    """Count warnings `FILE: WHAT` by kind, whatever numbers are in them; keeps the first of each kind whole."""
    for message in messages:
        kind = re.sub(r"\d+", "N", message.partition(": ")[2])
        oddities.setdefault(kind, {"first": message, "files": 0})["files"] += 1


def known_voxel_size(entry: Entry, told_angstrom: float | None, settings: ImportSettings) -> float:
    """The voxel size of a volume: what the user says, or else what its file tells.

    Raises:
        DataError: neither is there.
    """
    if settings.voxel_size_angstrom is not None:
        return settings.voxel_size_angstrom
    if told_angstrom is None:
        raise DataError(
            f"{entry.origin}: the voxel size is not known (0, the placeholder 1.0 or nothing in the file); give it in "
            "Å with --voxel-size"
        )
    return told_angstrom


def check_alike(
    entry: Entry,
    volume: ReadVolume,
    first_entry: Entry,
    first_voxel_size_angstrom: float,
    first_shape_dhw: tuple[int, int, int],
    settings: ImportSettings,
) -> float:
    """Hold a volume against the first one; the voxel size to use for it.

    Raises:
        DataError: voxel size or box differ, and there is no `rescale_to_angstrom` or `box` to make them equal.
    """
    voxel_size = known_voxel_size(entry, volume.voxel_size_angstrom, settings)
    if settings.rescale_to_angstrom is None:
        if abs(voxel_size / first_voxel_size_angstrom - 1) > SAME_VOXEL_SIZE:
            raise DataError(
                f"{entry.origin}: its voxels are of {voxel_size:g} Å, those of {first_entry.origin} of "
                f"{first_voxel_size_angstrom:g} Å; bring them to one size with --rescale, or say with --voxel-size "
                "what is true of all"
            )
        voxel_size = first_voxel_size_angstrom
    shape = volume.volume_DHW.shape
    if shape == first_shape_dhw and voxel_size == first_voxel_size_angstrom:
        return voxel_size
    depth, height, width = shape
    _check_size(entry, (depth, height, width), voxel_size, settings)
    wanted = conformed_shape(first_shape_dhw, first_voxel_size_angstrom, settings)
    if conformed_shape((depth, height, width), voxel_size, settings) != wanted:
        raise DataError(
            f"{entry.origin}: {' x '.join(map(str, shape))} voxels, {first_entry.origin} has "
            f"{' x '.join(map(str, first_shape_dhw))}; a dataset has one shape: give one with --box"
        )
    return voxel_size


def _chosen(source: Source, settings: ImportSettings) -> tuple[tuple[Entry, ...], dict[str, int]]:
    entries = source.entries
    labelled = [entry for entry in entries if entry.label]
    if entries and not labelled:
        raise DataError(
            f"{source.kind}: none of the {len(entries)} particles has a label; name its column with --label-column, or "
            "give one label for all with --label"
        )
    dropped = Counter({"without a label": len(entries) - len(labelled)})
    counts = Counter(entry.label for entry in labelled)
    for option, names in (("--include", settings.include), ("--exclude", settings.exclude)):
        for name in names:
            if name not in counts:
                raise DataError(f"{option}: {unknown_name('class', name, counts)}")
    reasons: dict[str, str] = {}
    for name, count in counts.items():
        if name in settings.exclude or (settings.include and name not in settings.include):
            reasons[name] = "of classes that are not wanted"
        elif count < settings.min_per_class:
            reasons[name] = f"of classes with fewer than {settings.min_per_class} volumes"
    dropped.update(reasons[entry.label] for entry in labelled if entry.label in reasons)
    chosen = tuple(entry for entry in labelled if entry.label not in reasons)
    if not chosen:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "it holds none"
        raise DataError(f"{source.kind}: no particle is left to import ({why})")
    return chosen, {reason: count for reason, count in dropped.items() if count}


def _check_size(
    entry: Entry, shape_dhw: tuple[int, int, int], voxel_size_angstrom: float, settings: ImportSettings
) -> None:
    shapes = [function(shape_dhw, voxel_size_angstrom, settings) for function in (uncropped_shape, conformed_shape)]
    largest = max(shapes, key=math.prod)
    if settings.rescale_to_angstrom is None:
        largest = shapes[1]  # cropping takes no memory
    if math.prod(largest) > _MOST_VOXELS:
        raise DataError(
            f"{entry.origin}: {' x '.join(map(str, shape_dhw))} voxels of {voxel_size_angstrom:g} Å would become "
            f"{' x '.join(map(str, largest))}; {_MOST_VOXELS} voxels (512 x 512 x 512) is the most: see --box, "
            "--rescale, --voxel-size"
        )


def _check_names(entries: Sequence[Entry]) -> None:
    """Names go into tables, files and on screens."""
    checked: set[tuple[str, str]] = set()
    for entry in entries:
        for kind, name, most in (
            ("label", entry.label, _LONGEST_NAME),
            ("tomogram", entry.tomogram, _LONGEST_NAME),
            ("id", entry.particle_id, _LONGEST_ID),
        ):
            if (kind, name) in checked:
                continue
            checked.add((kind, name))
            if len(name) > most or any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
                raise DataError(
                    f"{ascii(entry.origin)[1:-1]}: the {kind} {name[:60]!a} has {len(name)} characters; it may "
                    f"have {most}, all of them printable and UTF-8: rename it"
                )


def _check_ids(entries: Sequence[Entry]) -> None:
    seen: dict[str, Entry] = {}
    for entry in entries:
        other = seen.setdefault(entry.particle_id, entry)
        if other is not entry:
            raise DataError(
                f"{entry.origin}: the same particle as {other.origin} ({entry.particle_id!r}); a particle may be in a "
                "dataset once: remove one"
            )


def _check_splits(entries: Sequence[Entry]) -> None:
    first: dict[str, Entry] = {}
    for entry in entries:
        other = first.setdefault(entry.tomogram, entry)
        if entry.tomogram and other.split != entry.split:
            raise DataError(
                f"{entry.origin}: tomogram {entry.tomogram!r} stands in the splits {other.split!r} and {entry.split!r} "
                f"(the former: {other.origin}); a tomogram belongs to one"
            )


def _spread(entries: Sequence[Entry]) -> list[Entry]:
    """The first of every class, as classes are often made apart, up to a number; else evenly over the list."""
    firsts = {entry.label: entry for entry in reversed(entries)}
    chosen = [entries[0], *(entry for entry in firsts.values() if entry is not entries[0])][:_LOOKED_AT]
    step = max(1, len(entries) // _LOOKED_AT)
    for entry in [entries[-1], *entries[step::step]]:
        if len(chosen) < _LOOKED_AT and entry not in chosen:
            chosen.append(entry)
    return chosen


def _counted(names: Iterable[str]) -> dict[str, int]:
    """How often each name occurs, sorted; nothing where no name is known."""
    counts = Counter(names)
    return {name: counts[name] for name in sorted(counts)} if set(counts) != {""} else {}
