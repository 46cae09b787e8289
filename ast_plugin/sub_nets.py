"""What a sub-net is asked to be, and the names that the entries of `sparsities` get."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ast_plugin.errors import ConfigError, near_names

_N_OF_M = re.compile(r"^(\d+):(\d+)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubNetSpec:
    """One sub-net as asked for: a name, a target sparsity and a pattern of masks.

    Attributes:
        name: How the sub-net is addressed everywhere, for example ``s90`` or ``2:4``.
        sparsity: Target fraction of zeros among the prunable weights, in [0, 1).
        pattern: Name of a pattern; None takes the run's pattern.
    """

    name: str
    sparsity: float
    pattern: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"name of a sub-net must be a non-empty string, got {self.name!r}")
        if "::" in self.name or any(c.isspace() or c in "/\\" for c in self.name):
            raise ConfigError(
                f"name of a sub-net must have no white space, slash or '::', got {self.name!r}; "
                "use letters, digits, '.', ':', '-' and '_'"
            )
        if self.pattern is not None and (not isinstance(self.pattern, str) or not self.pattern):
            raise ConfigError(f"pattern of sub-net {self.name!r} must be a name such as '2:4', got {self.pattern!r}")
        object.__setattr__(self, "sparsity", checked_sparsity("sparsities", self.sparsity))


def sparsity_name(sparsity: float) -> str:
    """Return the name of a sub-net by its sparsity: 0.9 -> ``s90``, 0.955 -> ``s95.5``."""
    return f"s{float(f'{100 * sparsity:.10f}'):.10g}"


def parse_sub_nets(
    sparsities: Sequence[float | str | SubNetSpec], pattern: str = "unstructured"
) -> tuple[SubNetSpec, ...]:
    """Give every entry of `sparsities` its name, sparsity and pattern.

    Args:
        sparsities: Numbers in [0, 1), ``"N:M"`` strings and `SubNetSpec` objects, mixed as wanted.
        pattern: The pattern of entries that bring none.

    Raises:
        ConfigError: If the list is empty, an entry is malformed or out of range, or two entries get the same name.
    """
    if not sparsities:
        raise ConfigError("sparsities is empty: give at least one sub-net, such as sparsities=(0.9, 0.95)")
    specs = []
    for entry in sparsities:
        if isinstance(entry, SubNetSpec):
            specs.append(dataclasses.replace(entry, pattern=entry.pattern or pattern))
        elif isinstance(entry, str):
            n, m = parse_n_of_m("sparsities", entry)
            specs.append(SubNetSpec(name=entry, sparsity=1 - n / m, pattern=entry))
        else:
            value = checked_sparsity("sparsities", entry)
            match = _N_OF_M.match(pattern)
            if match and round(value * int(match[2])) != int(match[2]) - int(match[1]):
                raise ConfigError(
                    f"sparsities entry {entry!r} contradicts pattern {pattern!r}, which fixes the sparsity at "
                    f"{1 - int(match[1]) / int(match[2]):g}; write sparsities=({pattern!r},) instead"
                )
            specs.append(SubNetSpec(name=sparsity_name(value), sparsity=value, pattern=pattern))
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise ConfigError(
                f"sparsities names the sub-net {spec.name!r} twice; remove the duplicate, or give one of them "
                "a name of its own with SubNetSpec(name=..., sparsity=...)"
            )
        seen.add(spec.name)
    return tuple(specs)


def check_sub_net(name: str, sub_nets: Collection[str], *, where: str = "") -> None:
    """Refuse a name that no sub-net has.

    Args:
        name: What was asked for.
        sub_nets: The names that there are.
        where: Where they were looked for, such as a file; empty where there is but one place.

    Raises:
        ConfigError: If `name` is not among them; the message has the near names.
    """
    if name not in tuple(sub_nets):  # also a name that is no key of a dict, such as a list
        raise ConfigError(f"there is no sub-net {name!r}{where and f' in {where}'}: {near_names(str(name), sub_nets)}")


def check_names(parameter: str, names: Sequence[str] | None) -> None:
    """Refuse what is no list of names.

    Args:
        parameter: What the list was given for.
        names: The list; None passes.

    Raises:
        ConfigError: If it is something else, or empty.
    """
    fine = isinstance(names, Collection) and not isinstance(names, (str, bytes, Mapping)) and len(names) > 0
    if names is not None and not (fine and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{parameter} must be a list of at least one name, got {names!r}")


def is_n_of_m(text: str) -> bool:
    """Return whether `text` has the form ``N:M``, legal or not."""
    return _N_OF_M.match(text) is not None


def parse_n_of_m(parameter: str, text: str) -> tuple[int, int]:
    """Return N and M of an ``"N:M"`` string, for example (2, 4).

    Args:
        parameter: The setting to name in an error.
        text: What was given for it.

    Raises:
        ConfigError: If the form is another one, or N is not in [1, M).
    """
    match = _N_OF_M.match(text)
    if not match:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        hint = f"; write the number {number:g} without quotes" if 0 <= number < 1 else ""
        raise ConfigError(
            f"{parameter} entry {text!r} is not understood: expected a number in [0, 1) or 'N:M' such as '2:4'{hint}"
        )
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        swapped = f"; did you mean '{m}:{n}'?" if 0 < m < n else ""
        raise ConfigError(
            f"{parameter} entry {text!r} keeps {n} of every {m} weights: N must be at least 1 and below M{swapped}"
        )
    return n, m


def is_number(value: Any) -> bool:
    """Return whether `value` is a real number, numpy's included; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def checked_sparsity(parameter: str, value: Any) -> float:
    """Return `value` as a float if it is a sparsity in [0, 1).

    Args:
        parameter: The setting to name in an error.
        value: What was given for it.

    Raises:
        ConfigError: If it is no number, or outside [0, 1).
    """
    if not is_number(value) or not 0 <= value < 1:
        hint = ""
        if is_number(value) and 1 < value < 100:
            hint = f"; for {value:g} % write {value / 100:g}"
        raise ConfigError(f"{parameter} must hold fractions of zeros in [0, 1), got {value!r}{hint}")
    return float(value)
