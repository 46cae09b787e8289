"""What a report knows about one sub-net, one layer and one moment of training: frozen records, plain dicts in and out.

A number that was not measured, or that is not finite, is None in a record and ``null`` in JSON: a reader then
sees a gap, where NaN would make the file unreadable for most JSON parsers.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ast_plugin.errors import StateError, near_names


def finite(value: Any) -> float | None:
    """Return `value` as a float, or None if it is no number or not finite.

    Args:
        value: A number, a tensor with one element, or anything else that `float` takes.
    """
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def plain(value: Any) -> Any:
    """Return `value` in containers that JSON keeps as they are.

    Tuples become lists, keys become strings, numbers that are not finite become None, and what JSON does not know
    becomes its text.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (bytes, bytearray)):
        return [plain(entry) for entry in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    return str(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubNetRecord:
    """One sub-net: what was asked, what came out, what it would cost.

    Attributes:
        name: How the sub-net is addressed, for example ``s90``.
        pattern: Name of its pattern of masks.
        target_sparsity: Fraction of zeros asked for among the prunable weights, in [0, 1).
        achieved_sparsity: Fraction of zeros that its masks have now, in [0, 1].
        kept_weights: Number of prunable weights that it keeps.
        prunable_weights: Number of prunable weights of the network.
        parameters: Number of parameters of the whole sub-net: kept prunable weights and everything that is never
            pruned; None if the network was not at hand.
        flops: Theoretical floating-point operations of one forward pass on the report's example input, each prunable
            layer's share scaled by its density; None without an example input.
        metrics: Metric name -> value; None for a value that is not finite.
        steps: Optimizer steps that trained it.
        checks: Number of comparisons with the previous sub-net's gradient (one a layer, or one a step).
        conflicts: How many of them had a negative inner product.
        mean_cosine: Mean cosine over all checks, in [-1, 1]; None without checks.
        dropped_channels: Of a channel sub-net, the share of channels that it drops, in [0, 1].
    """

    name: str
    pattern: str
    target_sparsity: float
    achieved_sparsity: float
    kept_weights: int
    prunable_weights: int
    parameters: int | None = None
    flops: int | None = None
    metrics: dict[str, float | None] = dataclasses.field(default_factory=dict)
    steps: int = 0
    checks: int = 0
    conflicts: int = 0
    mean_cosine: float | None = None
    dropped_channels: float | None = None

    @property
    def conflict_rate(self) -> float | None:
        """Share of the checks that found a conflict, in [0, 1]; None without checks."""
        return self.conflicts / self.checks if self.checks else None

    @property
    def on_target(self) -> bool:
        """Whether the achieved sparsity is the target to within half a percentage point.

        Layers that do not divide evenly into an N:M or block pattern shift it by less than that; a run that ended
        inside the ramp by more. The target of a channel sub-net is a share of channels.
        """
        achieved = self.achieved_sparsity if self.dropped_channels is None else self.dropped_channels
        return abs(achieved - self.target_sparsity) <= 0.005


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """One prunable parameter.

    Attributes:
        name: Its name in the model.
        shape: Its shape.
        flops: Operations of the dense layer on the report's example input; None without an example input.
        sparsity: Sub-net name -> fraction of zeros in this layer, in [0, 1].
    """

    name: str
    shape: tuple[int, ...]
    flops: int | None = None
    sparsity: dict[str, float]

    @property
    def weights(self) -> int:
        """Number of weights, kept or not."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityPoint:
    """Sparsity of one sub-net after a mask update.

    Attributes:
        step: Optimizer step of the update.
        sub_net: Name of the sub-net.
        target: Sparsity that the schedule asked for, in [0, 1).
        achieved: Sparsity of the masks, in [0, 1].
    """

    step: int
    sub_net: str
    target: float | None
    achieved: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConflictPoint:
    """Gradient checks of one sub-net in a stretch of training.

    Attributes:
        step: Optimizer step at which the stretch ended.
        sub_net: Name of the sub-net.
        checks: Comparisons with the previous sub-net's gradient in this stretch.
        conflicts: How many of them had a negative inner product.
        mean_cosine: Mean cosine over them, in [-1, 1]; None without checks.
    """

    step: int
    sub_net: str
    checks: int
    conflicts: int
    mean_cosine: float | None


def from_plain(annotation: Any, value: Any, *, where: str) -> Any:
    """Turn plain containers back into the records that `dataclasses.asdict` made them of.

    Args:
        annotation: What to build: a dataclass, ``int``, ``float``, ``str``, ``tuple[X, ...]``, ``dict[str, X]``,
            ``X | None`` or ``Any``.
        value: The plain containers.
        where: How an error calls this place.

    Raises:
        StateError: If a field is missing, unknown, holds something else than its annotation says, or a number that
            cannot be, such as a negative count.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if type(None) in arguments:
        return None if value is None else from_plain(arguments[0], value, where=where)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _dataclass_from_plain(annotation, value, where)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is str and isinstance(value, str):
        return value
    if annotation is int and number and value == int(value):
        return int(value)
    if annotation is float and number:
        return float(value)
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(from_plain(arguments[0], entry, where=f"{where}[{i}]") for i, entry in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): from_plain(arguments[1], entry, where=f"{where}[{key!r}]") for key, entry in value.items()}
    wanted = {int: "an integer", float: "a finite number", str: "a text"}.get(annotation)
    wanted = wanted or ("a list" if origin is tuple else "a mapping")
    raise StateError(f"{where} must be {wanted}, got {value!r:.60}; {_REMEDY}")


def _dataclass_from_plain(kind: type[Any], value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise StateError(f"{where} must be a mapping, got {value!r:.60}; {_REMEDY}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise StateError(f"{where} has an unknown field {name!r}: {near_names(str(name), fields)}")
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in value:
            raise StateError(f"{where} has no field {name!r}; {_REMEDY}")
    made = kind(**{name: from_plain(hints[name], entry, where=f"{where}.{name}") for name, entry in value.items()})
    for name in fields:
        if name in _RANGES:
            _check_range(getattr(made, name), *_RANGES[name], where=f"{where}.{name}")
    for part, whole in _PARTS.items():
        if part in fields and getattr(made, part) > getattr(made, whole):
            raise StateError(
                f"{where}.{part} must be at most {whole} ({getattr(made, whole)}), got {getattr(made, part)}; {_REMEDY}"
            )
    return made


def _check_range(value: Any, smallest: float, largest: float, *, where: str) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_range(entry, smallest, largest, where=f"{where}[{key!r}]")
    elif isinstance(value, tuple):
        for i, entry in enumerate(value):
            _check_range(entry, smallest, largest, where=f"{where}[{i}]")
    elif value is not None and not smallest - _ROUNDING <= value <= largest + _ROUNDING:
        interval = f"at least {smallest}" if largest == math.inf else f"between {smallest} and {largest}"
        raise StateError(f"{where} must be {interval}, got {value!r}; {_REMEDY}")


# What numbers can be, by the name of the field: smallest and largest, also inside lists and mappings.
_SHARE, _COUNT = (0, 1), (0, math.inf)
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("target_sparsity", "achieved_sparsity", "sparsity", "target", "achieved", "overlap"), _SHARE),
    **dict.fromkeys(("dropped_channels",), _SHARE),
    **dict.fromkeys(("kept_weights", "prunable_weights", "parameters", "flops", "shape"), _COUNT),
    **dict.fromkeys(("step", "steps", "checks", "conflicts"), _COUNT),
    **dict.fromkeys(("elapsed_seconds", "dense_parameters", "dense_flops"), _COUNT),
    "mean_cosine": (-1, 1),
}
_PARTS = {"kept_weights": "prunable_weights", "conflicts": "checks"}
_ROUNDING = 1e-6
_REMEDY = "use a report that ast-plugin wrote, unchanged"
