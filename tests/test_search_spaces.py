"""Every arm of every study that ships can be built."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from studytool.models.backbones import find_backbone
from studytool.models.build import build_model
from studytool.models.stand_in import write_stand_in
from studytool.models.weights import weights_file
from studytool.spec import load_study

STUDIES = sorted((Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_arm_of_a_shipped_study_can_be_built(path, tmp_path, monkeypatch):
    """With stand-ins of the published weights: files of the same names, keys and shapes."""
    monkeypatch.setenv("STUDYTOOL_WEIGHTS", str(tmp_path))
    spec = load_study(path)
    assert spec.data.simulate is not None
    side = spec.data.simulate.side
    built = set()
    for arm in spec.list_arms():
        model = spec.trial(arm, {}, phase="search", number=0, seed=0).model
        backbone = find_backbone(model.backbone)
        if backbone.package and importlib.util.find_spec(backbone.package) is None:
            pytest.skip(f"{model.backbone} needs the package {backbone.package}")
        if model.model_dump_json() in built:
            continue
        built.add(model.model_dump_json())
        file = weights_file(model.backbone, model.init)
        if file is not None and not file.shipped and not (tmp_path / file.name).exists():
            write_stand_in(model.backbone, model.init, tmp_path, seed=0)
        network = build_model(model, num_classes=10, volume_shape_dhw=(side, side, side), seed=0)
        trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        everything = {name for name, _ in network.named_parameters()}
        assert trained >= {"head.linear.weight", "head.linear.bias"}
        assert trained != everything or model.freeze in ("none", "layer_decay")
