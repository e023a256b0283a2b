"""Where a problem of a study file stands, and how it is said in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from studytool.errors import unknown_name
from studytool.yamlfile import YamlFile

Locator = Callable[[tuple[str | int, ...]], str]


def locator(path: Path, file: YamlFile, changed: set[tuple[str, ...]]) -> Locator:
    """A function that turns a key's location into "file:line: dotted.key", or "--set dotted.key" if overridden."""

    def where(location: tuple[str | int, ...]) -> str:
        dotted = ".".join(map(str, location)) or "the file"
        if any(location[: len(keys)] == keys for keys in changed):
            return f"--set {dotted}"
        for length in range(len(location), -1, -1):
            if location[:length] in file.lines:
                return f"{path}:{file.lines[location[:length]]}: {dotted}"
        return f"{path}: {dotted}"

    return where


def first_problem(error: ValidationError, model: type[BaseModel], where: Locator) -> str:
    """The first problem that pydantic found, as one line: where, what is allowed, what was found."""
    problems = error.errors()
    problem = problems[0]
    location = _as_written(problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = {name for section in _models_at(model, location[:-1]) for name in section.model_fields}
        return f"{where(location)}: {unknown_name('key', location[-1], known)}"
    if problem["type"] == "missing":
        return f"{where(location)}: this key is required and missing"
    if problem["type"] == "value_error":
        return f"{where(location)}: {problem['ctx']['error']}"
    # A value that fits none of several forms has a problem for each of them.
    allowed = dict.fromkeys(_allowed(p) for p in problems if _as_written(p["loc"]) == location)
    return f"{where(location)}: has to be {' or '.join(allowed)}, found {shown(problem['input'])}"


def shown(value: Any) -> str:
    """A value as YAML would spell it, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a word or text",
    "tuple_type": "a list, like [a, b]",
    "dict_type": "a mapping, like {{key: value}}",
    "model_type": "a mapping, like {{key: value}}",
    "too_short": "a list of at least {min_length} values",
    "too_long": "a list of at most {max_length} values",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "string_too_short": "at least {min_length} characters long",
    "string_pattern_mismatch": "1 to 64 letters, digits, '_', '-' or '.', the first a letter or digit",
}


def _allowed(problem: Any) -> str:
    if problem["type"] in _KINDS:
        return _KINDS[problem["type"]].format(**problem.get("ctx", {}))
    return str(problem["msg"]).removeprefix("Input should be ")


def _as_written(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """A location without what pydantic and the spec put in: names of union branches, and `search.space`."""
    kept = [p for p in location if not (isinstance(p, str) and re.fullmatch(_BRANCH, p))]
    return tuple(kept[:1] + kept[2:] if kept[:2] == ["search", "space"] else kept)


_BRANCH = r"(constrained-)?(int|float|str)|(literal|tuple|function)\[.*|function-.*"


def _models_at(model: type[BaseModel], location: tuple[str | int, ...]) -> Iterator[type[BaseModel]]:
    """The sections that stand at a location: a key of a mapping of sections (a tuned factor) leads into its values."""
    if not location:
        yield model
        return
    name = str(location[0])
    fields = [model.model_fields[name]] if name in model.model_fields else list(model.model_fields.values())
    for field in fields:
        for kind in _models_within(field.annotation):
            yield from _models_at(kind, location[1:])


def _models_within(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_within(part)
