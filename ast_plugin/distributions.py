"""Distributions: how one sparsity for the whole network is spread over its layers.

All distributions share one signature: a `DistributionRequest` in, one sparsity a layer out. They may answer in
fractions; `kept_units` turns the answer into whole numbers whose sum is exact.
"""

from __future__ import annotations

import bisect
import dataclasses
import fnmatch
import math
import numbers
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ast_plugin.errors import ConfigError, near_names
from ast_plugin.patterns import nearest_count
from ast_plugin.selection_kernels import counts_above_global_threshold
from ast_plugin.sub_nets import checked_sparsity

_NEARLY = 1e-6  # of a unit: fractions that rounding errors keep from being whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRequest:
    """One layer that takes part.

    Attributes:
        name: Parameter name of its weight.
        shape: Shape of the weight.
        units: How many units the pattern sees in it, at least 1; a unit is a weight, a block or a channel.
    """

    name: str
    shape: tuple[int, ...]
    units: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def unit_size(self) -> float:
        """Weights in a unit, on average."""
        return self.weights / self.units


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributionRequest:
    """What a distribution is asked to spread, and over what.

    Attributes:
        layers: The layers that take part, at least one.
        sparsity: Fraction of zeros wanted over all of them now, in [0, 1].
        target_sparsity: The same at the end of the ramp, in [0, 1).
        sub_net: Name of the sub-net.
        unit_scores: Returns one vector (units,) of scores a layer; called only by distributions that look at scores.
    """

    layers: tuple[LayerRequest, ...]
    sparsity: float
    target_sparsity: float
    sub_net: str
    unit_scores: Callable[[], list[Tensor]]

    @property
    def weights(self) -> int:
        """Number of weights of all layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def kept_weights(self) -> int:
        """How many of them are to be kept: the nearest whole number, halves upwards."""
        return nearest_count(self.weights, self.sparsity)


Distribution = Callable[[DistributionRequest], list[float]]


def uniform(request: DistributionRequest) -> list[float]:
    """Return the same sparsity for every layer."""
    return [request.sparsity] * len(request.layers)


def erk(request: DistributionRequest) -> list[float]:
    """Return Erdos-Renyi-Kernel sparsities (Evci et al. 2020, section 3; Mocanu et al. 2018).

    The density of a layer is proportional to the sum of its dimensions over their product. Layers that would be
    more than dense become dense, and the rest is solved again.
    """
    raw = [sum(layer.shape) / layer.weights for layer in request.layers]
    dense: set[int] = set()
    while True:
        open_layers = [i for i in range(len(raw)) if i not in dense]
        budget = (1 - request.sparsity) * request.weights - sum(request.layers[i].weights for i in dense)
        weight = sum(raw[i] * request.layers[i].weights for i in open_layers)
        scale = max(budget, 0.0) / weight if open_layers else 0.0
        full = {i for i in open_layers if scale * raw[i] >= 1}
        if not full:
            return [0.0 if i in dense else 1 - scale * raw[i] for i in range(len(raw))]
        dense |= full


def global_magnitude(request: DistributionRequest) -> list[float]:
    """Return the sparsities that one threshold over the scores of all layers leads to.

    Equal scores go to the earlier layer. Where units differ in size, as channels do, units are taken in the order of
    their scores until the kept weights are as near to the wanted number as they get.
    """
    scores = request.unit_scores()
    sizes = [layer.unit_size for layer in request.layers]
    if max(sizes) == min(sizes):
        units = sum(layer.units for layer in request.layers)
        count = min(units, math.floor(request.kept_weights / sizes[0] + 0.5))
        kept = counts_above_global_threshold(scores, count)
    else:
        kept = _best_by_weight(request, scores)
    return [1 - count / layer.units for count, layer in zip(kept, request.layers, strict=True)]


@dataclasses.dataclass(frozen=True)
class ExplicitDistribution:
    """Sparsities by hand: the first glob that matches a layer's name decides; the other layers share the rest evenly.

    During a ramp the given sparsities grow in proportion to the sub-net's own.

    Attributes:
        sparsities: By glob on parameter names, either a sparsity in [0, 1), or a mapping from sub-net names to
            sparsities; a sub-net left out of that mapping has no wish for the layers.

    Raises:
        ConfigError: If a sparsity is out of range; when called, if a glob matches no layer, or if the sparsities cannot
            be met together with the sub-net's.
    """

    sparsities: Mapping[str, float | Mapping[str, float]]

    def __post_init__(self) -> None:
        for glob, value in self.sparsities.items():
            for sparsity in value.values() if isinstance(value, Mapping) else (value,):
                checked_sparsity(f"distribution[{glob!r}]", sparsity)

    def __call__(self, request: DistributionRequest) -> list[float]:
        """Return one sparsity a layer."""
        names = [layer.name for layer in request.layers]
        for glob in self.sparsities:
            if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                raise ConfigError(f"distribution[{glob!r}] matches no pruned parameter: {near_names(glob, names)}")
        progress = request.sparsity / request.target_sparsity if request.target_sparsity > 0 else 1.0
        wishes = [self._wish(name, request.sub_net) for name in names]
        given = [None if wish is None else wish * progress for wish in wishes]
        zeros = request.sparsity * request.weights
        for sparsity, layer in zip(given, request.layers, strict=True):
            zeros -= 0 if sparsity is None else sparsity * layer.weights
        free = [layer for sparsity, layer in zip(given, request.layers, strict=True) if sparsity is None]
        room = sum(layer.weights for layer in free)
        slack = sum(layer.unit_size for layer in request.layers)
        if not -slack <= zeros <= room + slack:
            raise ConfigError(self._infeasible(request, zeros, room))
        rest = min(max(zeros / room, 0.0), 1.0) if free else 0.0
        return [rest if sparsity is None else sparsity for sparsity in given]

    def _wish(self, name: str, sub_net: str) -> float | None:
        for glob, value in self.sparsities.items():
            if fnmatch.fnmatchcase(name, glob):
                sparsity = value.get(sub_net) if isinstance(value, Mapping) else value
                if sparsity is not None:
                    return sparsity
        return None

    def _infeasible(self, request: DistributionRequest, zeros: float, room: int) -> str:
        asked = f"sub-net {request.sub_net!r} has sparsity {request.sparsity:g} over all layers"
        if room == 0:
            overall = request.sparsity - zeros / request.weights
            return (
                f"distribution gives every layer a sparsity, {overall:g} overall, but {asked}; change the numbers so "
                "that they agree, or leave some layers unnamed to take up the difference"
            )
        return (
            f"distribution cannot be met: {asked}, so the layers it does not name would need sparsity "
            f"{zeros / room:.4g}, outside [0, 1]; {'lower' if zeros < 0 else 'raise'} the sparsities it gives"
        )


def kept_units(request: DistributionRequest, sparsities: Sequence[float], *, allow_empty_layers: bool) -> list[int]:
    """Turn sparsities into whole numbers of kept units with an exact sum, by largest remainders.

    Args:
        request: What was asked for.
        sparsities: One a layer, in [0, 1]; over all layers they give the requested sparsity to within one unit a layer.
        allow_empty_layers: Whether a layer may keep nothing; if not, every layer keeps at least one unit.

    Returns:
        Kept units a layer. The weights in them are `request.kept_weights`: exactly so where units are weights,
        otherwise to within a unit.

    Raises:
        ConfigError: If the sparsities are malformed or have another sum, or there are more layers than units to keep.
    """
    layers, wanted = request.layers, request.kept_weights
    _check_sparsities(request, sparsities)
    sizes = [layer.unit_size for layer in layers]
    ideal = [(1 - sparsity) * layer.units for sparsity, layer in zip(sparsities, layers, strict=True)]
    least = 0 if allow_empty_layers else 1
    if least and sum(sizes) - wanted > max(sizes) / 2:
        unit = "weight" if max(sizes) == 1 else "unit of the pattern"
        raise ConfigError(
            f"sparsity {request.sparsity:g} of sub-net {request.sub_net!r} keeps {wanted} of {request.weights} "
            f"weights, which is not one {unit} in each of the {len(layers)} layers; lower the sparsity, exclude "
            "layers, or set allow_empty_layers=True"
        )
    kept = [min(max(math.floor(share + 0.5), least), layer.units) for share, layer in zip(ideal, layers, strict=True)]
    missing = wanted - sum(count * size for count, size in zip(kept, sizes, strict=True))
    # Where units differ in size, half of the largest is left over at most: to fill that up with many small units
    # would bend the distribution for the sake of the count.
    while abs(missing) > max(sizes) / 2 + _NEARLY:
        change = 1 if missing > 0 else -1
        able = [i for i, layer in enumerate(layers) if least <= kept[i] + change <= layer.units]
        if not able:
            break
        # The layer furthest from its share; of equals the first to gain, the last to lose.
        chosen = max(able, key=lambda i: (change * (ideal[i] - kept[i]), -change * i))
        kept[chosen] += change
        missing -= change * sizes[chosen]
    return kept


def _check_sparsities(request: DistributionRequest, sparsities: Sequence[float]) -> None:
    if not isinstance(sparsities, Sequence) or not all(isinstance(s, numbers.Real) for s in sparsities):
        raise ConfigError(f"distribution gave {sparsities!r}; it must give a list of one sparsity a layer")
    if len(sparsities) != len(request.layers):
        raise ConfigError(
            f"distribution gave {len(sparsities)} sparsities for {len(request.layers)} layers; it must give one a layer"
        )
    for sparsity, layer in zip(sparsities, request.layers, strict=True):
        if not -_NEARLY <= sparsity <= 1 + _NEARLY:
            raise ConfigError(f"distribution gave {layer.name} the sparsity {sparsity!r}; it must lie in [0, 1]")
    zeros = sum(sparsity * layer.weights for sparsity, layer in zip(sparsities, request.layers, strict=True))
    slack = sum(layer.unit_size for layer in request.layers)
    if abs(zeros - request.sparsity * request.weights) > slack:
        raise ConfigError(
            f"distribution gave sparsities that are {zeros / request.weights:g} overall, but sub-net "
            f"{request.sub_net!r} asks for {request.sparsity:g}; they must agree to within one unit a layer"
        )


def _best_by_weight(request: DistributionRequest, scores: Sequence[Tensor]) -> list[int]:
    """Return how many units of each layer are among the best of all that make up the wanted number of weights."""
    sizes = [layer.unit_size for layer in request.layers]

    def weights_in_best(count: int) -> float:
        counts = counts_above_global_threshold(scores, count)
        return sum(units * size for units, size in zip(counts, sizes, strict=True))

    units = sum(layer.units for layer in request.layers)
    enough = bisect.bisect_left(range(units), float(request.kept_weights), key=weights_in_best)
    nearest = min((enough, max(enough - 1, 0)), key=lambda count: abs(weights_in_best(count) - request.kept_weights))
    return counts_above_global_threshold(scores, nearest)
