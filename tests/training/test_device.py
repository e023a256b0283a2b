from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from studytool.errors import TrainingError
from studytool.models.build import build_model
from studytool.settings import ModelSettings, TrainSettings
from studytool.training import device as devices


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps", "cuda:x"])
def test_a_device_that_is_not_there_is_named(name: str):
    with pytest.raises(TrainingError, match=f"device '{name}'"):
        devices.choose_device(name)


def test_without_a_name_it_is_a_gpu_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert devices.choose_device(None).type == expected
    assert devices.choose_device("cpu") == torch.device("cpu")


def test_the_record_names_the_processor():
    info = devices.describe_device(torch.device("cpu"), 3)
    assert (info.kind, info.trials_side_by_side) == ("cpu", 3)
    assert info.name.endswith(f", {torch.get_num_threads()} threads")
    assert len(info.name.split(",")[0]) > 2


def test_auto_precision_on_a_cpu_is_float32():
    assert devices.choose_precision("auto", torch.device("cpu")) == "float32"
    assert devices.choose_precision("bfloat16", torch.device("cpu")) == "bfloat16"


@pytest.mark.parametrize(
    ("network", "setting", "expected"),
    [
        ("convolutional", "auto", torch.channels_last_3d),
        ("patches", "auto", torch.contiguous_format),
        ("patches", "on", torch.channels_last_3d),
        ("convolutional", "off", torch.contiguous_format),
    ],
)
def test_channels_last_is_for_networks_of_convolutions_on_a_gpu(
    network: str, setting: str, expected: torch.memory_format
):
    settings = ModelSettings(backbone=f"training_nets:{network}")
    model = build_model(settings, num_classes=3, volume_shape_dhw=(8, 8, 8), seed=0)
    assert devices.choose_memory_format(setting, model, torch.device("cuda")) == expected
    if setting == "auto":
        assert devices.choose_memory_format(setting, model, torch.device("cpu")) == torch.contiguous_format


PAGES_FOR_LARGE_TENSORS = """
import resource, torch
from studytool.training import device as devices

def pages():
    "That the kernel had to give while 40 tensors of 64 MiB came and went, after a first one."
    torch.ones(16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cpu = torch.device("cpu")
devices.reuse_memory("auto", torch.device("cuda"))
print(pages())
devices.reuse_memory("auto", cpu)
print(pages())
devices.reuse_memory("off", cpu)
devices.release_memory(cpu)
held = torch.ones(600 << 20, dtype=torch.uint8)  # what is still free in the heap does not suffice
print(pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep what is freed")
def test_what_a_step_on_a_cpu_frees_is_kept_for_the_next_one_unless_it_is_switched_off():
    # In a process of its own: in this one the heap may have holes as large, left by other tests.
    done = subprocess.run([sys.executable, "-c", PAGES_FOR_LARGE_TENSORS], capture_output=True, text=True, check=True)
    before, kept, after = map(int, done.stdout.split())
    pages_each = (64 << 20) // resource.getpagesize()
    assert kept < 10 * pages_each, "the heap gets some holes, and grows to as much as it needs"
    assert huge_pages() or min(before, after) > 32 * pages_each


def huge_pages() -> bool:
    """Whether the kernel gives 2 MiB at once, unasked."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[always]" in setting.read_text()


def test_seeding_is_undone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with devices.seeded(1, torch.device("cpu")):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with devices.seeded(1, torch.device("cpu")):
        assert torch.equal(torch.rand(3), inside)


@pytest.mark.parametrize(
    ("model", "train", "expected"),
    [
        ({}, {}, True),
        ({"freeze": "stage1"}, {}, True),
        ({"freeze": "gradual"}, {}, False),
        ({"dropout": 0.5}, {}, False),
        ({"backbone": "swin3d_t"}, {}, False),  # its blocks are left out at random
        ({}, {"accumulate": 2}, False),
    ],
)
def test_graphs_are_left_out_where_they_would_compute_something_else(model: dict, train: dict, expected: bool):
    settings = TrainSettings(compile="graphs", **train)
    network = build_model(
        ModelSettings(**{"backbone": "training_nets:pointlike", **model}),
        num_classes=3,
        volume_shape_dhw=(8, 8, 8),
        seed=0,
    )
    assert devices.can_be_graphs(settings, network, torch.device("cuda")) is expected
    assert not devices.can_be_graphs(settings, network, torch.device("cpu"))


def test_what_is_left_to_be_chosen_runs_uncompiled():
    network = torch.nn.Linear(2, 2)
    for setting in ("off", "auto"):
        assert devices.choose_forward(TrainSettings(compile=setting), network, torch.device("cpu")) is network
