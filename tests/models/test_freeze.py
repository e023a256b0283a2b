from __future__ import annotations

import sys
import types

import pytest
import torch
from network_cases import TINY, build, cases, needs, volumes
from torch import Tensor, nn

from studytool.errors import SpecError
from studytool.models.adapt import StagedModel, is_batchnorm
from studytool.models.backbones import BACKBONES
from studytool.models.freeze import freeze_report, is_norm, parameter_groups, release

SHAPE = (24, 24, 24)
# The feature is the class token, which in the last block asks without positions and without pooling.
UNUSED = {
    "mvit_v2_s": {
        f"stages.stage4.blocks.1.attn.{name}" for name in ("pool_q.pool.weight", "rel_pos_t", "rel_pos_h", "rel_pos_w")
    }
}


def train(model: StagedModel, steps: int, *, learning_rate: float = 1e-2) -> None:
    optimizer = torch.optim.Adam(parameter_groups(model, learning_rate=learning_rate, weight_decay=0.0))
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        logits = model(volumes(2, SHAPE, seed=step))
        nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
        optimizer.step()


def copies(model: StagedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: StagedModel) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("name", [TINY, *cases(set())])
def test_five_steps_change_what_is_released_and_nothing_else(name: str) -> None:
    if name != TINY:
        needs(name)
    stages = ("stem", "stage1", "stage2", "stage3", "stage4") if name == TINY else BACKBONES[name].stages
    model = build(SHAPE, backbone=name, freeze=stages[-2])
    before = copies(model)
    train(model, 5)
    frozen_prefixes = tuple(f"stages.{part}." for part in model.frozen_parts if part != "pool")
    after = changed(before, model)
    assert model.frozen_parts == stages[:-1]
    assert [name for name in after if name.startswith(frozen_prefixes)] == []
    released = {n for n, _ in model.named_parameters() if not n.startswith(frozen_prefixes)}
    assert released - after == UNUSED.get(name, set())
    running = {name for name in before if name.endswith("running_mean") and not name.startswith(frozen_prefixes)}
    assert running <= after


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ("none", ()),
        ("layer_decay", ()),
        ("stem", ("stem",)),
        ("stage4", ("stem", "stage1", "stage2", "stage3", "stage4")),
        ("backbone", ("stem", "stage1", "stage2", "stage3", "stage4", "pool")),
        ("gradual", ("stem", "stage1", "stage2", "stage3", "stage4", "pool")),
    ],
)
def test_freeze_points(freeze: str, frozen: tuple[str, ...]) -> None:
    model = build(SHAPE, backbone=TINY, freeze=freeze)
    assert model.frozen_parts == frozen
    assert model.frozen_prefix == (frozen[-1] if frozen else None)
    assert model.prefix_is_constant == bool(frozen)
    for row in freeze_report(model):
        assert row.trained == (0 if row.name in frozen else row.parameters)
    assert sum(row.parameters for row in freeze_report(model)) == sum(p.numel() for p in model.parameters())
    held = {id(p) for group in parameter_groups(model, learning_rate=1.0, weight_decay=0.1) for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_pool_without_parameters_is_frozen_with_the_stage_before_it() -> None:
    assert build(SHAPE, backbone="s3d", freeze="stage4").frozen_prefix == "pool"


def test_norm_only_trains_norms_and_the_head() -> None:
    model = build(SHAPE, backbone=TINY, freeze="norm_only")
    norms = {id(p) for module in model.modules() if is_norm(module) for p in module.parameters()}
    head = {id(p) for p in model.head.parameters()}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == norms | head
    assert len(norms) == 12
    before = copies(model)
    train(model, 2)
    kernels = {n for n, p in model.named_parameters() if p.ndim == 5}
    assert kernels & changed(before, model) == set()
    assert {n for n, p in model.named_parameters() if id(p) in trained} <= changed(before, model)


def test_norm_only_without_norms_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_nets")
    module.net = lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_nets", module)
    with pytest.raises(SpecError, match="norm_only matches nothing"):
        build(SHAPE, backbone="own_nets:net", freeze="norm_only")


def test_gradual_releases_a_stage_from_the_top_every_k_epochs() -> None:
    model = build(SHAPE, backbone=TINY, freeze="gradual", gradual_epochs=2)
    released = [release(model, epoch) for epoch in range(1, 12)]
    assert released == [(), (), ("stage4", "pool"), (), ("stage3",), (), ("stage2",), (), ("stage1",), (), ("stem",)]
    assert model.frozen_parts == ()
    model = build(SHAPE, backbone=TINY, freeze="gradual", gradual_epochs=2)
    assert release(model, 6) == ("stage3", "stage4", "pool")
    assert model.frozen_prefix == "stage2"


def test_groups_added_at_a_release_are_those_of_a_resumed_run() -> None:
    def names(groups: list[dict[str, object]]) -> list[object]:
        return [group["name"] for group in groups]

    model = build(SHAPE, backbone=TINY, freeze="gradual", gradual_epochs=1)
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3, weight_decay=0.1))
    for epoch in (2, 3, 4):
        for group in parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, parts=release(model, epoch)):
            optimizer.add_param_group(group)
    resumed = build(SHAPE, backbone=TINY, freeze="gradual", gradual_epochs=1)
    release(resumed, 4)
    groups = parameter_groups(resumed, learning_rate=1e-3, weight_decay=0.1)
    assert names(optimizer.param_groups) == names(groups)
    for old, new in zip(optimizer.param_groups, groups, strict=True):
        assert [p.shape for p in old["params"]] == [p.shape for p in new["params"]]


