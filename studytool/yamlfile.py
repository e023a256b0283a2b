"""YAML without surprises: 1.2 scalars, no repeated keys, no anchors, bounded size and depth, and line numbers kept."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from studytool.errors import SpecError

MAX_BYTES = 100_000
"""So much is read in a moment; the longest of the studies that ship has 3 kB."""
MAX_DEPTH = 20
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Only its reader is used, no constructor. The one in C is ten times faster; PyYAML is also installed without it."""

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class YamlFile:
    """The values of a YAML document and, for every key and list item, the line (from 1) it stands on."""

    values: Any
    lines: dict[Location, int]


def read_yaml(path: Path) -> YamlFile:
    """Read one YAML document.

    Raises:
        SpecError: the file cannot be read, or is not plain YAML; the message names the file and line.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)  # it may be a device that never ends
    except FileNotFoundError as error:
        raise SpecError(f"{path}: no such file") from error
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise SpecError(f"{path}: too large for a study file; at most {MAX_BYTES} bytes are allowed")
    try:
        return parse_yaml(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not a text file in UTF-8 (byte {error.start}); save it as UTF-8") from error


def parse_yaml(text: str, source: str) -> YamlFile:
    """Parse YAML text; `source` names it in errors. Same rules and errors as `read_yaml`."""
    lines: dict[Location, int] = {}
    try:
        _refuse_tricks(text, source)
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        parts = [getattr(error, "context", None), getattr(error, "problem", None)]
        problem = ", ".join(part for part in parts if part) or str(error).splitlines()[0]
        raise SpecError(f"{where}: not valid YAML: {problem}") from error
    except ValueError as error:
        raise SpecError(f"{source}: not valid YAML: {error}") from error
    return YamlFile(_construct(node, (), source, lines) if node else None, lines)


def parse_value(text: str, source: str) -> Any:
    """The value of a command-line override such as `[random, kinetics400]` or `1e-3`."""
    return parse_yaml(text, source).values


def _refuse_tricks(text: str, source: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise SpecError(f"{source}:{line}: anchors and aliases (& and *) are not allowed; write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise SpecError(f"{source}:{line}: nested deeper than {MAX_DEPTH} levels")


def _construct(node: yaml.Node, path: Location, source: str, lines: dict[Location, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path, f"{source}:{line}")
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, i), source, lines) for i, item in enumerate(node.value)]
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"{source}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
            raise SpecError(f"{where}: a key has to be a plain word")
        key = key_node.value
        if key in values:
            dotted = ".".join(map(str, (*path, key)))
            raise SpecError(f"{where}: {dotted}: the key stands twice (first on line {lines[(*path, key)]})")
        lines[(*path, key)] = key_node.start_mark.line + 1
        values[key] = _construct(value_node, (*path, key), source, lines)
    return values


_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | None] = dict.fromkeys(("null", "Null", "NULL", "~", ""))
_WORDS |= {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}


def _scalar(node: yaml.ScalarNode, path: Location, where: str) -> Any:
    """A scalar by the core schema of YAML 1.2, in which 1e-4 is a number and `no` is a word."""
    text: str = node.value
    if node.tag not in _IMPLICIT_TAGS:
        raise SpecError(f"{where}: {'.'.join(map(str, path))}: tags such as {node.tag} are not allowed")
    if node.style:  # neither None, as PyYAML in Python has it for a plain scalar, nor "", as that in C
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text) and len(text) < 20:
        return int(text)
    if text.lstrip("+-").startswith("0") and text.lstrip("+-").isdigit():
        raise SpecError(f"{where}: {text} has leading zeros: quote it if it is a name, else drop the zeros")
    if _FLOAT.fullmatch(text):
        number = float(text)
        if math.isfinite(number):
            return number
    if text.lower().lstrip("+-") in (".inf", ".nan") or _FLOAT.fullmatch(text):
        raise SpecError(f"{where}: {'.'.join(map(str, path))}: {text} is not a finite number")
    return text


_IMPLICIT_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")
}
