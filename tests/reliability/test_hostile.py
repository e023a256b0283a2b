"""Files made to do harm, given to the commands that read them, in one process that has ray.tune loaded.

Ray puts unpicklers of its own in place, so that what is safe without it need not be so with it.
"""

from __future__ import annotations

import gzip
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

MOST_BYTES = 512 * 1024 * 1024
MOST_CPU_SECONDS = 5
"""The kernel ends the process that reads the files (SIGXCPU) at the first one that takes longer."""
STUDY = """
name: hostile
data:
  path: data
  simulate: {classes: 2, volumes_per_class: 4, side: 16, voxel_size_angstrom: 18.0, tomograms: [1, 1, 1]}
model: {backbone: r2plus1d_tiny}
train: {max_epochs: 1, batch_size: 2}
"""
RUNNER = """
import json, math, resource, sys, time
from pathlib import Path
import ray.tune
from studytool.cli import main
MOST = int(sys.argv[1])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(words):
    sys.argv = ["studytool", *words]
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0

assert run(["train", "good.yaml"]) == 0  # loads all that any of them needs
for name, words in json.loads(Path("cases.json").read_text()):
    before = peak()
    print(f"case {name}", file=sys.stderr, flush=True)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + MOST, -1))
    code = run(words)
    found = {"name": name, "code": code, "bytes": peak() - before}
    print("found " + json.dumps(found), flush=True)
"""


class _Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def _mrc_header(side: int) -> bytes:
    header = bytearray(1024)
    struct.pack_into("<10i", header, 0, side, side, side, 2, 0, 0, 0, side, side, side)
    struct.pack_into("<3f", header, 40, side * 10.0, side * 10.0, side * 10.0)
    struct.pack_into("<3i", header, 64, 1, 2, 3)
    header[208:212] = b"MAP "
    header[212:216] = bytes([0x44, 0x44, 0, 0])
    return bytes(header)


def _cases(folder: Path) -> list[tuple[str, list[str]]]:
    good = STUDY
    (folder / "good.yaml").write_text(good)

    def data(name: str) -> list[str]:
        return ["data", "import", name, "--out", f"out-{Path(name).stem}"]

    # YAML
    (folder / "object.yaml").write_text('!!python/object/apply:pathlib.Path.touch [!!python/name:pathlib.Path "ran"]')
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(30))
    (folder / "bomb.yaml").write_text(bomb)
    (folder / "deep.yaml").write_text("name: " + "[" * 90_000)
    many = ", ".join(str(1 + i) for i in range(100))
    (folder / "full.yaml").write_text(f"{good}exclude: [{'{a: 1}, ' * 12_000}]\n")
    (folder / "excluding.yaml").write_text(
        f"{good}arms: {{labels_per_class: [{many}], views: [{many}]}}\nexclude: [{'{views: 0}, ' * 100}{{x: 0}}]\n"
    )
    (folder / "combining.yaml").write_text(
        f"{good}arms: {{labels_per_class: [{many}], views: [{many}], batch_size: [{many}], accumulate: [{many}]}}\n"
    )
    (folder / "choosing.yaml").write_text(
        f"{good}arms: {{labels_per_class: [{many}], batch_size: [1, 2]}}\nsearch: {{views: {{choice: [{many}, 0]}}}}\n"
    )
    # checkpoints
    torch.save({"model": _Evil()}, folder / "evil.pt")
    (folder / "evil.pkl").write_bytes(pickle.dumps(_Evil()))
    (folder / "evil.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    # arrays
    np.save(folder / "evil.npy", np.array([_Evil()], dtype=object), allow_pickle=True)
    # Parquet
    (folder / "parquet").mkdir()
    pq.write_table(pa.table({"volume": [b"\0" * 10]}), folder / "parquet" / "part-00000.parquet")
    (folder / "parquet" / "manifest.json").write_text('{"format_version": 1, "shards": [' + "[" * 50_000)
    # MRC and gzip
    for name in ("huge", "bomb"):
        (folder / name / "a").mkdir(parents=True)
    (folder / "huge" / "a" / "1.mrc").write_bytes(_mrc_header(40_000))
    with gzip.open(folder / "bomb" / "a" / "1.mrc.gz", "wb", compresslevel=9) as file:
        file.write(_mrc_header(1500))
        for _ in range(64):
            file.write(bytes(16 * 1024 * 1024))
    # STAR: particles outside of its folder, and a device
    star = "data_\n\nloop_\n_rlnImageName #1\n_rlnClassNumber #2\n{} 1\n"
    (folder / "outside.star").write_text(star.format("../../../../../../etc/passwd"))
    (folder / "device.star").write_text(star.format("/dev/zero"))
    return [
        ("YAML that makes objects", ["run", "object.yaml"]),
        ("YAML that grows", ["run", "bomb.yaml"]),
        ("YAML that is deep", ["run", "deep.yaml"]),
        *((f"YAML {name}", ["run", f"{name}.yaml"]) for name in ("full", "excluding", "combining", "choosing")),
        ("YAML without an end", ["run", "/dev/zero"]),
        *(
            (f"checkpoint {name}", ["train", "good.yaml", "--set", f"init=checkpoint:{name}", "--out", f"o-{name}"])
            for name in ("evil.pt", "evil.pkl", "evil.safetensors")
        ),
        ("pickled array", data("evil.npy")),
        ("manifest and Parquet", ["data", "info", "parquet"]),
        ("MRC that claims 256 TB", data("huge")),
        ("gzip of 1 GB of zeros", data("bomb")),
        ("STAR that leads outside", data("outside.star")),
        ("STAR that leads to a device", data("device.star")),
    ]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    cases = _cases(folder)
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(MOST_CPU_SECONDS)], cwd=folder, capture_output=True, text=True
    )
    found = [json.loads(line.removeprefix("found ")) for line in done.stdout.splitlines() if line.startswith("found ")]
    assert [case["name"] for case in found] == [name for name, _ in cases], done.stderr[-2000:]
    errors = dict(part.split("\n", 1) for part in done.stderr.split("case ")[1:])
    return folder, found, errors


@pytest.mark.slow
def test_no_code_was_run(ended):
    folder, _, _ = ended
    assert not (folder / "ran").exists()


@pytest.mark.slow
def test_every_file_was_refused_in_one_line(ended):
    _, found, errors = ended
    assert {case["name"]: case["code"] for case in found} == {case["name"]: 1 for case in found}
    assert [name for name, words in errors.items() if "Traceback" in words] == []
    lines = {name: words.splitlines() for name, words in errors.items()}
    assert {name: [line[:11] for line in words] for name, words in lines.items()} == {
        name: ["studytool: "] for name in errors
    }
    assert [name for name, (line,) in lines.items() if "weights_only" in line] == []


@pytest.mark.slow
def test_no_file_took_much_memory(ended):
    _, found, _ = ended
    assert [case for case in found if case["bytes"] > MOST_BYTES] == []
