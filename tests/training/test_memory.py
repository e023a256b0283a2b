from __future__ import annotations

import pytest
import torch

from studytool.training.memory import is_out_of_memory, processes_killed_for_memory


def _caught(call) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one it is differs between versions of torch
        call()
    return caught.value


def test_what_torch_and_python_raise_when_memory_is_short_is_recognized():
    assert is_out_of_memory(_caught(lambda: torch.empty(2**60, dtype=torch.uint8)))
    assert is_out_of_memory(_caught(lambda: bytearray(2**60)))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB"))


def test_so_is_an_error_that_was_caused_by_it():
    def chain() -> None:
        try:
            bytearray(2**60)
        except MemoryError as error:
            raise RuntimeError("the batch could not be made") from error

    assert is_out_of_memory(_caught(chain))


def test_other_errors_are_not():
    assert not is_out_of_memory(_caught(lambda: torch.zeros(2) @ torch.zeros(3)))
    assert not is_out_of_memory(ValueError("not enough memory cards"))


@pytest.mark.parametrize(
    ("cgroup", "file"),
    [
        ("0::/user.slice\n", "sys/fs/cgroup/user.slice/memory.events"),
        ("0::/\n", "sys/fs/cgroup/memory.events"),
        ("4:memory:/job\n1:cpu:/\n0::/\n", "sys/fs/cgroup/memory/job/memory.oom_control"),
        ("4:memory:/hidden\n", "sys/fs/cgroup/memory/memory.oom_control"),
    ],
)
def test_the_kernels_count_is_read_from_this_control_group(tmp_path, cgroup, file):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    assert processes_killed_for_memory(tmp_path) == 0
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("oom_kill_disable 0\nunder_oom 0\noom 4\noom_kill 3\n")
    assert processes_killed_for_memory(tmp_path) == 3
