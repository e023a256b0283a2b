from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from network_cases import build, cases, needs, volumes
from safetensors.torch import save_file
from torch import Tensor, nn

from studytool.errors import SpecError, WeightsError
from studytool.files import sha256_of
from studytool.models import weights
from studytool.models.backbones import BACKBONES
from studytool.models.build import build_untouched
from studytool.models.initialize import initialize, read_tensors
from studytool.models.stand_in import write_stand_in

SHAPE = (16, 16, 16)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STUDYTOOL_WEIGHTS", str(tmp_path))
    return tmp_path


def state(backbone: str, seed: int = 9) -> dict[str, Tensor]:
    """What a published file of the backbone holds, with numbers of its own."""
    return dict(build_untouched(BACKBONES[backbone], seed).state_dict())


def put(folder: Path, backbone: str, content: object, **how: object) -> Path:
    path = folder / BACKBONES[backbone].weights["kinetics400"].name
    torch.save(content, path, **how)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("name", cases({"x3d_s"}))
def test_every_published_file_fits(name: str, folder: Path) -> None:
    backbone = needs(name)
    for init in (init for init, file in backbone.weights.items() if not file.shipped):
        path = write_stand_in(name, init, folder, seed=1)
        report = build(SHAPE, backbone=name, init=init).load_report
        assert report.initialization == init
        assert report.file == path.name
        assert len(report.sha256) == 64
        assert report.check == "recorded"
        if init == "kinetics400":
            assert (report.reshaped, report.missing, report.left_over) == ((), (), ())
            assert report.share == 1.0
        else:
            assert report.share > 0.99
            assert len(report.reshaped) >= 2
            assert all(name.startswith(("fc.", "head.")) for name in report.left_over)
        path.unlink()


def test_random_loads_nothing() -> None:
    report = build(SHAPE, backbone="x3d_s").load_report
    assert str(report) == "random: nothing was loaded"


def test_loaded_weights_are_in_the_network_and_the_head_is_new(folder: Path) -> None:
    published = state("x3d_s")
    put(folder, "x3d_s", {"model_state": published, "epoch": 3})
    model = build(SHAPE, backbone="x3d_s", init="kinetics400", stem="sum")
    stem = published["blocks.0.conv.conv_t.weight"]
    assert torch.equal(model.stages["stem"].conv.conv_t.weight, stem.sum(1, keepdim=True))
    assert torch.equal(
        model.stages["stage1"].res_blocks[0].branch1_conv.weight, published["blocks.1.res_blocks.0.branch1_conv.weight"]
    )
    assert torch.equal(model.head.linear.weight, build(SHAPE, backbone="x3d_s").head.linear.weight)
    assert model.load_report.check == "unchecked"


@pytest.mark.slow
def test_haras_checkpoints_load_as_they_were_published(folder: Path) -> None:
    published = {f"module.{name}": tensor for name, tensor in state("r3d_34").items()}
    assert {"module.conv1.weight", "module.layer2.0.bn1.running_mean", "module.fc.bias"} <= set(published)
    assert not any("downsample" in name for name in published)
    content = {
        "arch": "resnet-34",
        "epoch": 151,
        "state_dict": published,
        "optimizer": {"state": {}, "param_groups": []},
    }
    put(folder, "r3d_34", content, _use_new_zipfile_serialization=False)
    report = build(SHAPE, backbone="r3d_34", init="kinetics400").load_report
    assert (report.share, report.missing, report.left_over) == (1.0, (), ())
    fifty = state("r3d_50")
    assert {"layer1.0.downsample.0.weight", "layer1.0.downsample.1.running_var", "layer4.2.bn3.weight"} <= set(fifty)


