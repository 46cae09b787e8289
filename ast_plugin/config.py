"""Settings of a run: frozen, keyword-only, checked when constructed, plain dicts in and out.

A number given for a moment or a duration (`begin_step`, `end_step`, `update_interval`) is a count of
optimizer steps when it is an `int`, and a fraction of `total_steps` when it is a `float`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ast_plugin.errors import ConfigError, near_names
from ast_plugin.sub_nets import SubNetSpec, checked_sparsity, is_n_of_m, is_number, parse_n_of_m, parse_sub_nets

Moment = int | float
LayerSparsity = float | Mapping[str, float]

_SEEDS = 1 << 63  # what torch's generators take
_INACTIVE = ("coast", "freeze")
_SLICINGS = ("auto", "leaves", "gather", "off")
_SCOPES = ("layer", "global", "off")
_DROP_SCHEDULES = ("cosine", "constant")
_GROW_INITIALIZATIONS = ("keep", "zero")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrectionOptions:
    """How a gradient is kept from opposing the previous sub-net's (Yang et al. 2022, section 3.3).

    Attributes:
        scope: ``layer`` projects each parameter on its own, ``global`` all of them as one vector,
            ``off`` leaves the gradients alone.
        first_step: Whether the first step of a group is corrected too, against the last step of the
            group before.
    """

    scope: Literal["layer", "global", "off"] = "layer"
    first_step: bool = False

    def __post_init__(self) -> None:
        _check_choice("correction", self.scope, _SCOPES)
        _check_bool("correction.first_step", self.first_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ASTConfig:
    """Everything that `ast_plugin.wrap` can be told about a run.

    Attributes:
        sparsities: One entry a sub-net: a sparsity in [0, 1), an ``"N:M"`` string, or a `SubNetSpec`.
            At least one; names must differ. With the pattern ``channel`` it is the share of channels to drop.
        total_steps: Optimizer steps of the whole run, over all sub-nets. Needed where a moment is given
            as a fraction.
        method: Name of the rule for mask updates: ``granet`` (the paper's), ``gmp``, ``rigl``, ``set``,
            ``static``, ``vr-pge`` for one channel sub-net, or a plugin's.
        pattern: Which masks are allowed: ``unstructured``, ``"N:M"``, ``"RxC"`` blocks, ``channel``, or a
            plugin's. An ``"N:M"`` entry of `sparsities` has its own.
        distribution: How a sparsity is spread over the layers: ``uniform``, ``erk``, ``global``, a plugin's,
            or a mapping from a glob on parameter names to the sparsity of the layers it matches (or to a
            mapping from sub-net names to sparsities); layers that no glob names share the rest evenly.
            None takes what the method prescribes, and ``uniform`` for channel sub-nets, whose layers are groups.
        alternation: Which sub-net trains at a step: ``alternating``, ``random``, ``single_path``, ``fixed``
            or ``"fixed:NAME"``, or a plugin's.
        steps_per_epoch: Optimizer steps of an epoch; ``single_path`` needs it.
        correction: ``layer``, ``global``, ``off`` or `CorrectionOptions`.
        inactive: What the optimizer step does to weights outside the active mask: ``coast`` lets momentum
            and weight decay move them, ``freeze`` leaves them and their optimizer state as they were.
        update_interval: Time between two mask updates of one sub-net, in optimizer steps or as a fraction.
        stagger: Whether the sub-nets' updates are spread evenly over the interval.
        drop_fraction: Fraction of the kept weights that a regrowing method replaces at the first update,
            in [0, 1).
        drop_fraction_end: The same at the last update, in [0, drop_fraction].
        drop_schedule: ``cosine`` decay from the first to the second, or ``constant``.
        initial_sparsity: Sparsity at the start of the ramp, in [0, 1); None takes the method's (0 for
            ``granet`` and ``gmp``; the others start at the target).
        begin_step: First step of the mask schedule, in optimizer steps or as a fraction.
        end_step: Step at which the targets are reached and the masks become final.
        grow_initialization: ``keep`` lets grown weights start from their shared value; ``zero`` sets those that no
            other sub-net keeps to zero, with clean optimizer state. None takes the method's.
        slicing: How channel sub-nets compute in training: ``leaves`` with physically smaller weights that are gathered
            before forward and whose gradients are scattered back after backward, ``gather`` the same by autograd, as
            data-parallel training needs it, ``off`` with masked weights of full size; ``auto`` takes what fits.
        allow_empty_layers: Whether a layer may lose its last weight.
        include: Globs on parameter names; when given, only matching parameters are pruned.
        exclude: Globs on parameter names that are never pruned.
        private_normalization: Whether each sub-net has BatchNorm parameters, statistics and their optimizer
            state of its own.
        default_sub_net: The sub-net that evaluation uses when none is chosen; None takes the densest.
        seed: Seed of every random choice of this package.

    Raises:
        ConfigError: If a value is outside its range; the message names it and says what to do.
    """

    sparsities: tuple[float | str | SubNetSpec, ...]
    total_steps: int | None = None
    method: str = "granet"
    pattern: str = "unstructured"
    distribution: str | Mapping[str, LayerSparsity] | None = None
    alternation: str = "alternating"
    steps_per_epoch: int | None = None
    correction: str | CorrectionOptions = "layer"
    inactive: Literal["coast", "freeze"] = "coast"
    update_interval: Moment = 0.02
    stagger: bool = True
    drop_fraction: float = 0.1
    drop_fraction_end: float = 0.005
    drop_schedule: Literal["cosine", "constant"] = "cosine"
    initial_sparsity: float | None = None
    begin_step: Moment = 0
    end_step: Moment = 0.5
    grow_initialization: Literal["keep", "zero"] | None = None
    slicing: Literal["auto", "leaves", "gather", "off"] = "auto"
    allow_empty_layers: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    private_normalization: bool = True
    default_sub_net: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        freeze = object.__setattr__
        freeze(self, "sparsities", tuple(_plain(entry) for entry in _as_tuple("sparsities", self.sparsities)))
        freeze(self, "include", _globs("include", self.include))
        freeze(self, "exclude", _globs("exclude", self.exclude))
        if self.total_steps is not None:
            freeze(self, "total_steps", _positive_int("total_steps", self.total_steps))
        if self.steps_per_epoch is not None:
            freeze(self, "steps_per_epoch", _positive_int("steps_per_epoch", self.steps_per_epoch))
        for field in ("method", "pattern", "alternation"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise ConfigError(f"{field} must be a name, got {getattr(self, field)!r}")
        if is_n_of_m(self.pattern):
            parse_n_of_m("pattern", self.pattern)
        freeze(self, "distribution", _distribution(self.distribution))
        if not isinstance(self.correction, CorrectionOptions):
            _check_choice("correction", self.correction, _SCOPES)
        _check_choice("inactive", self.inactive, _INACTIVE)
        _check_choice("slicing", self.slicing, _SLICINGS)
        _check_choice("drop_schedule", self.drop_schedule, _DROP_SCHEDULES)
        if self.grow_initialization is not None:
            _check_choice("grow_initialization", self.grow_initialization, _GROW_INITIALIZATIONS)
        for field in ("stagger", "allow_empty_layers", "private_normalization"):
            _check_bool(field, getattr(self, field))
        freeze(self, "drop_fraction", _unit_interval("drop_fraction", self.drop_fraction))
        freeze(self, "drop_fraction_end", _unit_interval("drop_fraction_end", self.drop_fraction_end))
        if self.drop_schedule == "cosine" and self.drop_fraction_end > self.drop_fraction:
            freeze(self, "drop_fraction_end", self.drop_fraction)
        if self.initial_sparsity is not None:
            freeze(self, "initial_sparsity", _unit_interval("initial_sparsity", self.initial_sparsity))
        freeze(self, "begin_step", _moment("begin_step", self.begin_step, zero=True))
        freeze(self, "end_step", _moment("end_step", self.end_step, zero=False))
        freeze(self, "update_interval", _moment("update_interval", self.update_interval, zero=False))
        if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral):
            raise ConfigError(f"seed must be an int, got {self.seed!r}")
        if not 0 <= self.seed < _SEEDS:
            raise ConfigError(f"seed must lie in [0, 2**63), got {self.seed!r}")
        freeze(self, "seed", int(self.seed))
        names = [spec.name for spec in self.sub_nets]
        if self.default_sub_net is not None and self.default_sub_net not in names:
            raise ConfigError(
                f"default_sub_net names no sub-net of this run: {self.default_sub_net!r}; "
                f"{near_names(str(self.default_sub_net), names)}"
            )

    def __hash__(self) -> int:
        # Not the one that dataclasses make: a mapping as distribution has no hash of its own.
        return hash(tuple(_hashable(getattr(self, field.name)) for field in dataclasses.fields(self)))

    @property
    def sub_nets(self) -> tuple[SubNetSpec, ...]:
        """The sub-nets in training order, with names and patterns filled in."""
        return parse_sub_nets(self.sparsities, self.pattern)

    @property
    def correction_options(self) -> CorrectionOptions:
        """The correction as options, also where a bare name was given."""
        if isinstance(self.correction, CorrectionOptions):
            return self.correction
        return CorrectionOptions(scope=self.correction)  # type: ignore[arg-type]  # checked above

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain containers that JSON and `weights_only` loading accept."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["sparsities"] = [dataclasses.asdict(s) if isinstance(s, SubNetSpec) else s for s in self.sparsities]
        if isinstance(self.correction, CorrectionOptions):
            values["correction"] = dataclasses.asdict(self.correction)
        if isinstance(self.distribution, Mapping):
            values["distribution"] = {
                glob: dict(value) if isinstance(value, Mapping) else value for glob, value in self.distribution.items()
            }
        values["include"], values["exclude"] = list(self.include), list(self.exclude)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ASTConfig:
        """Build a config from what `to_dict` returned.

        Args:
            values: Setting names and values; settings left out take their defaults.

        Raises:
            ConfigError: If a name is unknown, or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}: {near_names(str(name), known)}")
        if "sparsities" not in values:
            raise ConfigError("sparsities is missing: give one sparsity a sub-net, such as (0.9, 0.95)")
        given = dict(values)
        given["sparsities"] = tuple(
            _built(SubNetSpec, "sparsities", s) if isinstance(s, Mapping) else s
            for s in _as_tuple("sparsities", given["sparsities"])
        )
        if isinstance(given.get("correction"), Mapping):
            given["correction"] = _built(CorrectionOptions, "correction", given["correction"])
        return cls(**given)


