"""Class probabilities -> what a table says of each particle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from studytool.errors import DataError
from studytool.training.calibration import entropy_nats

REJECTED = "rejected"


@dataclass(frozen=True)
class Labels:
    """The label of every particle: `numbers` [N] count classes from 1, and 0 is a rejected particle.

    `probability` [N] is that of the most probable class, `entropy` [N] that of the row in nats.
    """

    classes: tuple[str, ...]
    numbers: NDArray[np.int64]
    probability: NDArray[np.float64]
    entropy: NDArray[np.float64]
    probabilities: NDArray[np.float64]

    @property
    def names(self) -> list[str]:
        """The class of every particle, `rejected` where it is."""
        names = (REJECTED, *self.classes)
        return [names[number] for number in self.numbers.tolist()]

    def counts(self) -> dict[str, int]:
        """How many particles each class got, in the order of the classes, and how many were rejected."""
        counted = Counter(self.names)
        return {name: counted[name] for name in (*self.classes, REJECTED) if name != REJECTED or counted[REJECTED]}


def label(
    probabilities: NDArray[np.float64],
    classes: Sequence[str],
    *,
    most_probable: NDArray[np.int64],
    reject_below: float | None,
) -> Labels:
    """The labels that (tempered) probabilities [N, C] give; those surer of nothing than `reject_below` are rejected.

    `most_probable` [N] is the class by the untempered probabilities: a temperature must not change a label by rounding.

    Raises:
        DataError: a class is called like rejected particles.
    """
    if reject_below is not None and REJECTED in classes:
        raise DataError(f"a class of this network is called {REJECTED!r}, as rejected particles are; see probabilities")
    top = np.take_along_axis(probabilities, most_probable[:, None], axis=1)[:, 0]
    numbers = most_probable.astype(np.int64) + 1
    if reject_below is not None:
        numbers[top < reject_below] = 0
    return Labels(tuple(classes), numbers, top, entropy_nats(probabilities), probabilities)
