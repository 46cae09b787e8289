"""Orders of sub-nets: what each trains at a step, and where its groups begin."""

from __future__ import annotations

import pytest

from ast_plugin.alternation import AlternatingOrder, FixedOrder, RandomOrder, SinglePathOrder
from ast_plugin.errors import ConfigError

EVERY_ORDER = [AlternatingOrder(3), RandomOrder(3, 7), SinglePathOrder(3, 4), FixedOrder(2)]


def trained(order, steps):
    return [order.sub_net_at(step) for step in range(steps)]


def test_alternating_goes_round():
    order = AlternatingOrder(3)
    assert trained(order, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert [step for step in range(7) if order.is_group_start(step)] == [0, 3, 6]


def test_one_sub_net_alone_is_trained_always_and_every_step_is_a_group():
    order = AlternatingOrder(1)
    assert trained(order, 3) == [0, 0, 0]
    assert all(order.is_group_start(step) for step in range(3))


def test_single_path_trains_one_sub_net_an_epoch():
    order = SinglePathOrder(2, 3)
    assert trained(order, 9) == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert all(order.is_group_start(step) for step in range(9))


def test_fixed_trains_one_sub_net_alone():
    order = FixedOrder(2)
    assert trained(order, 4) == [2, 2, 2, 2]
    assert all(order.is_group_start(step) for step in range(4))


def test_random_order_is_a_function_of_seed_and_step():
    forwards = trained(RandomOrder(3, 7), 200)
    backwards = [RandomOrder(3, 7).sub_net_at(step) for step in reversed(range(200))]
    assert forwards == backwards[::-1]
    assert forwards != trained(RandomOrder(3, 8), 200)
    assert forwards[:6] == [2, 1, 1, 1, 0, 2]  # the same draws on every machine and in every version


def test_random_order_draws_evenly():
    # 3000 draws of 3 sub-nets: 1000 each, give or take five standard deviations (26 each).
    draws = trained(RandomOrder(3, 0), 3000)
    assert all(abs(draws.count(index) - 1000) < 130 for index in range(3))
    assert [step for step in range(7) if RandomOrder(3, 0).is_group_start(step)] == [0, 3, 6]


def test_orders_are_named_as_users_ask_for_them():
    assert [order.name for order in EVERY_ORDER] == ["alternating", "random", "single_path", "fixed"]


@pytest.mark.parametrize("order", EVERY_ORDER, ids=lambda order: order.name)
def test_orders_answer_with_a_sub_net_that_exists(order):
    assert set(trained(order, 50)) <= {0, 1, 2}
    assert isinstance(order.is_group_start(5), bool)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AlternatingOrder(0), "count of sub-nets to alternate must be at least 1, got 0"),
        (lambda: RandomOrder(-1, 0), "must be at least 1, got -1"),
        (lambda: SinglePathOrder(0, 5), "must be at least 1, got 0"),
        (lambda: SinglePathOrder(2, 0), "steps_per_epoch must be at least 1, got 0"),
        (lambda: FixedOrder(-1), "index of the fixed sub-net must be at least 0, got -1"),
    ],
)
def test_impossible_orders_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
