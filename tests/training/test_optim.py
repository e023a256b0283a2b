from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from studytool.models.adapt import StagedModel
from studytool.models.build import build_model
from studytool.settings import ModelSettings, TrainSettings
from studytool.training.optim import Updater, build_optimizer, learning_rate_factor


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"max_epochs": 10, "learning_rate": 0.1, **changes})


def network(**changes: Any) -> StagedModel:
    chosen = ModelSettings(backbone="training_nets:convolutional", **changes)
    return build_model(chosen, num_classes=3, volume_shape_dhw=(8, 8, 8), seed=0)


def test_cosine_starts_at_1_is_half_in_the_middle_and_ends_near_0():
    factors = [learning_rate_factor(settings(schedule="cosine"), step, 10) for step in range(100)]
    assert factors[0] == 1.0
    assert factors[50] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.001
    assert factors == sorted(factors, reverse=True)


def test_warmup_rises_in_equal_steps_to_the_schedule():
    chosen = settings(schedule="cosine", warmup_epochs=0.5)
    factors = [learning_rate_factor(chosen, step, 8) for step in range(80)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4 + 38] == pytest.approx(0.5)  # half of what is left after 4 steps


def test_multistep_drops_at_half_and_at_three_quarters():
    factors = [learning_rate_factor(settings(schedule="multistep"), step, 4) for step in range(40)]
    assert factors == [1.0] * 20 + [0.1] * 10 + [0.01] * 10


def test_constant_is_constant():
    assert {learning_rate_factor(settings(schedule="constant"), step, 3) for step in range(30)} == {1.0}


def test_a_warmup_as_long_as_the_training_is_refused():
    with pytest.raises(ValueError, match=r"warmup_epochs \(10\) has to be below max_epochs \(10\)"):
        settings(warmup_epochs=10.0)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_weight_decay_spares_biases_and_norms(name: str):
    model = network()
    optimizer = build_optimizer(model, settings(optimizer=name, weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for parameter_name, parameter in model.named_parameters():
        is_weight = parameter_name.endswith("weight") and parameter.ndim > 1
        assert decay[id(parameter)] == (0.5 if is_weight else 0.0), parameter_name


@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_updates_are_those_of_torch_with_channels_last_too(name: str, fused: str):
    """The fused kernels read memory in its order, whatever the layout: compare with the plain loop over tensors."""
    chosen = settings(optimizer=name, weight_decay=0.1, schedule="constant", fused=fused)
    model, reference = network(), network()
    model.to(memory_format=torch.channels_last_3d)
    updater = Updater(model, chosen, steps_per_epoch=5, scale_gradients=False)
    assert bool(updater.optimizer.param_groups[0]["fused"]) == (fused == "auto")
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    extra = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
    plain = kind(build_optimizer(reference, chosen).param_groups, lr=0.1, foreach=False, fused=False, **extra)
    for group in plain.param_groups:
        group.update(fused=False, foreach=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        # The gradient of sum(p g) is g.
        updater.update(
            torch.stack([(p * g).sum() for p, g in zip(model.parameters(), gradients, strict=True)]).sum(), step
        )
        for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
            parameter.grad = gradient
        plain.step()
    for (parameter_name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=parameter_name)


def test_clipping_bounds_the_step_of_sgd():
    model = network()
    chosen = settings(optimizer="sgd", momentum=0.0, weight_decay=0.0, gradient_clip=0.01, schedule="constant")
    before = [p.detach().clone() for p in model.parameters()]
    updater = Updater(model, chosen, steps_per_epoch=1, scale_gradients=False)
    updater.update(1000 * model(torch.randn(4, 1, 8, 8, 8)).sum(), 0)
    moved = math.sqrt(
        sum(float((p.detach() - b).square().sum()) for p, b in zip(model.parameters(), before, strict=True))
    )
    assert moved == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_scaled_gradients_give_the_same_step():
    x = torch.randn(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = []
    for scale_gradients in (False, True):
        model = network().eval()
        chosen = settings(optimizer="sgd", gradient_clip=1.0)
        updater = Updater(model, chosen, steps_per_epoch=1, scale_gradients=scale_gradients)
        updater.update(model(x).square().sum(), 0)
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*weights)


def test_gradients_add_up_until_the_step():
    x = torch.randn(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = []
    for parts in ([x.sum()], [x[:1].sum(), x[1:].sum()]):
        model = network()
        updater = Updater(model, settings(optimizer="sgd"), steps_per_epoch=2, scale_gradients=False)
        for step in range(2):  # the second step has to begin with no gradients
            for part in parts:
                updater.backward(part * sum(p.square().sum() for p in model.parameters()))
            updater.step(step)
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*weights)


def test_without_an_average_the_network_itself_is_the_result():
    model = network()
    assert Updater(model, settings(), steps_per_epoch=1, scale_gradients=False).result is model


def test_the_average_follows_every_step_and_survives_a_resume():
    model = network()
    updater = Updater(model, settings(ema=0.9), steps_per_epoch=9, scale_gradients=False)
    mean = model.head.linear.weight.detach().clone()
    for step in range(3):
        updater.update(model(torch.randn(4, 1, 8, 8, 8)).square().sum(), step)
        decay = (1 + step) / (10 + step)
        mean = decay * mean + (1 - decay) * model.head.linear.weight.detach()
    torch.testing.assert_close(updater.result.head.linear.weight, mean)
    resumed = Updater(network(), settings(ema=0.9), steps_per_epoch=9, scale_gradients=False)
    resumed.load_state_dict(copy.deepcopy(updater.state_dict()), epochs=1)
    for name, tensor in resumed.result.state_dict().items():
        assert torch.equal(tensor, updater.result.state_dict()[name]), name


def test_frozen_parameters_are_not_in_the_optimizer():
    model = network(freeze="stage1")
    held = {id(p) for group in build_optimizer(model, settings()).param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in held}
    assert names
    assert all(name.startswith(("stages.stage2", "head")) for name in names)


def test_layer_decay_slows_the_lower_stages():
    model = network(freeze="layer_decay", layer_decay=0.5)
    updater = Updater(model, settings(optimizer="sgd", schedule="constant"), steps_per_epoch=1, scale_gradients=False)
    updater.update(model(torch.randn(4, 1, 8, 8, 8)).sum(), 0)
    rates = {group["name"]: group["lr"] for group in updater.state_dict()["optimizer"]["param_groups"]}
    assert rates["head/decay"] == pytest.approx(0.1)
    assert rates["stage2/decay"] == pytest.approx(0.05)
    assert rates["stem/decay"] == pytest.approx(0.0125)


def test_gradual_release_survives_a_resume():
    chosen = settings(schedule="constant")
    model = network(freeze="gradual", gradual_epochs=1)
    updater = Updater(model, chosen, steps_per_epoch=1, scale_gradients=False)
    released = [updater.begin_epoch(epoch) for epoch in (1, 2, 3)]
    assert released == [False, True, True]
    updater.update(model(torch.randn(4, 1, 8, 8, 8)).sum(), 2)
    other = network(freeze="gradual", gradual_epochs=1)
    other.load_state_dict(model.state_dict())
    resumed = Updater(other, chosen, steps_per_epoch=1, scale_gradients=False)
    resumed.load_state_dict(copy.deepcopy(updater.state_dict()), epochs=3)
    x = torch.randn(4, 1, 8, 8, 8)
    for one, net in ((updater, model), (resumed, other)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            one.update(net(x).sum(), 3)
    for straight, continued in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(straight, continued)
