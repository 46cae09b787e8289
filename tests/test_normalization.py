"""Private BatchNorm state: swapping values and optimizer state."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from networks import assert_same, conv_net, mlp, sgd
from torch import nn

from ast_plugin.normalization import PrivateNormalization


def test_a_matrix_in_a_batch_norm_stays_shared() -> None:
    class Conditional(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(4)
            self.table = nn.Parameter(torch.zeros(3, 4))

    names = PrivateNormalization(nn.Sequential(Conditional()), ("a", "b"), "a").parameter_names
    assert names == ("0.weight", "0.bias")


def test_carrying_swaps_values_in_place_and_back() -> None:
    model = conv_net()
    private = PrivateNormalization(model, ("a", "b"), "a")
    weight = model.norm0.weight
    with torch.no_grad():
        weight.fill_(2.0)
    private.carry("b")
    assert model.norm0.weight is weight
    assert torch.equal(weight, torch.ones(8))  # b still has the value from before
    with torch.no_grad():
        weight.fill_(3.0)
    assert torch.equal(private.state("b")["norm0.weight"], torch.full((8,), 3.0))
    assert torch.equal(private.state("a")["norm0.weight"], torch.full((8,), 2.0))
    private.carry("a")
    assert torch.equal(weight, torch.full((8,), 2.0))
    assert torch.equal(private.state("b")["norm0.weight"], torch.full((8,), 3.0))


def test_optimizer_state_goes_with_the_sub_net() -> None:
    model = conv_net()
    optimizer = sgd(model)
    private = PrivateNormalization(model, ("a", "b"), "a")
    weight = model.norm0.weight
    optimizer.state[weight]["momentum_buffer"] = torch.full((8,), 5.0)
    private.hand_over(optimizer, "b")
    assert weight not in optimizer.state
    private.take_back(optimizer)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.full((8,), 5.0))


def test_parameters_and_statistics_that_two_norms_share_are_kept_once() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    model[1].running_mean = model[0].running_mean
    private = PrivateNormalization(model, ("a", "b"), "a")
    assert "1.weight" not in private.names
    assert "1.running_mean" not in private.names
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    private.carry("b")
    assert model[1].weight.tolist() == [1.0, 1.0]
    private.carry("a")
    assert model[1].weight.tolist() == [2.0, 2.0]


def test_state_that_an_optimizer_makes_when_constructed_is_there_for_every_sub_net() -> None:
    model = conv_net()
    optimizer = sgd(model)
    weight = model.norm0.weight
    optimizer.state[weight]["sum"] = torch.full((8,), 0.1)
    private = PrivateNormalization(model, ("a", "b"), "a")
    private.adopt_optimizer_state(optimizer)
    private.hand_over(optimizer, "b")
    optimizer.state[weight]["sum"].add_(1.0)
    private.take_back(optimizer)
    assert optimizer.state[weight]["sum"].tolist() == [pytest.approx(0.1)] * 8


def test_a_fused_optimizer_gets_zeroed_state_instead_of_none() -> None:
    model = conv_net()
    optimizer = sgd(model, fused=True)
    private = PrivateNormalization(model, ("a", "b"), "a")
    weight = model.norm0.weight
    optimizer.state[weight]["momentum_buffer"] = torch.full((8,), 5.0)
    private.hand_over(optimizer, "b")
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.zeros(8))


@pytest.mark.parametrize("enabled", [True, False])
def test_without_batch_norm_or_when_disabled_nothing_is_private(enabled: bool) -> None:
    private = PrivateNormalization(mlp() if enabled else conv_net(), ("a", "b"), "a", enabled=enabled)
    assert private.names == ()
    private.carry("b")
    assert private.carried == "b"
    assert private.state("a") == {}


def test_a_saved_state_brings_every_bank_back() -> None:
    model = conv_net()
    optimizer = sgd(model)
    private = PrivateNormalization(model, ("a", "b"), "a")
    private.hand_over(optimizer, "b")
    with torch.no_grad():
        model.norm0.weight.fill_(3.0)
    optimizer.state[model.norm0.weight]["momentum_buffer"] = torch.ones(8)
    private.take_back(optimizer)
    twin = PrivateNormalization(conv_net(), ("a", "b"), "a")
    twin.load_state_dict(private.state_dict())
    assert_same(twin.state_dict(), private.state_dict())
    assert torch.equal(twin.state("b")["norm0.weight"], torch.full((8,), 3.0))


@pytest.mark.parametrize("options", [{}, {"capturable": True}])
def test_counters_of_a_saved_state_go_where_the_optimizer_keeps_its_own(options: dict[str, bool]) -> None:
    model = conv_net().to("meta")
    private = PrivateNormalization(model, ("a", "b"), "a")
    state = private.state_dict()
    entry = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(8), "exp_avg_sq": torch.zeros(8)}
    state["optimizer"]["b"] = {"norm0.weight": entry}
    private.load_state_dict(state)
    # Made afterwards: a checkpoint's own options come with the optimizer, when the state of the run is there already.
    optimizer = torch.optim.Adam(model.parameters(), **options)
    private.hand_over(optimizer, "b")
    found = optimizer.state[model.norm0.weight]
    assert found["step"].device.type == ("meta" if options else "cpu")
    assert found["exp_avg"].device.type == "meta"
    assert entry["step"].device.type == "cpu"


@pytest.mark.parametrize("moment", range(8))
def test_an_exchange_that_is_cut_off_leaves_every_sub_net_its_own_state(
    moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ctrl-C arrives when a C function returns: after one of the copies of a step's four exchanges.
    model = conv_net()
    optimizer = sgd(model)
    private = PrivateNormalization(model, ("a", "b"), "a")
    for name in ("a", "b"):
        private.carry(name)
        with torch.no_grad():
            for tensor in private.tensors():
                tensor.fill_({"a": 1, "b": 2}[name])
    private.carry("a")
    before = {name: private.state(name) for name in ("a", "b")}
    calls = iter(range(100))
    original = torch._foreach_copy_

    def copy_and_interrupt(*args: Any) -> None:
        original(*args)
        if next(calls) == moment:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(torch, "_foreach_copy_", copy_and_interrupt)
        private.carry("b")
        private.carry("a")
        private.hand_over(optimizer, "b")
        private.take_back(optimizer)
    private.take_back(optimizer)
    private.carry("a")
    assert_same(before, {name: private.state(name) for name in ("a", "b")})
