"""What a trained network's probabilities are worth: a temperature fitted on the validation split, kept beside it.

Source: Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", ICML 2017 (arXiv 1706.04599).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from studytool.errors import WeightsError
from studytool.files import write_json

NAME = "calibration.json"
_LOWEST, _HIGHEST = 0.1, 20.0
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Calibration:
    """A temperature, the validation losses (nats) without and with it, and the contrast of the validation volumes.

    `contrast` and `contrast_error` are those of `studytool.data.preparation.Contrast`. `sha256` is that of the weights
    it was fitted for.
    """

    temperature: float
    count: int
    loss_before: float
    loss_after: float
    contrast: float
    contrast_error: float
    sha256: str


def fit_temperature(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """The T for which softmax(logits / T) has the smallest mean -log(probability of the label).

    `probabilities` [N, C] are those without temperature, whose logarithms are the logits but for a constant per row.
    Where every label is met, no finite sharpness would be best: the temperature stays 1.
    """
    if (probabilities.argmax(axis=1) == labels).all():
        return 1.0
    found = minimize_scalar(
        lambda log_temperature: mean_loss(with_temperature(probabilities, float(np.exp(log_temperature))), labels),
        bounds=(np.log(_LOWEST), np.log(_HIGHEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def with_temperature(probabilities: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """softmax(logits / temperature) [N, C] from softmax(logits); 1 changes nothing, to the last bit."""
    if temperature == 1.0:
        return probabilities
    logits = np.log(np.maximum(probabilities, _TINY)) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    scaled: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return scaled


def mean_loss(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean of -log(probability of the label), in nats."""
    of_label = np.take_along_axis(probabilities, labels[:, None], axis=1)
    return float(-np.log(np.maximum(of_label, _TINY)).mean())


def entropy_nats(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy [N] of each row, in nats: 0 for a sure label, log(C) where nothing is known."""
    safe = np.maximum(probabilities, _TINY)
    entropy: NDArray[np.float64] = -(probabilities * np.log(safe)).sum(axis=1)
    return np.maximum(entropy, 0.0)


def read_calibration(folder: Path, sha256: str) -> Calibration | None:
    """What was fitted for the weights with this SHA-256; None where nothing was.

    Raises:
        WeightsError: the file is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        calibration = Calibration(**content)
        if not (calibration.temperature > 0 and np.isfinite(calibration.temperature)):
            raise ValueError(f"temperature {calibration.temperature}")
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path} is damaged ({error}); remove it, and the next prediction fits it anew") from error
    return calibration if calibration.sha256 == sha256 else None


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Keep it beside the weights."""
    write_json(folder / NAME, asdict(calibration))
