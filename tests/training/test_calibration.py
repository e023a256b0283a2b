from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats

from studytool.errors import WeightsError
from studytool.training.calibration import (
    Calibration,
    entropy_nats,
    fit_temperature,
    mean_loss,
    read_calibration,
    with_temperature,
    write_calibration,
)

KEPT = Calibration(1.7, 40, 0.9, 0.8, 0.5, 0.02, "f" * 64)


def test_the_temperature_that_the_probabilities_were_sharpened_by_is_found():
    rng = np.random.default_rng(0)
    logits = 1.5 * rng.standard_normal((20_000, 5))
    labels = (scipy.special.softmax(logits, axis=1).cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    for sharpness in (0.5, 2.5):
        probabilities = scipy.special.softmax(sharpness * logits, axis=1)
        temperature = fit_temperature(probabilities, labels)
        assert temperature == pytest.approx(sharpness, rel=0.03)
        tempered = with_temperature(probabilities, temperature)
        assert mean_loss(tempered, labels) < mean_loss(probabilities, labels)
        np.testing.assert_array_equal(tempered.argmax(axis=1), probabilities.argmax(axis=1))


def test_a_temperature_divides_the_logits():
    logits = np.random.default_rng(1).standard_normal((6, 4))
    probabilities = scipy.special.softmax(logits, axis=1)
    np.testing.assert_allclose(
        with_temperature(probabilities, 3.0), scipy.special.softmax(logits / 3, axis=1), rtol=1e-12
    )
    assert with_temperature(probabilities, 1.0) is probabilities
    sure = with_temperature(np.array([[1.0, 0.0]]), 2.0)
    assert np.isfinite(sure).all()


def test_without_a_mistake_no_temperature_can_be_told():
    assert fit_temperature(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1])) == 1.0


def test_entropy():
    probabilities = scipy.special.softmax(np.random.default_rng(2).standard_normal((7, 5)), axis=1)
    np.testing.assert_allclose(entropy_nats(probabilities), scipy.stats.entropy(probabilities, axis=1), rtol=1e-12)
    assert entropy_nats(np.array([[1.0, 0.0, 0.0]])).tolist() == [0.0]


def test_it_is_kept_for_the_weights_it_was_fitted_for(tmp_path: Path):
    assert read_calibration(tmp_path, "f" * 64) is None
    write_calibration(tmp_path, KEPT)
    assert read_calibration(tmp_path, "f" * 64) == KEPT
    assert read_calibration(tmp_path, "e" * 64) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"temperature": 1}', '{"temperature": "hot"}'])
def test_a_damaged_file(tmp_path: Path, text: str):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(WeightsError, match=r"calibration\.json is damaged") as caught:
        read_calibration(tmp_path, "f" * 64)
    assert "\n" not in str(caught.value)
