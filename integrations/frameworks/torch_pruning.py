"""Importances of Torch-Pruning as scores of channel sub-nets.

An importance (``torch_pruning.importance``) says of every channel of a group of layers how much it matters. Here it
takes the place of the mean weight magnitude by which a method chooses the channels, hidden units and attention heads
that a sub-net keeps; when, how many, and what grows back stays the method's.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from ast_plugin.errors import ConfigError
from ast_plugin.integrations.frameworks.torch_pruning_groups import stand_in_group, torch_pruning
from ast_plugin.methods import ChannelScoreInputs, Method
from ast_plugin.plugins import PluginRegistry
from ast_plugin.random_state import RandomState

Importance = Callable[[Any], Any]

_REFUSED = {
    "GroupHessianImportance": "the squared gradient of every sample, and training has the gradient of a whole batch",
    "OBDCImportance": "inputs and output gradients of every layer, which its own pruner records",
    "ActivationImportance": "activations that a pass of its own over data records",
}


def from_importance(
    importance: Importance,
    *,
    base: str | Method = "granet",
    needs_gradient: bool | None = None,
    without_gradient: Importance | None = None,
) -> Method:
    """Return a method whose channel sub-nets keep the units that an importance of torch-pruning ranks highest.

    The importance is given the group as torch-pruning builds it, with the dense weights, the sub-net's own BatchNorm
    values and, where it needs one, the dense gradient of the step, summed over its micro-batches. What it returns for
    the channels of one unit, such as an attention head, is averaged, as torch-pruning's own pruners do. Nothing is
    copied: the layers that it sees share the memory of the model, and must not be changed. Random numbers that it
    draws on the CPU depend on seed, sub-net, step and group alone.

    Args:
        importance: An object of ``torch_pruning.importance``, or anything that can be called with a group of
            torch-pruning and returns one number a channel of its first layer.
        base: The method that says when masks change, how many units go and what grows back: a name, or a `Method`.
        needs_gradient: Whether the importance reads gradients. None: those of the Taylor kind do, no other.
        without_gradient: What takes its place at the two moments that have no gradient: before the first step, where
            the base starts sparse, and at the end of a run, for sub-nets that were not trained after the end of the
            schedule. None: the magnitude importance with the same reduction and normalization. Only for importances
            that need a gradient.

    Returns:
        The base with this score; by the name of both, for example ``granet+LAMPImportance``.

    Raises:
        MissingExtraError: If torch-pruning is not installed.
        ConfigError: If the importance is none, or needs what training does not have; if the base has no use of a score;
            when the run is wrapped, if a group has nothing that the importance goes by, or no sub-net drops channels.

    Example:
        >>> method = from_importance(tp.importance.LAMPImportance(p=2))
        >>> ast = wrap(optimizer, model, sparsities=(0.25, 0.5), pattern="channel", method=method, total_steps=1000)
    """
    kinds = torch_pruning().importance
    _check(importance, kinds, "importance")
    if not isinstance(base, (str, Method)):
        raise ConfigError(f"base must be the name of a method or a Method, got {base!r}")
    rule = base if isinstance(base, Method) else PluginRegistry().method(base)
    if rule.sampler is not None or not (rule.updates or rule.reselect):
        raise ConfigError(
            f"base={rule.name!r} chooses channels without scores; give one that does, such as 'granet', 'gmp' or 'rigl'"
        )
    taylor = isinstance(importance, kinds.GroupTaylorImportance)
    reads = taylor if needs_gradient is None else needs_gradient
    if taylor and not reads:
        raise ConfigError(f"{_name(importance)} reads gradients, and needs_gradient=False keeps none; leave it out")
    if without_gradient is not None:
        if not reads:
            raise ConfigError(
                f"without_gradient has no use: {_name(importance)} needs no gradient; leave it out, or say "
                "needs_gradient=True"
            )
        _check(without_gradient, kinds, "without_gradient")
        if isinstance(without_gradient, kinds.GroupTaylorImportance):
            raise ConfigError(f"without_gradient={_name(without_gradient)} needs a gradient itself; give another one")
    if taylor and getattr(importance, "bias", False):
        raise ConfigError(
            f"{_name(importance)}(bias=True) needs gradients of biases, and those of weights alone are kept aside for "
            "mask updates; leave bias=False"
        )
    instead = without_gradient if without_gradient is not None or not reads else _magnitude_like(importance, kinds)
    return dataclasses.replace(
        rule,
        name=f"{rule.name}+{_name(importance)}",
        description=f"{rule.description}; channels by torch-pruning's {_name(importance)}",
        needs_gradient=rule.needs_gradient or reads,
        channel_score=_Score(importance, instead),
        needs_channels=True,
    )


class _Score:
    """An importance as a channel score.

    Args:
        importance: What is asked.
        instead: What is asked where there is no gradient; None for an importance that needs none.
    """

    def __init__(self, importance: Importance, instead: Importance | None) -> None:
        self._importance = importance
        self._instead = instead

    def __call__(self, inputs: ChannelScoreInputs) -> Tensor:
        asked = self._importance
        with_gradients = self._instead is not None and inputs.gradients is not None
        if self._instead is not None and inputs.gradients is None:
            asked = self._instead
        stand_in = stand_in_group(inputs, with_gradients=with_gradients)
        randomness = RandomState()
        state = randomness.state_dict()
        try:
            _seed(int(torch.randint(2**32, (), generator=inputs.generator)))
            with torch.no_grad():
                found = asked(stand_in.group)
        finally:
            randomness.load_state_dict(state)
        size = stand_in.places.numel()
        if found is None:
            raise ConfigError(
                f"{_name(asked)} goes by nothing that channel group {inputs.group.name!r} has (layers "
                f"{', '.join(stand_in.layers)}), and torch-pruning would leave the group whole; exclude its weights, "
                "or choose another importance"
            )
        if not isinstance(found, Tensor) or found.shape != (size,):
            shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"{_name(asked)} returned {shown} for channel group {inputs.group.name!r}; it must return a tensor of "
                f"shape ({size},), one number a channel of its first layer"
            )
        found = found if found.is_floating_point() else found.float()
        # Without any weight or gradient there, normalization divides 0 by 0.
        return found[stand_in.places.to(found.device)].mean(1).nan_to_num(nan=0.0)


def _seed(seed: int) -> None:
    """Seed the generators of the CPU; torch.manual_seed would seed those of CUDA, which may not have started, too."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def _check(importance: Any, kinds: Any, parameter: str) -> None:
    """Refuse what is no importance, and those that need what training does not have."""
    if isinstance(importance, type):
        raise ConfigError(f"{parameter}={importance.__name__} is a class; give an object: {importance.__name__}()")
    if not callable(importance):
        raise ConfigError(
            f"{parameter} must be an importance of torch-pruning, such as "
            f"torch_pruning.importance.MagnitudeImportance(), got {importance!r}"
        )
    for name, need in _REFUSED.items():
        kind = getattr(kinds, name, None)
        if kind is not None and isinstance(importance, kind):
            raise ConfigError(
                f"{parameter}={_name(importance)} needs {need}; choose one that goes by weights or by the gradient of "
                "a step, such as MagnitudeImportance or TaylorImportance"
            )
    if getattr(importance, "group_reduction", "mean") is None:
        raise ConfigError(
            f"{parameter}={_name(importance)}(group_reduction=None) returns one row a layer, and a unit needs one "
            "number; choose 'mean', 'sum', 'max', 'prod', 'first' or 'gate'"
        )


def _magnitude_like(importance: Any, kinds: Any) -> Importance:
    """Return the magnitude importance that puts layers together as `importance` does."""
    options = {
        name: getattr(importance, name)
        for name in ("group_reduction", "normalizer", "target_types")
        if hasattr(importance, name)
    }
    like: Importance = kinds.GroupMagnitudeImportance(**options)
    return like


def _name(importance: Any) -> str:
    return getattr(importance, "__name__", type(importance).__name__)
