"""What to label and what to write, and what is refused before anything is computed for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from studytool.data.importing import files_of
from studytool.data.readers.dynamo import DynamoSource
from studytool.data.readers.shardset import ShardSet
from studytool.data.readers.source import ReadOptions, Source
from studytool.data.readers.star import StarSource
from studytool.errors import DataError
from studytool.files import sha256_of
from studytool.labelling.star import class_files


@dataclass(frozen=True)
class Request:
    """What to label and what to write. `invert` and `transpose` overrule what the training volumes' import did.

    `split` takes only these particles of a dataset. `calibrate` divides the logits by the temperature that suits the
    validation split.
    """

    source: Path
    out: Path
    options: ReadOptions = field(default_factory=lambda: ReadOptions(label=""))
    split: str | None = None
    reject_below: float | None = None
    per_class: bool = False
    embed: Path | None = None
    invert: bool | None = None
    transpose: str | None = None
    calibrate: bool = True
    device: str | None = None
    workers: int | None = None

    @property
    def is_table(self) -> bool:
        """Whether the source is to be written again with labels in it."""
        return self.out.suffix.lower() in (".star", ".tbl")


def check_outputs(request: Request, source: Source, classes: Sequence[str]) -> None:
    """Refuse what could not be written in the end, or what would be written over.

    Raises:
        DataError: the source has no such table, or a file or folder of that name is there.
    """
    ending = request.out.suffix.lower()
    kind = "a studytool dataset" if isinstance(source, ShardSet) else source.kind
    if ending not in (".csv", ".star", ".tbl"):
        raise DataError(
            f"{request.out}: labels are written as .csv, or as .star of a STAR file, .tbl of a Dynamo table"
        )
    if (ending == ".star" or request.per_class) and not (ending == ".star" and isinstance(source, StarSource)):
        raise DataError(f"{request.out}: STAR files can be written of a STAR file, this is {kind}; give a .csv")
    if ending == ".tbl" and not isinstance(source, DynamoSource):
        raise DataError(f"{request.out}: a Dynamo table can be written of a Dynamo table, this is {kind}; give a .csv")
    if request.split is not None and request.is_table:
        raise DataError(f"{request.out}: --split leaves particles out, a table has to keep them; give a .csv")
    outputs = [request.out, *([request.embed] if request.embed is not None else [])]
    if request.per_class:
        outputs += class_files(request.out, classes).values()
    for out in outputs:
        _check_place(out, request, source)


def digest_of_table(request: Request) -> str:
    """The SHA-256 of the table that will be written again; "" where there is none to write."""
    return sha256_of(request.source) if request.is_table and request.source.is_file() else ""


def require_same_table(request: Request, sha256: str) -> None:
    """Refuse a table that was changed since: its rows may stand for other particles than those that were labelled."""
    if digest_of_table(request) != sha256:
        raise DataError(
            f"{request.source}: was changed while its particles were labelled, so that labels cannot be given to its "
            f"rows; {request.out} is not written: give the command again"
        )


def _check_place(out: Path, request: Request, source: Source) -> None:
    if out.is_dir():
        raise DataError(f"{out}: is a folder; give the name of a file")
    if not (out.exists() or out.is_symlink()):
        return
    if _is_one_of(out, [request.source]):
        raise DataError(f"{out}: is the source itself, which is left as it is; choose another name")
    table = [request.options.coordinates] if request.options.coordinates is not None else []
    if _is_one_of(out, [*table, *files_of(source, source.entries)]):
        raise DataError(f"{out}: is a file of the source, which is left as it is; choose another name")
    raise DataError(f"{out}: exists already; choose another name, or remove it if nothing needs it")


def _is_one_of(out: Path, paths: Iterable[Path]) -> bool:
    return out.exists() and any(path.exists() and out.samefile(path) for path in paths)
