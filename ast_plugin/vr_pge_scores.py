"""Learned probabilities as the order in which units are dropped: nested channel sub-nets for alternating training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ast_plugin.errors import ConfigError
from ast_plugin.methods import ChannelScoreInputs, Method, magnitude

_TIE = 1e-9  # probabilities closer than this count as equal


def learned_channels(probabilities: Mapping[str, Tensor]) -> Method:
    """Return a method whose channel sub-nets keep the most probable units of each group, fixed for the whole run.

    A first run learns the probabilities at one budget (`ast_plugin.vr_pge_method`), a second one trains nested sub-nets
    on them. Most learned probabilities are 0 or 1: among units with the same, those whose weights have the larger mean
    magnitude when the second run begins are kept first.

    Args:
        probabilities: By group name, floating point (units,), for example ``ast.sampler.probabilities`` of the first
            run. They are copied.

    Raises:
        ConfigError: When the second run is wrapped: if a group of it has none, or of another number of units.

    Example:
        >>> method = learned_channels(first.sampler.probabilities)
        >>> first.detach()
        >>> ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.75, 0.9), pattern="channel", method=method, ...)
    """
    held = {name: values.detach().to("cpu", torch.float64, copy=True) for name, values in probabilities.items()}

    def score(inputs: ChannelScoreInputs) -> Tensor:
        values = held.get(inputs.group.name)
        if values is None or values.shape != (inputs.group.units,):
            found = "there are none" if values is None else f"there are {tuple(values.shape)}"
            raise ConfigError(
                f"method 'learned-channels' needs probabilities of the {inputs.group.units} units of channel group "
                f"{inputs.group.name!r}, and {found}; learn them on the same model and groups"
            )
        ranks = _magnitudes(inputs).argsort(stable=True).argsort(stable=True)
        return values + ranks * (_TIE / inputs.group.units)

    return Method(
        name="learned-channels",
        description="the units that are most probable after a run of vr-pge, fixed",
        drop_score=magnitude,
        reselect=True,
        updates=False,
        distribution="uniform",
        channel_score=score,
    )


def _magnitudes(inputs: ChannelScoreInputs) -> Tensor:
    """Return the sum of the magnitudes of each unit's weights, float64 (units,); all units have as many."""
    units = inputs.group.units
    total = torch.zeros(units, dtype=torch.float64)
    for axis in inputs.group.axes:
        weight = inputs.weights.get(axis.tensor)
        if weight is None:
            continue
        along = weight.detach().abs().movedim(axis.dim, 0).flatten(1).sum(1, dtype=torch.float64).cpu()
        for offset, block in axis.parts:
            total += along[offset : offset + units * block].view(units, block).sum(1)
    return total