def _unit_interval(parameter: str, value: Any) -> float:
    if not is_number(value) or not 0 <= value < 1:
        raise ConfigError(f"{parameter} must lie in [0, 1), got {value!r}")
    return float(value)


def _hashable(value: Any) -> Any:
    return frozenset((key, _hashable(item)) for key, item in value.items()) if isinstance(value, Mapping) else value


def _plain(entry: Any) -> Any:
    """Return a number of another kind, such as numpy's, as the float that it is written as."""
    return float(str(entry)) if is_number(entry) and not isinstance(entry, (int, float)) else entry


def _built(kind: type[Any], parameter: str, values: Mapping[str, Any]) -> Any:
    fields = dataclasses.fields(kind)
    for name in values:
        if name not in {field.name for field in fields}:
            known = [field.name for field in fields]
            raise ConfigError(f"unknown setting {name!r} in {parameter}: {near_names(str(name), known)}")
    missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in values]
    if missing:
        raise ConfigError(f"{parameter} lacks {', '.join(missing)}: got {dict(values)!r}")
    return kind(**values)


def _positive_int(parameter: str, value: Any) -> int:
    if not is_number(value) or not math.isfinite(value) or int(value) != value or value < 1:
        raise ConfigError(f"{parameter} must be a positive number of optimizer steps, got {value!r}")
    return int(value)


