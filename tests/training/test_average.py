from __future__ import annotations

import torch
from torch import nn

from studytool.training.average import Average


def network(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for tensor in model.state_dict().values():
        tensor.fill_(value)
    return model


def test_the_average_by_hand():
    model = network(0.0)
    average = Average(model, decay=0.5)
    mean = 0.0
    # 1/10, 2/11, then 100/109 and 101/110 are limited by 0.5.
    for step, decay in ((0, 0.1), (1, 2 / 11), (99, 0.5), (100, 0.5)):
        model.load_state_dict(network(float(step + 1)).state_dict())
        average.update(model, step)
        mean = decay * mean + (1 - decay) * (step + 1)
        for name, tensor in average.model.state_dict().items():
            expected = step + 1 if name.endswith("num_batches_tracked") else mean
            torch.testing.assert_close(tensor, torch.full_like(tensor, expected), msg=name)


def test_what_does_not_change_stays_to_the_last_bit():
    model = nn.Linear(50, 50)
    average = Average(model, decay=0.99)
    for step in range(20):
        average.update(model, step)
    assert torch.equal(average.model.weight, model.weight)


def test_the_copy_is_no_part_of_the_training():
    model = network(1.0)
    average = Average(model, decay=0.9).model
    assert not average.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(average.state_dict()) == list(model.state_dict())
