from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from studytool.training import peak


@pytest.mark.parametrize(
    ("gpu", "half", "single"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0, 156.0),
        ("NVIDIA A100 80GB PCIe", 312.0, 156.0),
        ("NVIDIA A10G", 70.0, 35.0),
        ("Tesla V100-SXM2-16GB", 125.0, 15.7),
        ("NVIDIA H100 80GB HBM3", 989.0, 494.5),
        ("NVIDIA H100 PCIe", 756.0, 378.0),
        ("NVIDIA H200 NVL", 835.0, 417.5),
        ("NVIDIA RTX A6000", 154.8, 77.4),
        ("NVIDIA RTX 6000 Ada Generation", 364.2, 182.1),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0, 40.0),
        ("NVIDIA L40S", 362.0, 183.0),
    ],
)
def test_a_gpu_is_known_by_its_name(gpu: str, half: float, single: float):
    assert [peak.listed_tflops(gpu, p) for p in ("bfloat16", "float16", "float32")] == [half, half, single]


@pytest.mark.parametrize(
    "gpu", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L400", "Quadro T1000"]
)
def test_no_gpu_is_taken_for_another(gpu: str):
    assert peak.listed_tflops(gpu, "bfloat16") is None


def test_no_gpu_is_faster_at_float32_than_at_16_bits():
    assert all(half > single for half, single in peak.PEAK_TFLOPS.values())


def test_a_processor_is_measured_once_and_then_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STUDYTOOL_CACHE", str(tmp_path))
    peak._remembered.cache_clear()
    measured = peak.peak_flops(torch.device("cpu"), "float32")
    assert measured > 1e8
    (kept,) = (tmp_path / "measurements").iterdir()
    content = json.loads(kept.read_text())
    assert content["flops_per_second"] == measured
    kept.write_text(json.dumps({**content, "flops_per_second": 5.0}))
    peak._remembered.cache_clear()
    assert peak.peak_flops(torch.device("cpu"), "float32") == 5.0
    kept.write_text("damaged")
    peak._remembered.cache_clear()
    assert peak.peak_flops(torch.device("cpu"), "float32") > 1e8
    peak._remembered.cache_clear()
