"""Whole groups -> parts of wanted sizes, with each part's classes in proportions as near as that allows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studytool.seeds import derive_seed

Array = np.ndarray[Any, Any]

_MAX_EXACT = 60_000  # assignments that are all looked at: 3 parts of 10 groups
_MAX_EXACT_NUMBERS = 5_000_000
_MAX_SWAPPED = 300  # groups; with more, moving single ones comes near enough
_MAX_IMPROVED = 3000  # with more, so does placing the largest first
_STARTS = 20  # orders in which groups are placed


def assign_groups(
    counts: NDArray[np.int64], wanted: Sequence[float], weights: Sequence[float], *, seed: int
) -> NDArray[np.int64]:
    """The part [G] of each of G groups, of which group g holds `counts[g, c]` volumes of class c.

    Minimized is, over parts and classes, the squared difference between the number of volumes and the wanted one,
    divided by the wanted one. A class that is missing in part p counts `weights[p]`, which has to be 0 or so large
    that it comes first. `wanted` are fractions that add up to 1. Few groups are tried in every way; many are placed
    greedily, largest first and then in seeded orders, and improved by moves and exchanges until none helps.

    Groups of a single volume each are too many for that, and too easy: they are cut class by class. If there are
    others too, both kinds get the wanted proportions for themselves.
    """
    part = np.full(len(counts), -1, np.int64)
    sizes = counts.sum(axis=1)
    single, larger = np.flatnonzero(sizes == 1), np.flatnonzero(sizes > 1)
    rng = np.random.default_rng(derive_seed(seed, "split"))
    if len(single):
        part[single] = _cut(counts[single].argmax(axis=1), wanted, weights, rng)
    if len(larger):
        shuffled = rng.permutation(larger)  # of equally good ways the seed chooses one
        search = _Search(counts[shuffled], np.asarray(wanted), np.asarray(weights))
        part[shuffled] = search.best(rng)
    return part


def _cut(
    classes: Array, wanted: Sequence[float], weights: Sequence[float], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Each class in a random order, cut into the wanted parts; every part gets one if there are enough."""
    part = np.empty(len(classes), np.int64)
    for label in np.unique(classes).tolist():
        members = rng.permutation(np.flatnonzero(classes == label))
        part[members] = np.repeat(np.arange(len(wanted)), _shares(len(members), wanted, weights))
    return part


def _shares(count: int, wanted: Sequence[float], weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `count`, by largest remainder; none is 0 for want of what weighs less elsewhere."""
    exact = [count * fraction for fraction in wanted]
    shares = [int(number) for number in exact]
    for index in sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])[: count - sum(shares)]:
        shares[index] += 1
    for index in sorted(range(len(shares)), key=lambda i: -weights[i]):
        largest = max(range(len(shares)), key=lambda i: (shares[i], -weights[i], -wanted[i]))
        if weights[index] > 0 and shares[index] == 0 and (shares[largest] > 1 or weights[largest] < weights[index]):
            shares[index], shares[largest] = 1, shares[largest] - 1
    return shares


class _Search:
    """The search for the cheapest assignment; a state is the part [G] of each group and the counts [P, C] it makes."""

    def __init__(self, counts: Array, wanted: Array, weights: Array) -> None:
        self.counts = counts.astype(np.float64)
        totals = self.counts.sum(axis=0)
        self.wanted = wanted[:, None] * totals
        self.scale = np.maximum(self.wanted, 0.5) * totals.sum()
        self.missed = weights[:, None] * (totals > 0)

    def best(self, rng: np.random.Generator) -> NDArray[np.int64]:
        groups, parts = len(self.counts), len(self.wanted)
        ways = parts**groups if groups < 32 else _MAX_EXACT + 1
        if ways <= _MAX_EXACT and ways * self.wanted.size <= _MAX_EXACT_NUMBERS:
            return self._exact()
        starts = _STARTS if groups <= _MAX_SWAPPED else 1
        sizes = self.counts.sum(axis=1)
        orders = [np.argsort(-sizes, kind="stable"), *(rng.permutation(groups) for _ in range(starts - 1))]
        found = [self._greedy(order) for order in orders]
        if groups <= _MAX_IMPROVED:
            found = [self._improved(part) for part in found]
        costs = [float(self._cost(self._sums(part)).sum()) for part in found]
        return found[costs.index(min(costs))]

    def _cost(self, sums: Array, parts: Array | slice = slice(None)) -> Array:
        """The cost [...] of parts that hold these sums [..., C]."""
        off = (sums - self.wanted[parts]) ** 2 / self.scale[parts]
        return np.asarray((off + self.missed[parts] * (sums == 0)).sum(axis=-1))

    def _sums(self, part: Array) -> Array:
        sums: Array = np.zeros_like(self.wanted)
        np.add.at(sums, part, self.counts)
        return sums

    def _exact(self) -> NDArray[np.int64]:
        parts = len(self.wanted)
        ways = np.array(list(itertools.product(range(parts), repeat=len(self.counts))), dtype=np.int64)
        sums = np.stack([(ways == p).astype(np.float64) @ self.counts for p in range(parts)], axis=1)
        return np.asarray(ways[self._cost(sums).sum(axis=1).argmin()])

    def _greedy(self, order: Array) -> NDArray[np.int64]:
        part = np.empty(len(self.counts), np.int64)
        sums = np.zeros_like(self.wanted)
        for group in order.tolist():
            change = self._cost(sums + self.counts[group]) - self._cost(sums)
            part[group] = int(change.argmin())
            sums[part[group]] += self.counts[group]
        return part

    def _improved(self, part: NDArray[np.int64]) -> NDArray[np.int64]:
        sums = self._sums(part)
        for _ in range(20 * len(part)):  # each step is a gain, so that it ends before; a bound all the same
            moves = self._moves(part, sums)
            group, to = np.unravel_index(moves.argmin(), moves.shape)
            gain, changed = moves[group, to], [(int(group), int(to))]
            if gain > -1e-9 and len(part) <= _MAX_SWAPPED:
                gain, changed = self._best_exchange(part, sums)
            if gain > -1e-9:
                break
            for index, target in changed:
                sums[part[index]] -= self.counts[index]
                sums[target] += self.counts[index]
                part[index] = target
        return part

    def _moves(self, part: Array, sums: Array) -> Array:
        """What moving each group [G] to each part [P] would change of the cost."""
        before = self._cost(sums)
        leave = self._cost(sums[part] - self.counts, part) - before[part]
        enter = self._cost(sums + self.counts[:, None]) - before
        change = leave[:, None] + enter
        change[np.arange(len(part)), part] = 0
        return np.asarray(change)

    def _best_exchange(self, part: Array, sums: Array) -> tuple[float, list[tuple[int, int]]]:
        best: tuple[float, list[tuple[int, int]]] = (0.0, [])
        before = self._cost(sums)
        for p, q in itertools.combinations(range(len(sums)), 2):
            ours, theirs = np.flatnonzero(part == p), np.flatnonzero(part == q)
            if not (len(ours) and len(theirs)):
                continue
            swing = self.counts[theirs] - self.counts[ours][:, None]
            change = self._cost(sums[p] + swing, np.array(p)) + self._cost(sums[q] - swing, np.array(q))
            at = np.unravel_index(change.argmin(), change.shape)
            gain = float(change[at] - before[p] - before[q])
            if gain < best[0]:
                best = gain, [(int(ours[at[0]]), q), (int(theirs[at[1]]), p)]
        return best