def test_shuffled_keeps_each_tensors_numbers_in_another_order(folder: Path) -> None:
    published = state("x3d_s")
    put(folder, "x3d_s", published)
    networks = [build_untouched(BACKBONES["x3d_s"], 0) for _ in range(3)]
    for network, seed in zip(networks, (5, 5, 6), strict=True):
        report = initialize(network, BACKBONES["x3d_s"], "shuffled", seed)
        assert (report.share, report.missing) == (1.0, ())
    one, same, other = ({n: t for n, t in network.state_dict().items() if "proj" not in n} for network in networks)
    moved = 0
    for name, tensor in one.items():
        assert torch.equal(tensor.flatten().sort().values, published[name].flatten().sort().values), name
        assert torch.equal(tensor, same[name])
        moved += not torch.equal(tensor, published[name])
    assert moved > 50
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_inflated_weights_answer_a_still_clip_as_the_image_network_does(folder: Path) -> None:
    path = write_stand_in("r3d_18", "imagenet_inflated", folder, seed=1)
    model = build((9, 32, 32), backbone="r3d_18", init="imagenet_inflated", stem="repeat").eval()
    image = volumes(1, (1, 32, 32))
    kernel = torch.load(path, weights_only=True)["conv1.weight"]
    flat = nn.functional.conv2d(image[:, 0].expand(1, 3, 32, 32), kernel, stride=2, padding=3)
    solid = model.stages["stem"][0](image.expand(1, 3, 9, 32, 32))
    assert torch.allclose(solid[:, :, 4], flat, atol=1e-5)
    report = model.load_report
    assert "stem.0.weight" in report.reshaped
    assert "stem.1.running_mean" in report.matched
    assert report.share == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "images"), [("c2d_r50", "resnet50"), ("swin3d_t", "swin_t")])
def test_inflated_tensors_land_where_they_belong(name: str, images: str, folder: Path) -> None:
    path = write_stand_in(name, "imagenet_inflated", folder, seed=1)
    assert path.name.startswith(f"{images}-")
    flat = torch.load(path, weights_only=True)
    network = build_untouched(BACKBONES[name], 0)
    initialize(network, BACKBONES[name], "imagenet_inflated", 0)
    solid = network.state_dict()
    pairs = {
        "c2d_r50": {
            "layer1.1.conv2.weight": "blocks.1.res_blocks.1.branch2.conv_b.weight",
            "layer2.0.downsample.0.weight": "blocks.3.res_blocks.0.branch1_conv.weight",
            "layer4.2.conv3.weight": "blocks.5.res_blocks.2.branch2.conv_c.weight",
        },
        "swin3d_t": {"features.0.0.weight": "patch_embed.proj.weight"},
    }[name]
    for name_2d, name_3d in pairs.items():
        assert torch.allclose(solid[name_3d].sum(2), flat[name_2d], atol=1e-6)
    if images == "swin_t":
        table_2d = flat["features.7.1.attn.relative_position_bias_table"].view(13, 13, -1)
        table_3d = solid["features.6.1.attn.relative_position_bias_table"].view(15, 13, 13, -1)
        assert torch.equal(table_3d[3], table_2d)
        assert torch.equal(table_3d[14], table_2d)
        assert torch.equal(solid["features.1.reduction.weight"], flat["features.2.reduction.weight"])


def test_too_little_is_an_error_that_names_tensors(folder: Path) -> None:
    published = state("x3d_s")
    half = {name: tensor for name, tensor in published.items() if not name.startswith("blocks.4")}
    path = put(folder, "x3d_s", half)
    with pytest.raises(
        WeightsError, match=r"X3D_S.pyth: .*% of the parameters fit, at least 95%.*blocks.4.res_blocks.0"
    ):
        build(SHAPE, backbone="x3d_s", init="kinetics400")
    wide = {
        n: t.repeat(2, *[1] * (t.ndim - 1)) if n.startswith("blocks.4") and t.ndim > 1 else t
        for n, t in published.items()
    }
    torch.save(wide, path)
    with pytest.raises(
        WeightsError, match=r"blocks.4.res_blocks.0.branch1_conv.weight \[192, 96, 1, 1, 1\] \(the file has \[384, "
    ):
        build(SHAPE, backbone="x3d_s", init="kinetics400")


def test_a_little_missing_or_left_over_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    published = state("x3d_s")
    del published["blocks.1.res_blocks.0.branch2.norm_a.weight"]
    published["ema.decay"] = torch.ones(1)
    put(folder, "x3d_s", published)
    report = build(SHAPE, backbone="x3d_s", init="kinetics400").load_report
    assert report.missing == ("blocks.1.res_blocks.0.branch2.norm_a.weight",)
    assert report.left_over == ("ema.decay",)
    assert 0.99 < report.share < 1
    assert "missing blocks.1.res_blocks.0.branch2.norm_a.weight, left over ema.decay" in str(report)
    [record] = caplog.records
    assert "stay as they were built: blocks.1.res_blocks.0.branch2.norm_a.weight [54]" in record.getMessage()


STEM = "blocks.0.conv.conv_t.weight"


