"""Learned probabilities: an estimate without bias and of bounded variance, a budget met exactly, by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ast_plugin.errors import ConfigError, StateError
from ast_plugin.vr_pge import Probabilities, cosine_rate, draw, gradient, largest, project

SIZES = (2, 3)
UNITS = sum(SIZES)
MASKS = torch.tensor(list(itertools.product([False, True], repeat=UNITS)))
LEGAL = torch.stack([part.any(1) for part in MASKS.split(SIZES, dim=1)]).all(0)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def chances(s: Tensor) -> Tensor:
    """Return the probability of each mask, none of them with an empty group; differentiable."""
    single = torch.where(MASKS, s, 1 - s).prod(1) * LEGAL
    return single / single.sum()


def losses(seed: int = 0) -> Tensor:
    """Return a loss of each mask: any table will do, and most have interactions of all orders."""
    return torch.randn(len(MASKS), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(s: Tensor, table: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the estimate over all tuples of masks."""
    chance = chances(s)
    legal = LEGAL.nonzero().reshape(-1).tolist()
    mean, square = torch.zeros(UNITS, dtype=torch.float64), torch.zeros(UNITS, dtype=torch.float64)
    for rows in itertools.product(legal, repeat=samples):
        estimate = gradient(MASKS[list(rows)], table[list(rows)], s)
        weight = chance[list(rows)].prod()
        mean += weight * estimate
        square += weight * estimate.square()
    return mean, square - mean.square()


@pytest.mark.parametrize("samples", [2, 3])
def test_the_estimate_is_the_preconditioned_gradient_on_average_over_all_masks(samples: int) -> None:
    s = vector(0.3, 0.8, 0.05, 0.5, 0.95)
    table = losses() if samples == 2 else losses().round(decimals=1)
    variable = s.clone().requires_grad_()
    (chances(variable) * table).sum().backward()
    assert variable.grad is not None
    mean, _ = moments(s, table, samples)
    assert torch.allclose(mean, (s * (1 - s)).sqrt() * variable.grad, atol=1e-12)
    assert mean.abs().min() > 1e-3  # not all zero


def test_the_variance_stays_bounded_where_that_of_the_plain_score_explodes() -> None:
    table = losses(1)
    greatest = (table.max() - table.min()).square()
    plain = []
    for distance in (1e-2, 1e-4, 1e-6, 1e-8):
        s = vector(1 - distance, distance, 1 - distance, distance, 0.5)
        _, variance = moments(s, table, 2)
        # |L1 - L2| / 2 times the difference of two scores, of which each has at most the variance 1 / (1 - 1/e).
        assert variance.max() <= greatest / (1 - math.exp(-1))
        plain.append(float((variance / (s * (1 - s))).max()))
    assert plain == sorted(plain)
    assert plain[-1] > 1e5 * plain[0]


def test_where_a_probability_has_arrived_the_estimate_is_zero() -> None:
    s = vector(1, 0, 1, 0, 0.5)
    mean, variance = moments(s, losses(), 2)
    assert mean[:4].tolist() == variance[:4].tolist() == [0, 0, 0, 0]
    assert mean[4] != 0


def test_masks_are_drawn_with_the_probabilities_that_have_no_empty_group() -> None:
    s = vector(0.3, 0.7, 0.2, 0.3, 0.5)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw(s, SIZES, generator) for _ in range(6000)])
    counts = torch.stack([(drawn == mask).all(1).sum() for mask in MASKS])
    expected = chances(s)
    assert counts[~LEGAL].sum() == 0
    error = (counts / len(drawn) - expected).abs()
    assert (error <= 5 * (expected * (1 - expected) / len(drawn)).sqrt()).all()


