"""The demo's network: shapes, size, six blocks, and that it depends on torch's seed alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ast_plugin.demo_model import DigitsResNet, ResidualBlock


@pytest.mark.parametrize("width", [4, 24])
def test_scores_have_one_row_an_image(width: int) -> None:
    assert DigitsResNet(width)(torch.randn(5, 1, 8, 8)).shape == (5, 10)


def test_the_default_network_has_six_blocks_and_about_392_thousand_parameters() -> None:
    model = DigitsResNet()
    assert sum(isinstance(module, ResidualBlock) for module in model.modules()) == 6
    assert sum(parameter.numel() for parameter in model.parameters()) == 392_242


def test_every_convolution_is_followed_by_a_batch_norm() -> None:
    model = DigitsResNet(4)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [c.out_channels for c in convolutions] == [n.num_features for n in norms]
    assert all(c.bias is None for c in convolutions)


def test_the_same_seed_builds_the_same_network() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(DigitsResNet(4).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_gradients_reach_every_parameter() -> None:
    model = DigitsResNet(4)
    nn.functional.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8)).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