def test_layer_decay_scales_the_learning_rate_per_stage() -> None:
    model = build(SHAPE, backbone=TINY, freeze="layer_decay", layer_decay=0.5)
    scales = {group["name"]: group["lr_scale"] for group in parameter_groups(model, learning_rate=2.0, weight_decay=0)}
    by_part = {name.partition("/")[0]: scale for name, scale in scales.items()}
    assert by_part == {
        "head": 1.0,
        "pool": 0.5,
        "stage4": 0.5,
        "stage3": 0.25,
        "stage2": 0.125,
        "stage1": 0.0625,
        "stem": 0.03125,
    }
    for group in parameter_groups(model, learning_rate=2.0, weight_decay=0.1):
        assert group["lr"] == 2.0 * group["lr_scale"]
        assert group["weight_decay"] == (0.1 if group["name"].endswith("/decay") else 0.0)
        assert all((p.ndim > 1) == group["name"].endswith("/decay") for p in group["params"])


@pytest.mark.parametrize("policy", ["eval", "train"])
def test_the_mode_of_frozen_batchnorm(policy: str) -> None:
    model = build(SHAPE, backbone=TINY, freeze="stage1", frozen_batchnorm=policy).train()
    frozen = [m for part in ("stem", "stage1") for m in model.stages[part].modules() if is_batchnorm(m)]
    later = [m for part in ("stage2", "stage4") for m in model.stages[part].modules() if is_batchnorm(m)]
    assert {m.training for m in frozen} == {policy == "train"}
    assert {m.training for m in later} == {True}
    before = copies(model)
    model(volumes(2, SHAPE))
    moved = any(name.startswith(("stages.stem", "stages.stage1")) for name in changed(before, model))
    assert moved == (policy == "train")
    assert model.prefix_is_constant == (policy == "eval")
    model.eval()
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_batchnorm_of_any_dimension_is_kept_in_eval(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = kind(4)

        def forward(self, x: Tensor) -> Tensor:
            shape = {nn.BatchNorm1d: (*x.shape[:2], -1), nn.BatchNorm2d: (*x.shape[:3], -1)}.get(kind, x.shape)
            return self.norm(x.reshape(shape)).reshape(x.shape)

    module = types.ModuleType("own_nets")
    module.net = lambda: nn.Sequential(nn.Conv3d(1, 4, 3), Norm(), nn.Conv3d(4, 4, 3))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_nets", module)
    model = build(SHAPE, backbone="own_nets:net", freeze="stage1").train()
    before = copies(model)
    model(volumes(2, SHAPE))
    assert changed(before, model) == set()


@pytest.mark.parametrize(("freeze", "equal"), [("stage1", True), ("stem", False)])
def test_frozen_dropout_is_off(freeze: str, equal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_nets")
    noisy = nn.Sequential(nn.Conv3d(4, 4, 3), nn.Dropout(0.5))
    module.net = lambda: nn.Sequential(nn.Conv3d(1, 4, 3), noisy, nn.Conv3d(4, 4, 3))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_nets", module)
    model = build(SHAPE, backbone="own_nets:net", freeze=freeze).train()
    first, again = (model.forward_prefix(volumes(1, SHAPE), "stage1") for _ in range(2))
    assert torch.equal(first, again) == equal


def test_the_frozen_part_runs_without_a_graph() -> None:
    def kept_bytes(freeze: str) -> int:
        kept = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = build(SHAPE, backbone=TINY, freeze=freeze).train()
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(volumes(2, SHAPE))
        assert logits.requires_grad
        return sum(size for place, size in kept.items() if place not in weights)

    assert kept_bytes("backbone") < 0.02 * kept_bytes("none")
    assert kept_bytes("stage2") < 0.5 * kept_bytes("none")
    model = build(SHAPE, backbone=TINY, freeze="stage2").train()
    assert not model.forward_prefix(volumes(2, SHAPE), "stage2").requires_grad
    assert model.forward_prefix(volumes(2, SHAPE), "stage3").requires_grad
