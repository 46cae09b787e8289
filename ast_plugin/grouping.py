"""Which channel groups a run goes by: found in the model, or given and checked."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ast_plugin.channel_search import example_inputs_of, find_groups
from ast_plugin.channels import ChannelGroup, ChannelGroups
from ast_plugin.errors import ConfigError, SelectionError
from ast_plugin.parameters import ParameterChoice
from ast_plugin.patterns import Pattern

_SHOWN = 3  # reasons in an error


def resolve_groups(
    model: nn.Module,
    choices: Sequence[ParameterChoice],
    patterns: Iterable[Pattern],
    *,
    example_inputs: Any = None,
    groups: ChannelGroups | None = None,
) -> tuple[ChannelGroups | None, tuple[ParameterChoice, ...]]:
    """Return the groups that the patterns need, and what is pruned then.

    Args:
        model: The bare model; not changed.
        choices: The verdict on every parameter.
        patterns: The patterns of all sub-nets.
        example_inputs: What the model can be called with: a tensor, a tuple of arguments or a dict of keyword
            arguments; or a function that returns them. None: what the model says of itself.
        groups: The groups, instead of a search.

    Returns:
        None where no pattern goes by groups. Where all do, parameters in no group are not prunable any more.

    Raises:
        ConfigError: If example inputs are needed and missing, or groups were given that do not fit the model.
        SelectionError: If the model has no group of channels that can be dropped.
        MissingExtraError: If the search needs a package that is not installed.
    """
    by_groups = [pattern.by_groups for pattern in patterns]
    if not any(by_groups):
        if groups is not None:
            raise ConfigError('groups has no meaning without a channel sub-net; leave it out, or set pattern="channel"')
        return None, tuple(choices)
    prunable = {choice.name for choice in choices if choice.prunable}
    if groups is None:
        given = example_inputs() if callable(example_inputs) else example_inputs
        inputs = given if given is not None else example_inputs_of(model)
        if inputs is None:
            raise ConfigError(
                "pattern 'channel' needs example_inputs to find out which channels of the model belong together: pass "
                "wrap(..., example_inputs=batch) with a tensor, a tuple of arguments or a dict of keyword arguments "
                "that the model can be called with"
            )
        groups = find_groups(model, inputs, prunable=prunable)
    else:
        _check_given(groups, model, prunable)
    if not len(groups):
        reasons = [f"{left.name}: {left.reason}" for left in groups.left_whole]
        shown = "; ".join(reasons[:_SHOWN]) + (f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else "")
        raise SelectionError(
            f"pattern 'channel' finds no group of channels that can be dropped in this {type(model).__name__}"
            + (f" ({shown})" if shown else "")
            + "; use another pattern, or give groups"
        )
    if all(by_groups):
        choices = _only_in_groups(choices, groups)
    return groups, tuple(choices)


def _only_in_groups(choices: Sequence[ParameterChoice], groups: ChannelGroups) -> tuple[ParameterChoice, ...]:
    inside, reasons = set(groups.tensors), {left.name: left.reason for left in groups.left_whole}

    def verdict(choice: ParameterChoice) -> ParameterChoice:
        if not choice.prunable or choice.name in inside:
            return choice
        reason = reasons.get(choice.name.rpartition(".")[0], "in no group of channels")
        return dataclasses.replace(choice, prunable=False, reason=reason)

    return tuple(verdict(choice) for choice in choices)


def _check_given(groups: object, model: nn.Module, prunable: Collection[str]) -> None:
    if not isinstance(groups, ChannelGroups):
        raise ConfigError(f"groups must be a ChannelGroups, such as find_groups returns, got {type(groups).__name__}")
    strange = [type(group).__name__ for group in groups.groups if not isinstance(group, ChannelGroup)]
    if strange:
        raise ConfigError(f"groups must hold ChannelGroup objects, got {strange[0]}")
    twice = [name for name, count in Counter(group.name for group in groups.groups).items() if count > 1]
    if twice:
        raise ConfigError(f"groups names two groups {twice[0]!r}; give every group a name of its own")
    modules = dict(model.named_modules())
    shapes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    seen: set[tuple[str, int]] = set()
    for group in groups.groups:
        for axis in group.axes:
            if (axis.tensor, axis.dim) in seen:
                raise ConfigError(f"groups: dimension {axis.dim} of {axis.tensor!r} is in two groups, or twice in one")
            seen.add((axis.tensor, axis.dim))
        wrong = group.misfit(shapes, modules)
        if wrong is not None:
            raise ConfigError(f"groups: {group.name!r} {wrong}")
        _check_group(group, model, modules, prunable)


def _check_group(
    group: ChannelGroup, model: nn.Module, modules: Mapping[str, nn.Module], prunable: Collection[str]
) -> None:
    if not group.axes_of("out") or not group.axes_of("in"):
        raise ConfigError(f"groups: {group.name!r} needs weights that make its units and weights that read them")
    for axis in group.axes_of("in"):
        if axis.tensor not in prunable:
            raise ConfigError(
                f"groups: {group.name!r} is read by {axis.tensor!r}, which is not pruned, so its units cannot be "
                "dropped; include that weight, or leave the group out"
            )
    named = {axis.tensor for axis in group.axes}
    for axis in group.axes_of("out"):
        path, _, _ = axis.tensor.rpartition(".")
        bias = modules[path]._parameters.get("bias")
        beside = f"{path}.bias" if path else "bias"
        if (
            bias is not None
            and bias.numel() == model.get_parameter(axis.tensor).shape[axis.dim]
            and beside not in named
        ):
            raise ConfigError(
                f"groups: {group.name!r} is made by {axis.tensor!r} and leaves {beside!r} whole, which is added to "
                f"what is left; add GroupAxis(tensor={beside!r}, dim=0, role='state', parts={axis.parts})"
            )
