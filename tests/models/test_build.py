from __future__ import annotations

import copy
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from network_cases import TINY, build, cases, needs, volumes
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

from studytool.errors import DataError, SpecError
from studytool.models.anatomy import Anatomy, GlobalAverage
from studytool.models.backbones import Backbone
from studytool.models.build import build_untouched
from studytool.models.torchvision_nets import split_swin

QUICK = {"s3d", "x3d_s"}
# Where the native clip takes long and the untouched network takes another one as well, that one is used. Swin needs
# the full side for its windows not to be cut down; fixed pooling windows and position tables need the native clip.
CLIPS = {
    "r3d_18": (8, 56, 56),
    "mc3_18": (8, 56, 56),
    "r2plus1d_18": (8, 56, 56),
    "swin3d_t": (16, 224, 224),
    "swin3d_s": (16, 224, 224),
    "swin3d_b": (16, 224, 224),
}


@pytest.mark.parametrize("name", cases(QUICK))
@pytest.mark.parametrize("shape", [(28, 28, 28), (20, 32, 32)])
def test_small_volumes_cubic_or_not(name: str, shape: tuple[int, int, int]) -> None:
    backbone = needs(name)
    model = build(shape, backbone=name).eval()
    with torch.no_grad():
        features = model.features(volumes(2, shape))
        logits = model(volumes(2, shape))
    assert tuple(model.stages) == backbone.stages
    assert features.shape == (2, model.num_features)
    assert torch.allclose(logits, model.head(features), atol=1e-6)
    assert torch.isfinite(logits).all()
    assert (features[0] - features[1]).abs().max() > 1e-4 * features.abs().max(), "the network does not see its input"
    clip = tuple(model.description["clip_thw"])
    assert model.description["resized"] == (clip != shape)
    assert all(c >= s and c % m == 0 for c, s, m in zip(clip, shape, backbone.multiple_thw, strict=True))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", cases({"r2plus1d_tiny"}))
