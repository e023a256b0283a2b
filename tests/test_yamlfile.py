from __future__ import annotations

from pathlib import Path

import pytest

from studytool.errors import SpecError
from studytool.yamlfile import MAX_BYTES, parse_value, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        (".5", 0.5),
        ("-3", -3),
        ("0", 0),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("0x1F", "0x1F"),
        ("'0012'", "0012"),
        ("[1, a, 2.5]", [1, "a", 2.5]),
        ("{a: 1}", {"a": 1}),
        ("", None),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = parse_value(text, "here")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml:3: a: the key stands twice (first on line 1)"),
        ("a: {b: 1, b: 2}", "a.b: the key stands twice"),
        ("a: 007", "leading zeros"),
        ("a: .inf", "not a finite number"),
        ("a: 1e999", "not a finite number"),
        ("a: &x 1\nb: *x", "x.yaml:1: anchors and aliases"),
        ("a: !!python/object:os.system 1", "tags such as"),
        ("a: [1, 2", "not valid YAML"),
        ("? [1, 2]\n: 3", "a key has to be a plain word"),
        ("a: " + "[" * 30 + "]" * 30, "nested deeper than 20"),
        ("a: 1\n---\nb: 2", "expected a single document in the stream, but found another document"),
        ("a: \x00", "not valid YAML"),
        ("\tb: 1", "x.yaml:1: not valid YAML"),
    ],
)
def test_what_is_not_plain_is_refused_with_its_place(text, words):
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, "x.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lines_of_keys_and_items_are_known():
    file = parse_yaml("a:\n  b:\n    - 1\n    - 2\n", "x")
    assert file.lines[("a",)] == 1
    assert file.lines[("a", "b")] == 2
    assert file.lines[("a", "b", 1)] == 4


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SpecError, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="not a text file in UTF-8"):
        read_yaml(tmp_path / "binary.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(SpecError, match="too large for a study file"):
        read_yaml(tmp_path / "large.yaml")
    with pytest.raises(SpecError, match="too large for a study file"):
        read_yaml(Path("/dev/zero"))
