"""What may change under the results of a study: a wider search range; nothing else that they depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SPACE = "search.space"


def first_forbidden_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say which setting has changed that results depend on, as "KEY = OLD, the study file now says NEW"; None if none.

    Both are flat settings by dotted key, as JSON knows them. A range of `search.space` may grow, as trials drawn from
    the old one could have been drawn from the new one; it may not shrink, change its kind, come or go.
    """
    for key in sorted(now):
        old, new = before.get(key, {}), now[key]
        if old == new:
            continue
        if key != SPACE:
            return _said(key, old, new)
        if now.get("search.sampler") == "grid":
            return _said("the grid of search", {n: _form(old[n]) for n in old}, {n: _form(new[n]) for n in new})
        if {*old} != {*new}:
            name = min({*old} ^ {*new})
            return _said(f"search.{name}", old.get(name), new.get(name))
        for name in sorted(new):
            if not _contains(new[name], old[name]):
                return f"{_said(f'search.{name}', _form(old[name]), _form(new[name]))} (a range may only grow)"
    return None


def _form(distribution: Mapping[str, Any]) -> dict[str, Any]:
    return {kind: values for kind, values in distribution.items() if values is not None}


def _contains(wide: Mapping[str, Any], narrow: Mapping[str, Any]) -> bool:
    (kind, new), (old_kind, old) = _form(wide).popitem(), _form(narrow).popitem()
    if kind != old_kind:
        return False
    if kind == "choice":
        return all(value in new for value in old)
    return bool(new[0] <= old[0] and old[1] <= new[1])


def _said(key: str, old: Any, new: Any) -> str:
    if key == "data":
        return f"other data (fingerprint {old[:12]}, now {new[:12]})"
    return f"{key} = {_short(old)}, the study file now says {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