def test_training_reaches_every_parameter_and_the_loss_of_a_batch_falls(name: str, all_cores: None) -> None:
    backbone = needs(name)
    shape = (32, 32, 32)
    model = build(shape, backbone=name).train()
    # Without warm-up, networks with position tables jump at a larger rate, and need more than 20 steps to come back.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4 if "table" in backbone.positions else 3e-4)
    batch, labels = volumes(16, shape), torch.arange(16) % 5
    losses = []
    for _step in range(20):
        loss = nn.functional.cross_entropy(model(batch), labels)
        losses.append(loss.item())
        if losses[-1] < 0.9 * losses[0]:
            break
        optimizer.zero_grad()
        loss.backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert without == []
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.fixture
def all_cores() -> Iterator[None]:
    """The tests run on one core each; this one computes for minutes."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", cases({"r2plus1d_18"}))
def test_features_equal_those_of_the_untouched_network(name: str) -> None:
    backbone = needs(name)
    assert backbone.native_clip_thw is not None
    clip = CLIPS.get(name, backbone.native_clip_thw)
    grey = volumes(1, clip)
    with torch.no_grad():
        adapted = build(clip, backbone=name, stem="repeat").eval().features(grey)
        untouched = untouched_features(backbone, grey.expand(1, 3, *clip), seed=3)
    scale = untouched.abs().max()
    assert adapted.std() > 1e-3 * scale > 0, "features without spread prove nothing"
    assert (adapted - untouched).abs().max() <= 1e-5 * scale


def untouched_features(backbone: Backbone, clip: Tensor, seed: int) -> Tensor:
    """What enters the last layer of the published network, run by its own forward."""
    network = build_untouched(backbone, seed).eval()
    if not backbone.head:
        return network(clip[:, :1]).mean((2, 3, 4))  # type: ignore[no-any-return]
    seen: list[Tensor] = []
    [last] = [m for n, m in network.named_modules() if f"{n}.".startswith(backbone.head) and is_last(m)]
    last.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    if backbone.pathways == 2:
        frames = clip.shape[2]
        slow = torch.linspace(0, frames - 1, frames // 4).long()
        network([clip[:, :, slow], clip])
    elif backbone.source == "transformers":
        network(clip.transpose(1, 2))
    else:
        network(clip)
    features = seen[0].flatten(1)
    assert features.shape[1] == (last.in_features if isinstance(last, nn.Linear) else last.in_channels)
    return features


def is_last(module: nn.Module) -> bool:
    outputs = getattr(module, "out_features", getattr(module, "out_channels", None))
    return outputs == 400


@pytest.mark.parametrize(("rule", "factor"), [("sum", 1.0), ("mean", 3.0)])
def test_the_one_channel_stem_answers_as_the_three_channel_one(rule: str, factor: float) -> None:
    shape = (16, 20, 24)
    repeated = build(shape, backbone="x3d_xs", stem="repeat").eval()
    single = build(shape, backbone="x3d_xs", stem=rule).eval()
    assert single.framing.channels == 1
    x = volumes(2, shape)
    stem = "conv.conv_t"
    with torch.no_grad():
        one = single.stages["stem"].get_submodule(stem)(single.framing(x))
        three = repeated.stages["stem"].get_submodule(stem)(repeated.framing(x))
    assert torch.allclose(one * factor, three, atol=1e-5)


def test_slowfast_gets_both_pathways_of_one_channel() -> None:
    model = build((20, 32, 32), backbone="slowfast_r50")
    slow, fast = model.forward_prefix(volumes(2, (20, 32, 32)), "stem")
    assert (slow.shape[2], fast.shape[2]) == (5, 20)
    model = build((30, 32, 32), backbone="slowfast_r50")
    slow, fast = model.forward_prefix(volumes(1, (30, 32, 32)), "stem")
    assert (slow.shape[2], fast.shape[2]) == (8, 30)


def test_removed_strides_keep_the_sides() -> None:
    kept = build((16, 24, 24), backbone="slowfast_r50")
    removed = build((16, 24, 24), backbone="slowfast_r50", stem_stride="remove")
    x = volumes(1, (16, 24, 24))
    assert [tuple(t.shape[2:]) for t in kept.forward_prefix(x, "stem")] == [(4, 6, 6), (16, 6, 6)]
    assert [tuple(t.shape[2:]) for t in removed.forward_prefix(x, "stem")] == [(4, 24, 24), (16, 24, 24)]
    with pytest.raises(SpecError, match="mvit_v2_s cuts its input into patches"):
        build(backbone="mvit_v2_s", stem_stride="remove")


def test_the_time_axis_turns_the_volume_without_mirroring_it() -> None:
    x = volumes(1, (16, 20, 24))
    framed = {axis: build((16, 20, 24), backbone="x3d_xs", time_axis=axis).framing(x) for axis in "zyx"}
    assert torch.equal(framed["z"], x)
    assert torch.equal(framed["y"], x.permute(0, 1, 3, 4, 2))
    assert torch.equal(framed["x"], x.permute(0, 1, 4, 2, 3))


@pytest.mark.parametrize(
    ("input_size", "clip"), [("keep", (16, 20, 24)), (32, (32, 32, 32)), ("native", (4, 160, 160))]
)
def test_the_volume_is_resized_as_asked(input_size: str | int, clip: tuple[int, int, int]) -> None:
    model = build((16, 20, 24), backbone="x3d_xs", input_size=input_size)
    ramp = torch.linspace(0, 1, 20)[None, None, None, :, None].expand(1, 1, 16, 20, 24)
    framed = model.framing(ramp)
    assert tuple(framed.shape[2:]) == clip
    assert framed.mean() == pytest.approx(0.5, abs=1e-3)
    assert (framed.diff(dim=3) >= -1e-6).all()
    assert model.description["resized"] == (input_size != "keep")


def test_small_sides_are_enlarged_where_the_network_needs_it() -> None:
    model = build((16, 16, 16), backbone="s3d")
    assert model.description["clip_thw"] == [16, 17, 17]
    assert model(volumes(2, (16, 16, 16))).shape == (2, 5)


def test_another_shape_is_refused() -> None:
    model = build((16, 20, 24), backbone="x3d_xs")
    with pytest.raises(DataError, match=r"built for volumes of shape \[B, 1, 16, 20, 24\], found \[2, 1, 16, 16, 16\]"):
        model(volumes(2, (16, 16, 16)))


def test_volumes_may_be_half_precision() -> None:
    model = build((16, 16, 16), backbone="x3d_xs").eval()
    x = volumes(2, (16, 16, 16))
    assert torch.allclose(model(x.half()), model(x.half().float()))


def test_a_seed_gives_the_same_network_and_leaves_the_global_state_alone() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    one, same, other = (build(backbone="x3d_xs", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.linear.weight"], other["head.linear.weight"])
    stem = "stages.stem.conv.conv_t.weight"
    assert not torch.equal(one[stem], other[stem])


def test_the_head_depends_on_the_seed_alone() -> None:
    heads = [
        build(backbone="x3d_xs", stem=stem, freeze=freeze, input_size=size, time_axis=axis).head.linear.weight.detach()
        for stem, freeze, size, axis in [("sum", "none", "keep", "z"), ("mean", "backbone", 32, "x")]
    ]
    assert torch.equal(*heads)
    assert heads[0].std() == pytest.approx(0.01, rel=0.1)
    assert build(backbone="x3d_xs", dropout=0.3).head.dropout.p == 0.3


def test_the_prefix_and_the_suffix_are_the_whole_network() -> None:
    shape = (16, 24, 24)
    for name in ("slowfast_r50", TINY):
        model = build(shape, backbone=name).eval()
        x = volumes(1, shape)
        with torch.no_grad():
            whole = model(x)
            for upto in (None, "stem", "stage2", "stage4", "pool"):
                assert torch.equal(model.forward_suffix(model.forward_prefix(x, upto), upto), whole)


def small_swin() -> SwinTransformer3d:
    return SwinTransformer3d([2, 4, 4], 8, [2, 2, 2, 2], [1, 1, 1, 1], [8, 7, 7])


def test_cut_windows_look_positions_up_by_what_they_are() -> None:
    network = small_swin()
    split_swin(network, (8, 12, 12))
    attention = network.features[0][0].attn
    assert attention.window_size == [4, 3, 3]
    assert attention.shift_size == [0, 0, 0]
    places = [(t, h, w) for t in range(4) for h in range(3) for w in range(3)]
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            dt, dh, dw = (p - q for p, q in zip(a, b, strict=True))
            assert attention.relative_position_index[i, j] == ((dt + 7) * 13 + (dh + 6)) * 13 + (dw + 6)


def test_full_windows_are_left_as_they_are() -> None:
    untouched, network = small_swin(), small_swin()
    split_swin(network, (16, 224, 224))
    for (name, old), (_, new) in zip(untouched.named_buffers(), network.named_buffers(), strict=True):
        assert torch.equal(old, new), name


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SpecError, match=r"vivit_b_16x2 needs the package 'transformers'.*studytool\[transformers\]"):
        build(backbone="vivit_b_16x2")


@pytest.fixture
def own_nets(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], str]:
    module = types.ModuleType("own_nets")
    monkeypatch.setitem(sys.modules, "own_nets", module)

    def publish(function: Callable[[], object]) -> str:
        module.net = function  # type: ignore[attr-defined]
        return "own_nets:net"

    return publish


def small_net(channels: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(channels, 4, 3, stride=2), nn.Sequential(nn.BatchNorm3d(4), nn.ReLU()), nn.Conv3d(4, 6, 3)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_your_own_network(own_nets: Callable[[Callable[[], object]], str], channels: int) -> None:
    model = build((16, 18, 20), backbone=own_nets(lambda: small_net(channels)), freeze="stage1")
    assert list(model.stages) == ["stem", "stage1", "stage2"]
    assert model.frozen_prefix == "stage1"
    assert model.num_features == 6
    assert model(volumes(2, (16, 18, 20))).shape == (2, 5)
    assert model.stages["stem"][0].in_channels == 1


@pytest.mark.parametrize(
    ("make_stem", "channels"),
    [
        (lambda: nn.Conv3d(3, 8, 3, padding=2, dilation=2), 1),
        (lambda: nn.Conv3d(3, 8, 3, padding=1, padding_mode="circular"), 1),
        (lambda: nn.Conv3d(3, 8, 3, padding="same"), 1),
        (lambda: nn.Sequential(nn.Conv3d(3, 3, 3), nn.ReLU(), nn.Conv3d(3, 8, 3)), 1),
        (lambda: nn.Sequential(nn.Conv3d(1, 3, 3), nn.ReLU(), nn.Conv3d(3, 8, 3)), 1),
        (lambda: nn.Sequential(nn.BatchNorm3d(3), nn.Conv3d(3, 8, 3)), 3),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv3d(3, 8, 3))), 3),
        (lambda: nn.Sequential(nn.Conv3d(3, 6, 3, groups=3)), 3),
    ],
)
def test_your_own_stem_answers_a_volume_as_it_answers_a_grey_clip(
    own_nets: Callable[[Callable[[], object]], str], make_stem: Callable[[], nn.Module], channels: int
) -> None:
    shape, untouched = (12, 12, 12), []

    def net() -> nn.Module:
        stem = make_stem()
        untouched.append(copy.deepcopy(stem).eval())
        return nn.Sequential(stem, nn.ReLU())

    backbone = own_nets(net)
    model = build(shape, backbone=backbone, stem="sum").eval()
    assert model.framing.channels == channels
    takes = next(m for m in untouched[0].modules() if isinstance(m, nn.Conv3d | nn.BatchNorm3d))
    x = volumes(2, shape)
    with torch.no_grad():
        grey = x.expand(-1, getattr(takes, "in_channels", 3), -1, -1, -1)
        torch.testing.assert_close(model.forward_prefix(x, "stem"), untouched[0](grey), rtol=1e-4, atol=1e-5)
    if channels == 3:
        with pytest.raises(SpecError, match=r"stem: found 'mean', but .* it can be 'sum' or 'repeat'"):
            build(shape, backbone=backbone, stem="mean")


def test_your_own_network_may_say_how_it_pools(own_nets: Callable[[Callable[[], object]], str]) -> None:
    stages = {"stem": nn.Conv3d(1, 4, 3), "stage1": nn.ReLU()}
    backbone = own_nets(lambda: Anatomy(stages, nn.Sequential(nn.MaxPool3d(2), GlobalAverage()), 4))
    model = build((16, 16, 16), backbone=backbone)
    assert model.features(volumes(2, (16, 16, 16))).shape == (2, 4)
    again = build((16, 16, 16), backbone=own_nets(lambda: model))
    assert torch.equal(again.features(volumes(2, (16, 16, 16))), model.features(volumes(2, (16, 16, 16))))


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: 5, {}, "returned int, not a torch.nn.Module"),
        (lambda: nn.Conv3d(1, 2, 3), {}, "Conv3d has no children"),
        (lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(5, 6, 3)), {}, "stage1 cannot take what the stage before"),
        (small_net, {"freeze": "stage7"}, "unknown freeze point 'stage7'"),
        (small_net, {"input_size": "native"}, "has no native clip"),
        (small_net, {"init": "kinetics400"}, "has no initialization 'kinetics400'; it offers random, checkpoint:PATH"),
    ],
)
def test_what_is_wrong_with_your_own_network_is_said(
    own_nets: Callable[[Callable[[], object]], str],
    make: Callable[[], object],
    settings: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(SpecError, match=message):
        build(backbone=own_nets(make), **settings)
