"""Nested channel sub-nets by learned probabilities: the most probable units, ties by magnitude."""

from __future__ import annotations

import pytest
import torch
import vr_pge_runs as runs
from torch import Tensor

from ast_plugin.errors import ConfigError
from ast_plugin.vr_pge_scores import learned_channels


def test_the_most_probable_units_are_kept_and_of_equal_ones_those_with_the_larger_weights() -> None:
    torch.manual_seed(0)
    model = runs.DroppingNet()
    with torch.no_grad():
        model.stem.weight.copy_(torch.arange(1.0, 9.0).view(8, 1, 1, 1).expand(8, 1, 3, 3))
        model.conv1.weight[:, :, :] = 0.5
    probabilities = {
        "stem": torch.tensor([1.0, 0.2, 1.0, 0.0, 0.0, 0.3, 1.0, 0.0]),
        "conv1": torch.linspace(0, 1, 16),
        "conv2": torch.linspace(1, 0, 16),
    }
    _, _, ast = runs.wrapped(model, method=learned_channels(probabilities), sparsities=(0.25, 0.5, 0.75))
    kept = {name: flags.nonzero().reshape(-1).tolist() for name, flags in ast.kept_channels("s75").items()}
    # Three units of "stem" have probability 1: the last two of them have the largest weights.
    assert kept == {"stem": [2, 6], "conv1": [12, 13, 14, 15], "conv2": [0, 1, 2, 3]}
    half = ast.kept_channels("s50")["stem"].nonzero().reshape(-1).tolist()
    assert half == [0, 2, 5, 6]
    # Six of eight: of three with probability 0 the last, of index 7.
    assert ast.kept_channels("s25")["stem"].nonzero().reshape(-1).tolist() == [0, 1, 2, 5, 6, 7]


def test_sub_nets_of_a_second_run_are_nested_and_hold_what_the_first_has_learned() -> None:
    model, optimizer, first = runs.wrapped()
    for step in range(30):
        runs.closure_step(model, optimizer, step)
    learned = first.sampler.probabilities  # type: ignore[union-attr]
    first.detach()
    _, _, ast = runs.wrapped(model, optimizer, method=learned_channels(learned), sparsities=(0.5, 0.75, 0.9))
    for step in range(6):
        loss = runs.loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    units: dict[str, dict[str, Tensor]] = {name: ast.kept_channels(name) for name in ast.sub_nets}
    for group, values in learned.items():
        for denser, sparser in (("s50", "s75"), ("s75", "s90")):
            assert not (units[sparser][group] & ~units[denser][group]).any()
        for flags in units.values():
            assert values[flags[group]].min() >= values[~flags[group]].max()
    assert [sum(int(f.sum()) for f in units[name].values()) for name in ast.sub_nets] == [20, 10, 4]


def test_probabilities_of_other_groups_are_refused_before_anything_is_touched() -> None:
    probabilities = {"stem": torch.rand(8), "conv1": torch.rand(16)}
    model = runs.DroppingNet()
    with pytest.raises(ConfigError, match="'conv2', and there are none"):
        runs.wrapped(model, method=learned_channels(probabilities))
    with pytest.raises(ConfigError, match=r"there are \(4,\)"):
        runs.wrapped(model, method=learned_channels({**probabilities, "conv2": torch.rand(4)}))
    assert not model._forward_pre_hooks
