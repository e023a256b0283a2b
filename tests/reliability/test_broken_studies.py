"""A hundred study files, each broken in one way: refused before Ray or torch are loaded, by file, line and key."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest

from studytool.errors import SpecError
from studytool.spec import load_study

GOOD = """\
name: good
seed: 3
data:
  path: data/good
  split: seed0
arms:
  backbone: [r2plus1d_tiny]
  init: [random]
  freeze: [none, stem]
search:
  learning_rate: {log_uniform: [1.0e-5, 1.0e-2]}
  weight_decay: {uniform: [0.0, 0.1]}
  trials_per_arm: 4
  sampler: tpe
  scheduler: {asha: {grace_epochs: 1, reduction_factor: 2}}
confirm:
  seeds: 3
train:
  max_epochs: 8
  batch_size: 16
  optimizer: adamw
model:
  dropout: 0.1
metric:
  name: val/balanced_accuracy
  mode: max
  target: 0.9
resources:
  trials_at_once: 2
"""
COUNT = 100
WRONG_VALUES = ("-7", "'no such name'", "[1, 2, 3, 4]", "{a: 1}", "true", "null", ".nan", "1.0e99")


def broken_studies() -> list[tuple[str, int]]:
    """Texts of study files that cannot be run, each with the line that is wrong."""
    rng = random.Random(0)
    lines = GOOD.splitlines()
    found: dict[str, int] = {}
    while len(found) < COUNT:
        i = rng.randrange(len(lines))
        indent, key, value = re.fullmatch(r"( *)(\w+):(.*)", lines[i]).groups()
        kind = rng.choice(["misspelt", "twice", "wrong value"])
        if kind == "misspelt":
            at = rng.randrange(len(key))
            changed = [f"{indent}{key[:at]}{rng.choice('qxz')}{key[at:]}:{value}"]
        elif kind == "twice":
            changed = [lines[i], lines[i]] if value else [lines[i], f"{indent}{key}: 1"]
        elif not value:
            continue
        else:
            changed = [f"{indent}{key}: {rng.choice(WRONG_VALUES)}"]
        text = "\n".join([*lines[:i], *changed, *lines[i + 1 :]]) + "\n"
        if not _runs(text, key):
            found[text] = i + 1
    return list(found.items())


def _runs(text: str, key: str) -> bool:
    """A few of these changes are allowed: a seed of another number, a null where nothing is the default."""
    return bool(
        re.search(r"(target|split|path): (-7|null|true|'no such name'|1.0e99)", text)
        or re.search(r"(seeds|weight_decay|learning_rate): null", text)
        or (key == "name" and "'no such name'" not in text)
        or (re.search(r"(target): ", text) and key == "target")
    )


@pytest.mark.parametrize(("text", "line"), broken_studies())
def test_it_is_refused_with_its_place(tmp_path, text, line):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_study(path)
    words = str(caught.value)
    assert "\n" not in words
    place = re.match(rf"{re.escape(str(path))}:(\d+): (?:not valid YAML|\w+(?:\.\w+)*):? ", words)
    assert place, words
    # What is missing, or has no value, is said at the line of its section.
    assert abs(int(place[1]) - line) <= 5


def test_the_program_refuses_them_before_it_loads_ray_or_torch(tmp_path):
    """One process for all of them; the exit code and the one line are those of `studytool run`."""
    for i, (text, _) in enumerate(broken_studies()):
        (tmp_path / f"{i}.yaml").write_text(text)
    script = """
import sys
from studytool.cli import main
refused = 0
for i in range(int(sys.argv[1])):
    sys.argv = ["studytool", "run", f"{i}.yaml"]
    try:
        main()
    except SystemExit as end:
        refused += end.code == 1
heavy = {"ray", "torch", "mlflow"} & {*sys.modules}
print(refused, sorted(heavy))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(COUNT)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split(maxsplit=1) == [str(COUNT), "[]\n"]
    assert len(done.stderr.splitlines()) == COUNT
    assert not list(tmp_path.glob("studies"))
