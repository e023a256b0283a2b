from __future__ import annotations

import subprocess
import sys

import pytest

from studytool import registry
from studytool.errors import SpecError
from studytool.models.backbones import BACKBONES, FREEZE_RULES, check_model_choice, find_backbone
from studytool.registry import INITIALIZATIONS


def test_the_table_loads_without_torch() -> None:
    code = (
        "import sys; import studytool.models.backbones; "
        "print([m for m in ('torch', 'torchvision', 'pytorchvideo', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_entry_can_be_loaded_and_every_file_has_its_own_name() -> None:
    assert len(BACKBONES) >= 24
    for name, backbone in BACKBONES.items():
        assert backbone.name == name
        assert backbone.stages[0] == "stem"
        assert callable(registry.load(backbone.split))
        assert callable(registry.load(backbone.build))
        assert ("imagenet_inflated" in backbone.weights) == bool(backbone.inflate)
        for entry in (backbone.inflate, backbone.rename):
            assert not entry or callable(registry.load(entry))
        assert set(backbone.initializations) <= set(INITIALIZATIONS)
    files = {(file.name, file.url) for backbone in BACKBONES.values() for file in backbone.weights.values()}
    assert len({name for name, _ in files}) == len(files)


def test_torchvision_files_are_those_torchvision_names() -> None:
    from torchvision.models import get_model_weights

    for name, backbone in BACKBONES.items():
        networks = {"kinetics400": name, "imagenet_inflated": ""}
        for init, file in backbone.weights.items():
            if "download.pytorch.org" not in file.url:
                continue
            network = networks[init] or file.name.partition("-")[0]
            urls = [weights.url for weights in get_model_weights(network)]
            assert file.url in urls, f"{name}: torchvision has {urls}"
            assert file.digest.startswith(file.name.rpartition("-")[2].removesuffix(".pth"))
            assert len(file.digest) in (8, 64)


def test_pytorchvideo_files_are_those_pytorchvideo_names() -> None:
    from pytorchvideo.models import hub

    for name, backbone in BACKBONES.items():
        if backbone.source == "pytorchvideo":
            module = sys.modules[getattr(hub, name).__module__]
            assert backbone.weights["kinetics400"].url == module.checkpoint_paths[name]


@pytest.mark.parametrize(
    ("backbone", "init", "freeze"),
    [
        ("r2plus1d_18", "kinetics400", "stage4"),
        ("r3d_18", "imagenet_inflated", "none"),
        ("csn_r101", "shuffled", "norm_only"),
        ("x3d_s", "checkpoint:some/file.pth", "gradual"),
        ("my.nets:build", "random", "stage12"),
    ],
)
def test_choices_that_exist(backbone: str, init: str, freeze: str) -> None:
    check_model_choice(backbone, init, freeze)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("r2plus1d", "random", "none"), "unknown backbone 'r2plus1d'; did you mean 'r2plus1d_18'"),
        (
            ("r2plus1d_18", "imagenet_inflated", "none"),
            "backbone r2plus1d_18 has no initialization 'imagenet_inflated'; it offers random, kinetics400, shuffled, "
            "checkpoint:PATH",
        ),
        (("r3d_18", "kinetics", "none"), "unknown initialization 'kinetics'; did you mean 'kinetics400'"),
        (("r3d_18", "random", "stage5"), "unknown freeze point 'stage5'; did you mean 'stage4' or 'stage3'"),
        (("r3d_18", "random", "norm-only"), "did you mean 'norm_only'"),
        (("my.nets:build", "random", "stage0"), "unknown freeze point 'stage0'"),
        (("mvit_v2_s", "random", "none", "remove"), "stem_stride can only be 'keep'"),
    ],
)
def test_choices_that_do_not_exist(choice: tuple[str, ...], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_model_choice(*choice)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_freeze_points_are_rules_and_stages() -> None:
    assert find_backbone("s3d").freeze_points == (*FREEZE_RULES, "stem", "stage1", "stage2", "stage3", "stage4")
