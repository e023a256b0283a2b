from __future__ import annotations

import pytest
import torch
from network_cases import TINY, build, cases, needs, volumes

from studytool.models.embedding import embed

QUICK = {"r2plus1d_tiny", "r3d_18"}


@pytest.mark.parametrize("name", cases(QUICK))
def test_the_features_are_what_the_head_reads(name: str) -> None:
    needs(name)
    model = build(backbone=name, dropout=0.5)
    torch.nn.init.normal_(model.head.linear.bias)
    x = volumes(2, (24, 24, 24))
    features_BF = embed(model, x)
    assert features_BF.shape == (2, model.num_features)
    assert features_BF.dtype == torch.float32
    assert not features_BF.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(model.head.linear(features_BF), model.eval()(x))


def test_the_modes_are_as_before_and_dropout_is_off() -> None:
    model = build(backbone=TINY, freeze="stage1").train()
    modes = [module.training for module in model.modules()]
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = volumes(3, (24, 24, 24))
    torch.testing.assert_close(embed(model, x), embed(model, x), rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert any(modes)
    assert not all(modes)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, statistics[name], rtol=0, atol=0)
