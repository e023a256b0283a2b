"""results.jsonl -> Markdown: the goals with what was measured beside them, and every reader's figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from candidates import CANDIDATES

Results = dict[tuple[str, str], list[dict[str, Any]]]

QUIET = 0.25  # cores used by others, above which a pass counts only if there is none below
GATHER, STREAM, KEPT = "studytool, gather in process", "studytool, stream", "studytool, stream, float16 kept"
OURS = (GATHER, STREAM, KEPT)
PEERS = {  # how many times as fast studytool has to be
    "MosaicML Streaming": 12, "LitData": 12, "WebDataset": 12, "one MRC per particle": 12,
    "Hugging Face streaming": 15, "Ray Data": 50, "Hugging Face rows": 4, "Hugging Face batched": 2,
    ".npy memory map": 2,
}  # fmt: skip


def read_results(path: Path) -> Results:
    """What went well, by step and candidate (or format)."""
    results: Results = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        if "error" not in found and found["step"] != "write":
            results.setdefault((found["step"], found["subject"]), []).append(found)
    return results


def tables(results: Results) -> Iterator[str]:
    """All tables as lines of Markdown."""
    yield "| goal | wanted | measured | met |"
    yield "|---|---|---|---|"
    for goal, wanted, measured, met in _goals(results):
        yield f"| {goal} | {wanted} | {measured} | {'yes' if met else '**no**'} |"
    yield ""
    yield (
        "| reader | volumes/s | of the limit | CPU s / 1,000 | first batch, s | own memory, MB (of it torch) "
        "| order correlation | class mix | jump | others' cores |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    warm = [name for name in CANDIDATES if ("warm", name) in results]
    for name in sorted(warm, key=lambda name: -_ratio(results, name)):
        runs = results["warm", name]
        passes = _passes(runs)
        yield (
            f"| {name} | {median(p['volumes'] / p['wall'] for p in passes):,.0f} | {_ratio(results, name):.3f} "
            f"| {_cpu(results, name):.3f} | {_middle(runs, 'first_seconds'):.2f} | {_middle(runs, 'own_mb'):,.0f} "
            f"({_middle(runs, 'torch_mb'):,.0f}) "
            f"| {_middle(runs, 'correlation'):+.3f} | {_middle(runs, 'class_mix'):.2f} | {_middle(runs, 'jump'):.2f} "
            f"| {median(p['others'] for p in passes):.2f} |"
        )
    limits = [limit for name in warm for p in _passes(results["warm", name]) for limit in p["limits"]]
    if limits:
        yield f"\nThe limit: {median(limits):,.0f} volumes/s ({median(limits) * 32**3 * 4 / 1e9:.1f} GB/s)."
    cold = {name: _middle(runs, "rate") for (step, name), runs in results.items() if step == "cold"}
    if cold:
        yield "\n| reader, cold page cache | volumes/s |\n|---|---|"
        yield from (f"| {name} | {cold[name]:,.0f} |" for name in sorted(cold, key=lambda name: -cold[name]))


def _goals(results: Results) -> Iterator[tuple[str, str, str, bool]]:
    """(what, wanted, measured, met) of every goal that there are results for."""

    def at_least(goal: str, bound: float, value: float, unit: str = "") -> tuple[str, str, str, bool]:
        return goal, f"≥ {bound:g}{unit}", f"{value:.3g}{unit}", value >= bound

    def at_most(goal: str, bound: float, value: float, unit: str = "") -> tuple[str, str, str, bool]:
        return goal, f"≤ {bound:g}{unit}", f"{value:.3g}{unit}", value <= bound

    limits = {GATHER: 0.75, STREAM: 0.85, KEPT: 1.1}
    ours = [name for name in OURS if ("warm", name) in results]
    for name in ours:
        yield at_least(f"{name}: of the machine's limit", limits[name], _ratio(results, name))
    if STREAM in ours:
        for peer, factor in PEERS.items():
            if ("warm", peer) in results:
                yield at_least(f"times {peer}", factor, _ratio(results, STREAM) / _ratio(results, peer))
    for name in ours:
        runs = results["warm", name]
        yield at_most(f"{name}: CPU seconds for 1,000 volumes", 0.012, _cpu(results, name))
        yield at_most(f"{name}: time to the first batch, after imports", 0.3, _middle(runs, "first_seconds"), " s")
        beyond_mb = median(run["own_mb"] - run["torch_mb"] for run in runs)
        yield at_most(f"{name}: own memory beyond that of importing torch", 300, beyond_mb, " MB")
        correlation, mix = _middle(runs, "correlation"), _middle(runs, "class_mix")
        yield (
            f"{name}: rank correlation, stored and delivered",
            "within 0.02",
            f"{correlation:+.3f}",
            (abs(correlation) <= 0.02),
        )
        yield f"{name}: class mix per batch, of independent draws", "1 ± 0.05", f"{mix:.3f}", abs(mix - 1) <= 0.05
    cold = {name: _middle(runs, "rate") for (step, name), runs in results.items() if step == "cold"}
    if STREAM in cold and len(cold) > 1:
        best = max(rate for name, rate in cold.items() if name != STREAM)
        yield at_least("cold page cache: times the best other", 1.3, cold[STREAM] / best)
    for run in results.get(("s3", "studytool-float16"), [])[-1:]:
        yield at_least("from S3: of pyarrow's speed", 0.8, _both(run, "pyarrow", "studytool"))
        yield at_least("from S3, second epoch: of the local speed", 0.95, _both(run, "from_original", "from_copy"))


def _passes(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The passes in which others left the machine alone; all, if there were none."""
    passes = [timed for run in runs for timed in run["passes"]]
    if runs[0]["subject"] == "Ray Data":  # its own processes look like others' work
        return passes
    return [timed for timed in passes if timed["others"] < QUIET] or passes


def _ratio(results: Results, name: str) -> float:
    """Volumes per second, of the limit just before and after."""
    passes = _passes(results["warm", name])
    return median(timed["volumes"] / timed["wall"] / median(timed["limits"]) for timed in passes)


def _cpu(results: Results, name: str) -> float:
    """Of Ray's processes some end without passing their time on: all that was busy counts for it."""
    counts = name == "Ray Data"
    passes = _passes(results["warm", name])
    return median((p["cpu"] + counts * p["others"] * p["wall"]) / p["volumes"] * 1000 for p in passes)


def _middle(runs: list[dict[str, Any]], key: str) -> float:
    return median(run[key] for run in runs)


def _both(run: dict[str, Any], one: str, other: str) -> float:
    """Median of the ratios of two lists of seconds, taken in turns."""
    return median(first / second for first, second in zip(run[one], run[other], strict=True))
