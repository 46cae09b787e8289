"""BatchNorm statistics from data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import assert_same, conv_net, mlp, snapshot
from torch import nn

from ast_plugin.errors import ConfigError
from ast_plugin.recalibration import default_forward, recalibrate


def test_statistics_become_the_mean_over_the_batches() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    recalibrate(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]])])
    # Batch means 2 and 7; unbiased batch variances 2 and 8.
    assert model[0].running_mean.tolist() == [4.5]
    assert model[0].running_var.tolist() == [5.0]


class RunningVariance(nn.Module):
    """A norm that derives from no class of torch and averages by its momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.momentum = 0.25
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("running_var", torch.full((1,), 100.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.running_var.lerp_(x.var(dim=0), self.momentum)
        return x * self.weight / self.running_var.sqrt()


def test_statistics_of_norms_of_other_libraries_become_the_mean_too() -> None:
    norm = RunningVariance()
    batches = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]]), torch.tensor([[0.0], [4.0]])]
    recalibrate(nn.Sequential(norm), batches)
    assert norm.running_var.item() == pytest.approx((2 + 8 + 8) / 3)
    assert norm.momentum == 0.25
    with pytest.raises(ConfigError, match="loader gave no batch"):
        recalibrate(nn.Sequential(norm), [])
    assert norm.running_var.item() == pytest.approx((2 + 8 + 8) / 3)


def test_instance_norms_that_keep_statistics_take_part() -> None:
    norm = nn.InstanceNorm1d(1, affine=True, track_running_stats=True)
    recalibrate(nn.Sequential(norm), [torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[5.0, 9.0]]])])
    assert (norm.running_mean.item(), norm.running_var.item(), norm.momentum) == (4.5, 5.0, 0.1)


def test_a_dropout_inside_a_norm_sleeps() -> None:
    class NormAndDropout(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(1)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(super().forward(x))

    first, second = NormAndDropout(), nn.BatchNorm1d(1)
    recalibrate(nn.Sequential(first, second), [torch.randn(256, 1)])
    assert second.running_var.item() == pytest.approx(1.0, abs=0.01)  # dropping half would have doubled it
    assert first.drop.training


def test_modes_momenta_and_weights_stay() -> None:
    model = conv_net()
    model.train()
    model.norm1.eval()
    model.norm2.momentum = 0.3
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    recalibrate(model, [torch.randn(4, 1, 8, 8)], max_batches=1)
    assert model.training
    assert not model.norm1.training
    assert model.norm2.momentum == 0.3
    assert_same(weights, {name: p.detach() for name, p in model.named_parameters()})


def test_a_loader_that_fails_or_is_empty_leaves_the_old_statistics() -> None:
    model = conv_net()
    model(torch.randn(4, 1, 8, 8))
    before = snapshot(model)

    def failing() -> Any:
        yield torch.randn(4, 1, 8, 8)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        recalibrate(model, failing())
    assert_same(before, snapshot(model))
    with pytest.raises(ConfigError, match="loader gave no batch"):
        recalibrate(model, [])
    assert_same(before, snapshot(model))
    assert model.norm0.momentum == 0.1


def test_a_model_without_batch_norm_is_left_alone() -> None:
    model = mlp()
    before = snapshot(model)

    def unread() -> Any:
        raise AssertionError("there is nothing to estimate")
        yield

    recalibrate(model, unread())
    assert_same(before, snapshot(model))
    assert model.training


def test_batches_are_fed_as_most_loaders_give_them() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: torch.Tensor, flag: int = 0) -> torch.Tensor:
            return self.norm(x) + flag

    model = Keyword()
    x = torch.randn(4, 2)
    model.eval()
    for batch in (x, (x, torch.zeros(4)), [x], {"x": x, "flag": 0}):
        assert torch.equal(default_forward(model, batch), model(x))
    recalibrate(model, [{"images": x}], forward=lambda m, b: m(b["images"]))
    torch.testing.assert_close(model.norm.running_mean, x.mean(dim=0))
