"""The most operations a device can do in a second: what a trial's share of it (MFU) is counted against.

MFU, model FLOPs utilization, is what the network asks for over what the device could do in the same time (Chowdhery et
al., PaLM, arXiv 2204.02311, appendix B). Of common GPUs the makers' data sheets tell it; of a CPU and of other GPUs a
matrix product is measured, once per machine, and remembered beside the measurements of `studytool plan`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache

import torch

from studytool.data.cachefolder import cache_folder
from studytool.files import write_json
from studytool.training.device import DTYPES, Precision, cpu_name, synchronize

PEAK_TFLOPS: Mapping[str, tuple[float, float]] = {
    # Volta, Turing: no TF32, so that float32 is that of the ordinary cores. V100 data sheet; T4 data sheet.
    "V100-SXM2": (125.0, 15.7),
    "V100-SXM3": (125.0, 15.7),
    "V100-PCIE": (112.0, 14.0),
    "V100S-PCIE": (130.0, 16.4),
    "Tesla T4": (65.0, 8.1),
    # Ampere. Data sheets of A100, A30, A10, A40; for GeForce and RTX the GA102 architecture whitepaper.
    "A100": (312.0, 156.0),
    "A30": (165.0, 82.0),
    "A10": (125.0, 62.5),
    "A10G": (70.0, 35.0),
    "A40": (149.7, 74.8),
    "RTX A6000": (154.8, 77.4),
    "RTX 3080": (59.5, 29.8),
    "RTX 3090": (71.0, 35.6),
    "RTX 3090 Ti": (80.0, 40.0),
    # Ada. Data sheets of L4, L40, L40S; else the Ada GPU architecture whitepaper.
    "L4": (121.0, 60.0),
    "L40": (181.0, 90.5),
    "L40S": (362.0, 183.0),
    "RTX 6000 Ada": (364.2, 182.1),
    "RTX 4080": (97.5, 48.7),
    "RTX 4090": (165.2, 82.6),
    # Hopper. Data sheets of H100, H200, GH200, whose figures with sparsity are twice these.
    "H100": (989.0, 494.5),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 417.5),
    "H200": (989.0, 494.5),
    "H200 NVL": (835.0, 417.5),
    "GH200": (989.0, 494.5),
    # Blackwell. Data sheet of HGX B200; RTX Blackwell architecture whitepaper.
    "B200": (2250.0, 1125.0),
    "RTX 5080": (112.6, 56.3),
    "RTX 5090": (209.5, 104.8),
}
"""Dense TFLOP/s of a GPU, without sparsity, summed in float32: at 16 bits, and at float32.

The second is TF32 where the GPU has it, since torch lets cuDNN compute the convolutions of float32 in it. (torch has a
table of its own in `torch._inductor.analysis`; 2.15's knows few of these and has the L4's figure with sparsity.)
"""
_CUT_DOWN = ("Laptop", "Max-Q", "MIG")
_MEASURE_SECONDS = 0.2
_SIDE = {"cpu": 1024, "cuda": 8192}


def peak_flops(device: torch.device, precision: Precision) -> float:
    """Operations per second of the device (of a CPU: of torch's threads) at most; multiplying and adding are two.

    A measured one is that of the moment: of a machine that others use it is too low, and then every share is too high.
    """
    known = None if device.type == "cpu" else listed_tflops(torch.cuda.get_device_name(device), precision)
    return known * 1e12 if known is not None else _remembered(device, precision, torch.get_num_threads())


def listed_tflops(gpu: str, precision: Precision) -> float | None:
    """TFLOP/s of a GPU by the name its driver gives, as its data sheet has them; None for one that is not listed."""
    words = gpu.replace("-", " ").split()
    if any(part in gpu for part in _CUT_DOWN):
        return None
    fitting = [name for name in PEAK_TFLOPS if {*name.replace("-", " ").split()} <= {*words}]
    if not fitting:
        return None
    half, single = PEAK_TFLOPS[max(fitting, key=len)]
    return single if precision == "float32" else half


@cache
def _remembered(device: torch.device, precision: Precision, threads: int) -> float:
    name = cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    key = [platform.node(), name, threads if device.type == "cpu" else 0, precision, torch.__version__]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = cache_folder("measurements") / f"peak-{digest}.json"
        return float(json.loads(kept.read_text(encoding="utf-8"))["flops_per_second"])
    measured = _measured(device, precision)
    with suppress(OSError):  # no trial is to fail by this
        write_json(
            cache_folder("measurements") / f"peak-{digest}.json", {"measured": key, "flops_per_second": measured}
        )
    return measured


def _measured(device: torch.device, precision: Precision) -> float:
    """The fastest of the matrix products that fit into `_MEASURE_SECONDS`, three at least; the first is warm-up."""
    side = _SIDE[device.type]
    a, b = torch.ones(2, side, side, dtype=DTYPES[precision], device=device)
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - begun < _MEASURE_SECONDS:
        synchronize(device)
        before = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - before)
    return float(2 * side**3 / min(seconds[1:]))