def test_draws_depend_on_the_generator_alone() -> None:
    s = torch.full((40,), 0.1, dtype=torch.float64)
    first, second = (draw(s, [10] * 4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, draw(s, [10] * 4, torch.Generator().manual_seed(4)))


def test_a_group_without_any_probability_is_refused_instead_of_drawn_for_ever() -> None:
    with pytest.raises(StateError, match="probability 0"):
        draw(vector(0.5, 0.5, 0, 0, 0), SIZES, torch.Generator())


@pytest.mark.parametrize("units", [1, 7, 5000])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_the_projection_meets_the_budget_up_to_rounding_and_is_one_shift(units: int, share: float) -> None:
    values = torch.randn(units, dtype=torch.float64, generator=torch.Generator().manual_seed(units)) + 1
    budget = share * float(values.clamp(0, 1).sum())
    found = project(values, budget)
    assert abs(math.fsum(found.tolist()) - budget) <= 1e-15 * max(units, budget)
    free = (found > 0) & (found < 1)
    shifts = (values - found)[free]
    assert shifts.max() - shifts.min() < 1e-12
    assert (values[found == 0] <= shifts.max() + 1e-12).all()
    assert (values[found == 1] >= 1 + shifts.min() - 1e-12).all()


def test_the_projection_by_hand() -> None:
    # v = .3: .9 - .3 + .5 - .3 + .2 - .3 (cut off at 0) + 1.2 - .3 = .6 + .2 + 0 + .9 = 1.7
    assert project(vector(0.9, 0.5, 0.2, 1.2), 1.7).tolist() == pytest.approx([0.6, 0.2, 0, 0.9])
    assert project(vector(0.2, -1, 1.5), 1.2).tolist() == [0.2, 0, 1]  # exactly within: only cut off
    assert project(vector(0.2, -1, 1.5), 5).tolist() == [0.2, 0, 1]  # within
    assert project(vector(0.2, 1.5), 0).tolist() == [0, 0]
    assert project(torch.ones(4, dtype=torch.float64), 4).tolist() == [1] * 4
    assert project(torch.ones(4, dtype=torch.float64), 1).tolist() == [0.25] * 4  # ties share
    assert project(vector(7, 7, 7, -7), 3).tolist() == [1, 1, 1, 0]


def test_the_projection_leaves_each_group_one_unit_on_average_and_is_the_nearest_such_point() -> None:
    values = vector(0.1, 0.3, -0.5, 0.9, 0.8, 0.7)
    found = project(values, 2.5, (3, 3))
    assert float(found[:3].sum()) == pytest.approx(1)
    assert float(found.sum()) == pytest.approx(2.5)
    distance = (found - values).square().sum()
    generator = torch.Generator().manual_seed(0)
    others = torch.rand(200_000, 6, dtype=torch.float64, generator=generator)
    legal = others[(others.sum(1) <= 2.5) & (others[:, :3].sum(1) >= 1) & (others[:, 3:].sum(1) >= 1)]
    assert len(legal) > 1000
    assert (legal - values).square().sum(1).min() >= distance
    assert project(torch.full((6,), -3.0, dtype=torch.float64), 2, (3, 3)).tolist() == pytest.approx([1 / 3] * 6)
    assert project(vector(5, 5, -5, -6), 2, (2, 2)).tolist() == pytest.approx([0.5, 0.5, 1, 0])


def test_a_budget_that_leaves_a_group_empty_is_refused() -> None:
    with pytest.raises(ConfigError, match="budget of 1 units"):
        project(vector(0.5, 0.5), 1, (1, 1))
    with pytest.raises(ConfigError, match="budget"):
        project(vector(0.5, 0.5), -1)


def test_the_largest_units_are_kept_and_one_of_each_group() -> None:
    values = vector(0.1, 0.2, 0.9, 0.9, 0.9)
    assert largest(values, 2, SIZES).tolist() == [False, True, True, False, False]
    assert largest(values, 3, SIZES).tolist() == [False, True, True, True, False]
    assert largest(values, 5, SIZES).tolist() == [True] * 5
    assert largest(vector(0, 0, 0, 0, 0), 2, SIZES).tolist() == [True, False, True, False, False]


def test_steps_find_the_units_that_matter_within_the_budget() -> None:
    worth = vector(0.5, 3, 0.1, 0.2, 4)
    chosen = Probabilities.start(2, SIZES)
    steps = 800
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        kept = torch.stack([draw(chosen.values, SIZES, generator) for _ in range(2)])
        slope = gradient(kept, -(kept.to(torch.float64) @ worth), chosen.values)
        chosen = chosen.moved(slope, cosine_rate(step, begin=0, end=steps, rate=0.05), 2, SIZES)
        assert float(chosen.values.sum()) <= 2 + 1e-12
    assert chosen.values.tolist() == pytest.approx([0, 1, 0, 0, 1], abs=0.02)


def test_all_units_start_alike_but_those_of_a_group_that_would_be_left_without() -> None:
    assert Probabilities.start(3, (4, 2)).values.tolist() == pytest.approx([0.5] * 6)
    assert Probabilities.start(3, (8, 2)).values.tolist() == pytest.approx([0.25] * 8 + [0.5] * 2)


def test_the_first_step_of_adam_has_the_length_of_its_rate() -> None:
    moved = Probabilities.start(1, (2,)).moved(vector(3, -0.01), 0.1, 1, (2,))
    assert moved.values.tolist() == pytest.approx([0.4, 0.6], abs=1e-6)
    second = moved.moved(vector(0, 0), 0.1, 1, (2,))
    # First moments .9 * .1 g / .19, second .999 * .001 g^2 / .001999
    assert float(moved.values[0] - second.values[0]) == pytest.approx(0.1 * (0.09 / 0.19) / math.sqrt(0.999 / 1.999))


def test_the_state_goes_through_plain_containers_bit_by_bit() -> None:
    before = Probabilities.start(2.5, SIZES).moved(vector(1, 2, 3, 4, 5), 0.1, 2.5, SIZES)
    after = Probabilities.from_state(before.state_dict(), UNITS)
    slope = vector(-1, 0.5, 0, 2, 1)
    assert torch.equal(before.moved(slope, 0.1, 2.5, SIZES).values, after.moved(slope, 0.1, 2.5, SIZES).values)
    with pytest.raises(StateError, match="this run needs"):
        Probabilities.from_state(before.state_dict(), 4)
    with pytest.raises(StateError, match="damaged"):
        Probabilities.from_state({"values": before.values}, UNITS)
    with pytest.raises(StateError, match="leave"):
        Probabilities.from_state({**before.state_dict(), "values": before.values + 1}, UNITS)


def test_the_rate_falls_by_a_half_cosine() -> None:
    rates = [cosine_rate(step, begin=2, end=10, rate=0.4) for step in (0, 2, 4, 6, 10, 12)]
    assert rates == pytest.approx([0.4, 0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0, 0])
