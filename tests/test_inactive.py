"""Freezing inactive weights and their optimizer state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ast_plugin.inactive import FrozenInactive, clear_state_at


def test_inactive_weights_and_state_return_and_active_ones_move() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    optimizer.state[weight]["momentum_buffer"] = torch.tensor([1.0, 1.0, 1.0, 1.0])
    mask = torch.tensor([True, False, True, False])
    weight.grad = torch.tensor([1.0, 0.0, 1.0, 0.0])
    frozen = FrozenInactive()
    frozen.remember({"w": weight}, optimizer)
    assert not frozen.empty
    optimizer.step()
    frozen.restore({"w": weight}, {"w": mask}, optimizer)
    # Active: buffer .9 * 1 + 1 = 1.9, weight - .1 * 1.9.
    torch.testing.assert_close(weight.detach(), torch.tensor([0.81, 2.0, 2.81, 4.0]))
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], torch.tensor([1.9, 1.0, 1.9, 1.0]))
    assert frozen.empty


def test_state_created_by_the_step_is_clean_outside_the_mask() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    frozen = FrozenInactive()
    frozen.remember({"w": weight}, optimizer)
    weight.grad = torch.tensor([1.0, 0.0, 1.0, 0.0])
    optimizer.step()  # weight decay puts .2 and .4 into the new buffer at the inactive positions
    frozen.restore({"w": weight}, {"w": torch.tensor([True, False, True, False])}, optimizer)
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], torch.tensor([1.1, 0.0, 1.3, 0.0]))
    assert weight.detach()[1::2].tolist() == [2.0, 4.0]


def test_an_optimizers_own_initial_value_is_left_in_new_state() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    optimizer = torch.optim.Rprop([weight], lr=0.01)
    frozen = FrozenInactive()
    frozen.remember({"w": weight}, optimizer)
    weight.grad = torch.tensor([1.0, 0.0, 1.0, 0.0])
    optimizer.step()
    frozen.restore({"w": weight}, {"w": torch.tensor([True, False, True, False])}, optimizer)
    torch.testing.assert_close(optimizer.state[weight]["step_size"][1::2], torch.tensor([0.01, 0.01]))


class Anchored(torch.optim.Optimizer):
    """Keeps a second sequence of weights, which it decays and steps before the weights follow halfway."""

    def step(self):
        with torch.no_grad():
            for weight in self.param_groups[0]["params"]:
                state = self.state[weight]
                if "anchor" not in state:
                    state["anchor"] = weight.detach().clone()
                state["anchor"].mul_(0.95).sub_(weight.grad)
                weight.lerp_(state["anchor"], 0.5)


def test_a_second_sequence_of_weights_begins_at_the_weights_outside_the_mask() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    optimizer = Anchored([weight], {})
    frozen = FrozenInactive()
    frozen.remember({"w": weight}, optimizer)
    weight.grad = torch.tensor([1.0, 0.0, 1.0, 0.0])
    optimizer.step()
    frozen.restore({"w": weight}, {"w": torch.tensor([True, False, True, False])}, optimizer)
    # Active: .95 * 1 - 1 and .95 * 3 - 1; inactive as the weights, without the decay of a step that was not theirs.
    torch.testing.assert_close(optimizer.state[weight]["anchor"], torch.tensor([-0.05, 2.0, 1.85, 4.0]))
    assert weight.detach()[1::2].tolist() == [2.0, 4.0]


def test_an_initial_value_that_weight_decay_has_leaked_into_is_left_and_one_that_is_all_leak_is_zeroed() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0, -3.0, -4.0]))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    frozen = FrozenInactive()
    frozen.remember({"w": weight}, optimizer)
    optimizer.state[weight]["square_avg"] = torch.tensor([2.0, 0.9004, 2.0, 0.9016])  # began at one
    optimizer.state[weight]["sign_avg"] = torch.tensor([2.0, 0.1, 2.0, -0.1])  # began at zero
    frozen.restore({"w": weight}, {"w": torch.tensor([True, False, True, False])}, optimizer)
    assert optimizer.state[weight]["square_avg"].tolist() == pytest.approx([2.0, 0.9004, 2.0, 0.9016])
    assert optimizer.state[weight]["sign_avg"].tolist() == [2.0, 0.0, 2.0, 0.0]


def test_parameters_that_were_not_remembered_are_left_alone() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    frozen = FrozenInactive()
    frozen.restore({"w": weight}, {"w": torch.zeros(2, dtype=torch.bool)}, optimizer)
    assert weight.tolist() == [1.0, 1.0]
    frozen.remember({"w": weight}, optimizer)
    frozen.forget()
    assert frozen.empty


def test_clearing_touches_only_state_with_one_number_a_weight() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(3)
    optimizer.step()
    clear_state_at(weight, torch.tensor([True, False, False]), optimizer)
    state = optimizer.state[weight]
    assert state["exp_avg"][0] == 0
    assert state["exp_avg"][1] > 0
    assert state["exp_avg_sq"][0] == 0
    assert float(state["step"]) == 1


def test_eight_bit_codes_are_left_to_the_optimizer() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight]["codes"] = torch.tensor([9, 8, 7], dtype=torch.uint8)
    where = torch.tensor([True, False, False])
    clear_state_at(weight, where, optimizer)
    frozen = FrozenInactive()
    frozen.remember({"w": weight}, optimizer)
    optimizer.state[weight]["codes"].add_(1)
    frozen.restore({"w": weight}, {"w": where}, optimizer)
    assert optimizer.state[weight]["codes"].tolist() == [10, 9, 8]
