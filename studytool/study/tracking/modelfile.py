"""A network as a folder in MLflow's model format, which `mlflow models serve` and `mlflow.pyfunc` take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studytool.study.tracking.store import quiet_mlflow


def save_model(module: Any, example: NDArray[np.float32], path: Path, card: Mapping[str, Any]) -> None:
    """Write a `torch.nn.Module` as an exported program with its signature; no pickle is in it."""
    quiet_mlflow()
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def any_batch(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (-1, *shape[1:])

    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), any_batch(example.shape))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(card["classes"])))]),
    )
    mlflow.pytorch.save_model(
        module,
        str(path),
        serialization_format="pt2",
        input_example=example,
        signature=signature,
        metadata=dict(card),
        pip_requirements=["torch", "numpy", "mlflow"],
    )


def load_model(path: Path) -> Callable[[NDArray[np.float32]], NDArray[np.float64]]:
    """What runs volumes through a folder that `save_model` has written."""
    quiet_mlflow()
    import mlflow

    model = mlflow.pyfunc.load_model(str(path))
    return lambda volumes: np.asarray(model.predict(volumes), np.float64)