def _moment(parameter: str, value: Any, *, zero: bool) -> Moment:
    legal = is_number(value) and value >= 0
    if legal and not isinstance(value, numbers.Integral):
        legal = value <= 1
    if not legal or (value == 0 and not zero):
        raise ConfigError(
            f"{parameter} must be a number of optimizer steps (int) or a fraction of total_steps (float in "
            f"{'[0' if zero else '(0'}, 1]), got {value!r}"
        )
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _check_choice(parameter: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{parameter} must be one of {', '.join(choices)}, got {value!r}")


def _check_bool(parameter: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{parameter} must be True or False, got {value!r}")


def _as_tuple(parameter: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, SubNetSpec)) or not isinstance(value, (list, tuple)):
        if isinstance(value, (int, float, str, SubNetSpec)):
            raise ConfigError(f"{parameter} must be a list or tuple, got {value!r}; write ({value!r},)")
        try:
            return tuple(value)
        except TypeError:
            raise ConfigError(f"{parameter} must be a list or tuple, got {value!r}") from None
    return tuple(value)


def _globs(parameter: str, value: Any) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else _as_tuple(parameter, value)
    for glob in globs:
        if not isinstance(glob, str) or not glob:
            raise ConfigError(f"{parameter} must hold glob patterns on parameter names, got {glob!r}")
    return globs


def _distribution(value: Any) -> str | dict[str, LayerSparsity] | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(
            f"distribution must be a name, or a mapping from globs to sparsities such as {{'fc.*': 0.5}}, got {value!r}"
        )
    checked: dict[str, LayerSparsity] = {}
    for glob, sparsity in value.items():
        if not isinstance(glob, str) or not glob:
            raise ConfigError(f"distribution must map glob patterns on parameter names, got the key {glob!r}")
        where = f"distribution[{glob!r}]"
        if isinstance(sparsity, Mapping):
            checked[glob] = {name: checked_sparsity(where, s) for name, s in sparsity.items()}
        else:
            checked[glob] = checked_sparsity(where, sparsity)
    return checked