@pytest.mark.parametrize("misfit", [None, torch.zeros(24, 2, 1, 3, 3)])
def test_a_stem_that_would_stay_random_is_refused(folder: Path, misfit: Tensor | None) -> None:
    published = state("x3d_s")
    del published[STEM]
    if misfit is not None:
        published[STEM] = misfit
    put(folder, "x3d_s", published)
    words = r" \(the file has \[24, 2, 1, 3, 3\]\)" if misfit is not None else ""
    with pytest.raises(WeightsError, match=rf"X3D_S.pyth: .* random: {STEM} \[24, 3, 1, 3, 3\]{words};") as caught:
        build(SHAPE, backbone="x3d_s", init="kinetics400", freeze="backbone")
    assert "\n" not in str(caught.value)


def test_a_file_without_running_statistics_is_refused(folder: Path) -> None:
    path = folder / "mine.safetensors"
    save_file({name: t for name, t in state("x3d_s").items() if "running" not in name}, path)
    with pytest.raises(WeightsError, match=r"mine.safetensors: running statistics .*blocks.0.norm.running_mean \[24\]"):
        build(SHAPE, backbone="x3d_s", init=f"checkpoint:{path}")
    first = build(SHAPE, backbone="x3d_s").state_dict()
    save_file({name: t for name, t in first.items() if not name.endswith("running_var")}, path)
    with pytest.raises(WeightsError, match=r"running statistics .*stages.stem.norm.running_var"):
        build(SHAPE, backbone="x3d_s", init=f"checkpoint:{path}")


