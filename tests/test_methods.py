"""The built-in methods as scores and schedules."""

from __future__ import annotations

import pytest
import torch

from ast_plugin.methods import BUILT_IN_METHODS, Method, ScoreInputs, chance, gradient_magnitude, magnitude
from ast_plugin.random_state import seeded_generator


def inputs(gradient: torch.Tensor | None = None) -> ScoreInputs:
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.5]], requires_grad=True)
    return ScoreInputs(
        weight=weight,
        gradient=gradient,
        mask=torch.ones(2, 2, dtype=torch.bool),
        generator=seeded_generator(0, "s90", 3, "w"),
    )


def test_scores_on_hand_worked_numbers() -> None:
    assert magnitude(inputs()).tolist() == [[1.0, 2.0], [0.0, 0.5]]
    assert gradient_magnitude(inputs(torch.tensor([[-3.0, 1.0], [0.0, 2.0]]))).tolist() == [[3.0, 1.0], [0.0, 2.0]]
    assert gradient_magnitude(inputs()).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_chance_depends_on_the_generator_alone() -> None:
    assert torch.equal(chance(inputs()), chance(inputs()))
    other = seeded_generator(0, "s90", 4, "w")
    assert not torch.equal(chance(inputs()), torch.rand(2, 2, generator=other))


@pytest.mark.parametrize("method", BUILT_IN_METHODS, ids=lambda m: m.name)
def test_every_built_in_is_consistent(method: Method) -> None:
    assert method.description
    assert method.needs_gradient == (method.grow_score is gradient_magnitude)
    # Only methods that pick masks anew can follow a ramp: the others keep their number of weights.
    assert method.reselect == (method.initial_sparsity is not None)
    if not method.updates:
        assert method.grow_score is None
    score = method.drop_score(inputs())
    assert score.shape == (2, 2)
    assert not score.requires_grad
