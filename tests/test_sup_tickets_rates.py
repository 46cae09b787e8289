"""The cyclic rate: there while the optimizer steps, and gone for whoever looks at other times."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ast_plugin.errors import ConfigError, StateError
from ast_plugin.integrations.family.sup_tickets_rates import CyclicRates


def _parameter() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return parameter


def _seen(optimizer: torch.optim.Optimizer) -> list[list[float]]:
    """Return what will hold the rates of every step from now on, as the optimizer's arithmetic sees them."""
    seen: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([float(group["lr"]) for group in optimizer.param_groups]))
    return seen


def _heights(*values: float | None) -> Callable[[], float | None]:
    heights = iter(values)
    return lambda: next(heights)


def test_the_rate_is_cyclic_while_the_optimizer_steps_and_the_users_at_other_times() -> None:
    parameter = _parameter()
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    CyclicRates(optimizer, _heights(None, 0, 0.5, 1), (0.05, 0.1)).attach()
    seen = _seen(optimizer)
    for _ in range(4):
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.5
    assert [rates[0] for rates in seen] == pytest.approx([0.5, 0.05, 0.075, 0.1])
    assert parameter.tolist() == pytest.approx([1 - 0.5 - 0.05 - 0.075 - 0.1] * 2)


@pytest.mark.parametrize("chainable", [True, False])
def test_schedulers_go_on_undisturbed(chainable: bool) -> None:
    def run(cyclic: bool) -> list[float]:
        optimizer = torch.optim.SGD([_parameter()], lr=1.0)
        scheduler: torch.optim.lr_scheduler.LRScheduler = (
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            if chainable
            else torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        )
        if cyclic:
            CyclicRates(optimizer, lambda: 0.5, None).attach()
        rates = []
        for _ in range(4):
            optimizer.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    assert run(True) == run(False)


def test_a_scheduler_that_steps_in_an_earlier_hook_of_the_optimizer_goes_on_from_the_users_rate() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=1.0)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    CyclicRates(optimizer, lambda: 0.5, None).attach()
    for step in range(3):
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.5 ** (step + 1)


def test_low_and_high_are_shares_of_the_highest_rate_that_each_group_has_had() -> None:
    optimizer = torch.optim.SGD([{"params": [_parameter()], "lr": 0.01}, {"params": [_parameter()], "lr": 4.0}], lr=1.0)
    CyclicRates(optimizer, _heights(None, None, 0, 1), None).attach()
    seen = _seen(optimizer)
    for rate in (0.01, 2.0, 0.02, 0.02):  # a warm-up to 2
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert seen[2:] == [pytest.approx([0.02, 0.04]), pytest.approx([0.1, 0.2])]


def test_the_rate_before_a_warm_up_that_began_already_counts() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=2.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.001)
    assert optimizer.param_groups[0]["lr"] == 0.002
    assert CyclicRates(optimizer, lambda: None, None).highest == [2.0]


def test_given_rates_are_those_of_the_highest_group_and_others_keep_their_proportion() -> None:
    optimizer = torch.optim.SGD([{"params": [_parameter()], "lr": 0.1}, {"params": [_parameter()], "lr": 1.0}], lr=1.0)
    rates = CyclicRates(optimizer, lambda: None, (0.02, 0.06))
    assert rates.rates(0) == pytest.approx([0.002, 0.02])
    assert rates.rates(0.5) == pytest.approx([0.004, 0.04])
    frozen = torch.optim.SGD([_parameter()], lr=0.0)
    assert CyclicRates(frozen, lambda: None, (0.02, 0.06)).rates(1) == pytest.approx([0.06])


def test_rates_in_tensors_are_filled_in_place() -> None:
    rate = torch.tensor(1.0, dtype=torch.float64)
    optimizer = torch.optim.Adam([_parameter()], lr=rate, capturable=False, foreach=False)
    held = optimizer.param_groups[0]["lr"]
    rates = CyclicRates(optimizer, _heights(None, 0, 1), (0.1, 0.2))
    rates.attach()
    seen = _seen(optimizer)
    for _ in range(3):
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] is held
        assert float(held) == 1.0
    assert [found[0] for found in seen] == pytest.approx([1.0, 0.1, 0.2])
    assert rates.highest == [1.0]


