"""Arms, scores and costs in words and numbers that a reader need not look up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from studytool.report.statistics import CostRatio, Interval
from studytool.results import Cost
from studytool.spec import StudySpec

METRIC_WORDS: Mapping[str, str] = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "macro_auc": "AUC",
    "loss": "loss",
}
_STARTS: Mapping[str, str] = {
    "random": "random initialization",
    "kinetics400": "Kinetics-400 video weights",
    "motion": "weights learned from generated moving shapes",
    "imagenet_inflated": "inflated ImageNet photograph weights",
    "shuffled": "shuffled video weights",
}
_UNITS = (("s", 1, 99.5), ("min", 60, 99.5 * 60), ("h", 3600, 48 * 3600), ("d", 86400, float("inf")))
_FREEZES: Mapping[str, str] = {
    "none": "nothing frozen",
    "backbone": "all but the last layer frozen",
    "norm_only": "only normalization layers and the last layer trained",
    "gradual": "unfrozen step by step",
    "layer_decay": "slower learning in early layers",
}


def arm_in_words(values: Mapping[str, Any]) -> str:
    """`r2plus1d_18 with Kinetics-400 video weights, frozen up to stage2`; other factors as `name value`."""
    rest = dict(values)
    backbone, init, freeze = rest.pop("backbone", None), rest.pop("init", None), rest.pop("freeze", None)
    parts = []
    if init is not None:
        start = _STARTS.get(str(init), f"weights from {init}")
        parts.append(f"{backbone} with {start}" if backbone else start)
    elif backbone is not None:
        parts.append(str(backbone))
    if freeze is not None:
        parts.append(_FREEZES.get(str(freeze), f"frozen up to {freeze}"))
    parts += [f"{name.replace('_', ' ')} {plain(value)}" for name, value in rest.items()]
    return ", ".join(parts) or "the only arm"


def plain(value: Any) -> str:
    """A setting as a person writes it: `0.0012`, `turns, shift`, `none`."""
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def count(number: int, what: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds for reading: 0.42 s, 35 s, 4.2 min, 3.1 h, 2.4 d."""
    unit, size = next((unit, size) for unit, size, below in _UNITS if seconds < below)
    return f"{seconds / size:.2g} {unit}" if seconds / size < 9.95 else f"{seconds / size:.0f} {unit}"


def percent(interval: Interval, *, signed: bool = False) -> str:
    """A share with its interval in %: `91.2 [89.9, 92.4]`; the bare mean where one value has no interval."""
    mean = f"{100 * interval.mean:+.1f}" if signed else f"{100 * interval.mean:.1f}"
    if interval.low is None or interval.high is None:
        return mean.replace("-", "−")
    low, high = (f"{100 * end:+.1f}" if signed else f"{100 * end:.1f}" for end in (interval.low, interval.high))
    return f"{mean} [{low}, {high}]".replace("-", "−")


def ratio(value: CostRatio | None) -> str:
    """`0.31 [0.22, 0.44]`, `at most 0.31 (95% limit 0.44)`, `at least …`, or `not known`."""
    if value is None:
        return ""
    if value.ratio is None:
        return "not known"
    ends = ""
    if value.bound == "exact" and value.low is not None and value.high is not None:
        ends = f" [{value.low:.2g}, {value.high:.2g}]"
    elif value.bound == "at most" and value.high is not None:
        ends = f" (95% limit {value.high:.2g})"
    elif value.bound == "at least" and value.low is not None:
        ends = f" (95% limit {value.low:.2g})"
    return ("" if value.bound == "exact" else f"{value.bound} ") + f"{value.ratio:.2g}{ends}"


def shared_device(side_by_side: Iterable[int]) -> tuple[str, ...]:
    """What to beware of where so many trials at most shared a device; nothing where each had its own."""
    most = max(side_by_side, default=1)
    if most == 1:
        return ()
    return (f"Up to {most} trials shared a device, so times and cost ratios are indicative only.",)


def decimal(value: float) -> str:
    """Three decimals, with a minus sign that is one: `−0.061`."""
    return f"{value:.3f}".replace("-", "−")


def p_value(p: float | None) -> str:
    """`0.013`, `< 0.001`; empty where there is none."""
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def money(spec: StudySpec, cost: Cost | None) -> str:
    """What the device time costs at the study's price per device-hour; empty where it names none."""
    price = spec.resources.price_per_device_hour
    if price is None or cost is None:
        return ""
    amount = cost.device_seconds / 3600 * price
    return f"{amount:.2f} {spec.resources.currency}" if amount >= 0.1 else f"{amount:.2g} {spec.resources.currency}"


def energy(cost: Cost | None) -> str:
    """`31 kJ`, or that the device reports none."""
    if cost is None:
        return ""
    joules = cost.energy_joules
    if joules is None:
        return "not measured"
    return (
        f"{joules:.3g} J" if joules < 1000 else f"{joules / 1000:.3g} kJ" if joules < 1e6 else f"{joules / 1e6:.3g} MJ"
    )


def operations(flops: float) -> str:
    """`3.1 TFLOP`: multiplications and additions in all, not per second."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e6:.3g} MFLOP"


def device_time(cost: Cost | None) -> str:
    """Device-seconds for reading; empty where nothing was spent."""
    return duration(cost.device_seconds) if cost and cost.device_seconds else ""