def test_a_stem_of_one_channel_comes_back_as_it_was(folder: Path) -> None:
    path = folder / "grey.safetensors"
    grey = torch.randn(24, 1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    save_file({**state("x3d_s"), STEM: grey}, path)
    model = build(SHAPE, backbone="x3d_s", init=f"checkpoint:{path}", stem="sum")
    torch.testing.assert_close(model.stages["stem"].conv.conv_t.weight.detach(), grey, rtol=1.2e-7, atol=0.0)
    report = model.load_report
    assert (report.reshaped, report.missing, report.share) == ((STEM,), (), 1.0)


def test_damaged_files_are_one_line_errors(folder: Path) -> None:
    path = put(folder, "x3d_s", state("x3d_s"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(WeightsError, match=r"X3D_S.pyth: cannot be read as weights") as caught:
        build(SHAPE, backbone="x3d_s", init="kinetics400")
    assert "\n" not in str(caught.value)
    torch.save([1, 2], path)
    with pytest.raises(WeightsError, match="holds list, not tensors by name"):
        read_tensors(path.read_bytes(), path)
    torch.save({"a": 1}, path)
    with pytest.raises(WeightsError, match="holds no tensors by name"):
        read_tensors(path.read_bytes(), path)
    broken = state("x3d_s")
    broken["blocks.0.norm.weight"][0] = float("nan")
    torch.save(broken, path)
    with pytest.raises(WeightsError, match=r"not every number is finite in blocks.0.norm.weight"):
        build(SHAPE, backbone="x3d_s", init="kinetics400")


def test_a_damaged_file_of_torchs_old_kind_is_a_one_line_error(folder: Path) -> None:
    path = folder / "old.pth"
    torch.save({"a": torch.ones(3), "b": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    torn = [whole[:length] for length in range(len(whole))]
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    messages = [message for content in torn + flipped if (message := refusal(content, path))]
    assert len(messages) > len(torn)  # some of the flipped bits are those of a number or a name
    assert all("\n" not in words and ("damaged" in words or "tensors by name" in words) for words in messages)


def refusal(content: bytes, path: Path) -> str:
    try:
        read_tensors(content, path)
    except WeightsError as error:
        return str(error)
    return ""


def test_a_file_that_is_replaced_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "mine.safetensors"
    save_file(state("x3d_s", seed=1), path)
    read = weights.read_with_sha256

    def read_and_replace(path: Path) -> tuple[bytes, str]:
        found = read(path)
        save_file(state("x3d_s", seed=2), path)
        return found

    digest = sha256_of(path)
    monkeypatch.setattr(weights, "read_with_sha256", read_and_replace)
    model = build(SHAPE, backbone="x3d_s", init=f"checkpoint:{path}", stem="repeat")
    assert model.load_report.sha256 == digest != sha256_of(path)
    assert torch.equal(model.stages["stem"].conv.conv_t.weight, state("x3d_s", seed=1)[STEM])


def test_a_trials_weights_are_those_of_its_record(folder: Path) -> None:
    path, record = folder / "best.safetensors", folder / "best.json"
    save_file(build(SHAPE, seed=1, backbone="x3d_s").state_dict(), path)
    for init in (f"checkpoint:{folder}", f"checkpoint:{path}"):
        record.write_text(json.dumps({"sha256": sha256_of(path)}))
        assert build(SHAPE, backbone="x3d_s", init=init).load_report.check == "recorded"
        for content, message in [
            (json.dumps({"sha256": 64 * "f"}), r"best.safetensors: SHA-256 is .*, but best.json says ffff"),
            (json.dumps({"sha256": ""}), "the trial has not ended"),
            ('{"sha2', r"best.json is damaged"),
        ]:
            record.write_text(content)
            with pytest.raises(WeightsError, match=message):
                build(SHAPE, backbone="x3d_s", init=init)
    record.write_text("{}")
    assert build(SHAPE, backbone="x3d_s", init=f"checkpoint:{folder}").load_report.check == "unchecked"


class _Surprise:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("ran"),)


def test_nothing_in_a_file_is_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    put(folder, "x3d_s", {"model_state": state("x3d_s"), "extra": _Surprise()})
    with pytest.raises(WeightsError, match="holds more than tensors by name"):
        build(SHAPE, backbone="x3d_s", init="kinetics400")
    assert not (folder / "ran").exists()


def test_a_small_file_that_claims_a_huge_tensor_is_refused(folder: Path) -> None:
    published = state("x3d_s")
    published["blocks.4.res_blocks.0.branch1_conv.weight"] = torch.zeros(1).expand(10**6, 10**6)
    put(folder, "x3d_s", published)
    report = build(SHAPE, backbone="x3d_s", init="kinetics400").load_report
    assert report.missing == ("blocks.4.res_blocks.0.branch1_conv.weight",)


def test_missing_weights_are_a_weights_error() -> None:
    with pytest.raises(WeightsError, match="run `studytool weights fetch x3d_s`"):
        build(SHAPE, backbone="x3d_s", init="shuffled")


def test_a_trials_checkpoint_starts_another_study(folder: Path) -> None:
    first = build(SHAPE, seed=1, backbone="x3d_s")
    save_file(first.state_dict(), folder / "best.safetensors")
    for init in (f"checkpoint:{folder}", f"checkpoint:{folder / 'best.safetensors'}"):
        second = build((20, 24, 28), seed=2, backbone="x3d_s", init=init, freeze="stage2")
        for (name, old), new in zip(
            first.stages.state_dict().items(), second.stages.state_dict().values(), strict=True
        ):
            assert torch.equal(old, new), name
        assert not torch.equal(first.head.linear.weight, second.head.linear.weight)
        assert (second.load_report.share, second.load_report.missing) == (1.0, ())
    with pytest.raises(
        WeightsError, match=r"stages.stem.conv.conv_t.weight \[24, 3, 1, 3, 3\] \(the file has \[24, 1,"
    ):
        build(SHAPE, backbone="x3d_s", init=f"checkpoint:{folder}", stem="repeat")
    with pytest.raises(WeightsError, match=r"0.0% of the parameters fit"):
        build(SHAPE, backbone="s3d", init=f"checkpoint:{folder}")


def test_a_checkpoint_with_published_names_loads_as_well(folder: Path) -> None:
    path = folder / "mine.pth"
    torch.save({"state_dict": state("x3d_s")}, path)
    report = build(SHAPE, backbone="x3d_s", init=f"checkpoint:{path}").load_report
    assert (report.file, report.share, report.check) == ("mine.pth", 1.0, "unchecked")
    with pytest.raises(WeightsError, match="there is no file"):
        build(SHAPE, backbone="x3d_s", init=f"checkpoint:{folder / 'absent.pth'}")


def test_published_names_of_transformers_are_found_in_newer_versions(folder: Path) -> None:
    from studytool.models.transformer_nets import videomae_name, vivit_name

    layer = "vivit.encoder.layer.3."
    assert vivit_name(f"{layer}attention.attention.key.bias") == "vivit.layers.3.attention.k_proj.bias"
    assert vivit_name(f"{layer}attention.output.dense.weight") == "vivit.layers.3.attention.o_proj.weight"
    assert vivit_name(f"{layer}output.dense.weight") == "vivit.layers.3.mlp.fc2.weight"
    assert vivit_name(f"{layer}layernorm_before.weight") == "vivit.layers.3.layernorm_before.weight"
    assert videomae_name("a.attention.attention.q_bias") == "a.attention.attention.query.bias"


def test_only_published_files_have_stand_ins(folder: Path) -> None:
    with pytest.raises(SpecError, match="x3d_s reads no published file for init 'random'"):
        write_stand_in("x3d_s", "random", folder, seed=0)