def test_one_tensor_that_is_the_rate_of_several_groups_is_given_back() -> None:
    one, other = _parameter(), _parameter()
    optimizer = torch.optim.AdamW([{"params": [one]}, {"params": [other]}], lr=torch.tensor(1.0), foreach=False)
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]  # torch gives both the default itself
    CyclicRates(optimizer, lambda: 1, (0.1, 0.2)).attach()
    seen = _seen(optimizer)
    for _ in range(2):
        optimizer.step()
        assert float(optimizer.param_groups[0]["lr"]) == 1.0
    assert seen == [pytest.approx([0.2, 0.2])] * 2


def test_a_step_that_raised_leaves_no_cyclic_rate_behind() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=0.5)
    detach = CyclicRates(optimizer, lambda: 0, (0.04, 0.08)).attach()

    def fail() -> float:
        raise ArithmeticError

    def broken_off() -> None:
        with pytest.raises(ArithmeticError):
            optimizer.step(fail)

    broken_off()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    broken_off()
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.5
    broken_off()
    optimizer.param_groups[0]["lr"] = 0.4  # somebody knows better
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.4
    broken_off()
    detach()
    assert optimizer.param_groups[0]["lr"] == 0.4


def test_nothing_is_left_on_the_optimizer() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=0.5)
    CyclicRates(optimizer, lambda: 0, (0.05, 0.1)).attach()()
    for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
        assert not hooks
    assert not optimizer._optimizer_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_a_step_that_only_creates_the_optimizers_state_keeps_its_rate_of_zero() -> None:
    parameter = _parameter()
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5)
    CyclicRates(optimizer, lambda: 1, None).attach()
    optimizer.param_groups[0]["lr"] = 0.0
    parameter.grad = torch.zeros(2)
    optimizer.step()
    assert parameter.tolist() == [1.0, 1.0]
    assert optimizer.state


def test_a_group_that_was_added_in_the_middle_has_a_rate_too() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=1.0)
    CyclicRates(optimizer, lambda: 0, None).attach()
    seen = _seen(optimizer)
    optimizer.add_param_group({"params": [_parameter()], "lr": 3.0})
    optimizer.step()
    assert seen == [pytest.approx([0.01, 0.03])]


def test_a_restart_far_above_the_usual_is_warned_about_with_the_evidence() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=0.1)
    with pytest.warns(UserWarning, match=r"lr=0.1, .* highest rate \(0.1\).*77.87 to 10.37 %.*lr=\(0.001, 0.005\)"):
        CyclicRates(optimizer, lambda: 0, (0.1, 0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CyclicRates(optimizer, lambda: 0, (0.001, 0.005)).attach()
        optimizer.step()


def test_a_restart_that_is_high_for_the_run_so_far_is_warned_about_once_when_it_comes() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=0.0)
    CyclicRates(optimizer, _heights(None, 0, 1), (0.05, 0.1)).attach()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    with pytest.warns(UserWarning, match="highest rate"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_an_optimizer_without_a_rate_is_refused() -> None:
    optimizer = torch.optim.SGD([_parameter()], lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ConfigError, match="parameter group 0 of SGD has lr=None; give the optimizer a learning rate"):
        CyclicRates(optimizer, lambda: 0, None)


def test_highest_rates_travel_and_those_of_another_optimizer_are_refused() -> None:
    rates = CyclicRates(torch.optim.SGD([_parameter()], lr=0.1), lambda: 0, None)
    for damaged in (None, [], [0.1, 0.2], ["much"]):
        with pytest.raises(StateError, match="1 parameter groups; load a checkpoint of the same optimizer"):
            rates.check_state(damaged)
    rates.check_state([0.7])
    rates.load_state([0.7])
    assert rates.highest == [0.7]
