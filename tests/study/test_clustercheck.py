"""What a node says of itself, asked here without a cluster."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from studytool.data import remote_copy
from studytool.spec import StudySpec
from studytool.study import clustercheck
from studytool.study.clustercheck import Needs, look_from_node, needs_of
from studytool.study.ledger import Ledger
from studytool.study.nodewatch import what_node_lacks
from studytool.study.run import ensure_dataset

YAML = """
name: tiny
data: {path: FOLDER/data, simulate: {classes: 3, volumes_per_class: 10, side: 16}}
arms: {backbone: ["tiny_backbone:tiny"]}
output: FOLDER/studies
"""


@pytest.fixture
def needs(tmp_path, monkeypatch) -> Needs:
    from rich.console import Console

    monkeypatch.setenv("STUDYTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(clustercheck, "_PATIENCE_SECONDS", 0.1)
    (tmp_path / "a.yaml").write_text(YAML.replace("FOLDER", str(tmp_path)))
    from studytool.spec import load_study

    spec: StudySpec = load_study(tmp_path / "a.yaml")
    manifest = ensure_dataset(spec.data, Console(quiet=True))
    ledger = Ledger(spec, manifest.fingerprint)
    ledger.close()
    return needs_of(spec, ledger.uid, manifest)


def lacks(needs: Needs) -> str:
    return what_node_lacks(asdict(needs))


def test_a_node_like_the_driver_s_lacks_nothing(needs):
    assert look_from_node(needs) == ()
    assert lacks(needs) == ""


def test_other_versions_are_named_and_nothing_else_is_tried(needs):
    other = replace(needs, versions={**needs.versions, "torch": "0.1"}, data="/nowhere")
    (finding,) = look_from_node(other)
    assert f"torch {needs.versions['torch']} instead of 0.1" in finding.found
    assert "cluster/install.sh" in finding.mend


def test_a_folder_of_the_same_name_on_the_node_s_own_disk_is_not_the_study_s(needs, tmp_path):
    assert "output: " in lacks(replace(needs, place=str(tmp_path / "nowhere")))
    assert "the study that the driver has there is not here" in lacks(replace(needs, uid="of another study"))


def test_data_that_cannot_be_read_or_do_not_fit(needs, tmp_path):
    assert "no manifest.json there; it has to lie on a folder that all nodes mount" in lacks(replace(needs, data="/no"))
    there = replace(needs, data=f"file://{needs.data}", data_bytes=10**18)
    assert "set STUDYTOOL_CACHE to a larger disk" in lacks(there)
    assert lacks(replace(there, data_bytes=1)) == ""
    assert remote_copy.is_copied(there.data)
    assert look_from_node(there) == (), "what is copied already needs no room"


def test_a_shard_that_is_damaged_at_its_address_is_the_node_s_trouble_and_not_the_trial_s(needs, tmp_path):
    (shard,) = (tmp_path / "data").glob("*.parquet")
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    assert "its SHA-256 is" in lacks(replace(needs, data=f"file://{needs.data}"))


def test_a_network_that_cannot_be_imported_is_named(needs):
    assert "backbone: no_such_module:net" in lacks(replace(needs, models=(("no_such_module:net", "random"),)))
