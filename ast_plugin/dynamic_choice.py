"""Which sub-net is better than which: by a metric of the file, or by density; and which there are to choose from."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ast_plugin.dynamic_policy import Candidate
from ast_plugin.elastic_contents import StoredSubNet
from ast_plugin.errors import ConfigError, near_names
from ast_plugin.profiles import SubNets
from ast_plugin.profiles_records import Profile
from ast_plugin.sub_nets import check_names, check_sub_net, is_number

_LARGEST = sys.float_info.max  # whole numbers have no end
Order = Callable[[Mapping[str, float]], list[Candidate]]


def ranked(records: Mapping[str, StoredSubNet], metric: str | None, greater_is_better: bool | None) -> Order:
    """Return what orders the sub-nets from the best to the worst once their latencies are known.

    Of equally good ones the faster one comes first.

    Args:
        records: What the file says about each sub-net, by name.
        metric: The metric that tells the best; None takes the only one that all of them have, or without metrics the
            density.
        greater_is_better: Whether higher values are better; None says yes unless the metric's name ends in ``loss``.

    Raises:
        ConfigError: If a sub-net lacks the metric or has no number for it, or there are several to choose from.
    """
    known = list(dict.fromkeys(name for record in records.values() for name in record.metrics))
    if metric is None:
        common = [name for name in known if all(name in record.metrics for record in records.values())]
        if len(common) > 1:
            raise ConfigError(
                f"metric is missing, and the file has several: {', '.join(common)}; name the one that tells the best"
            )
        if known and not common:
            raise ConfigError(
                f"metric is missing, and none is there for every sub-net (known: {', '.join(known)}); choose sub_nets "
                "that have one, or save all of them with it"
            )
        metric = common[0] if common else None
    if metric is None:
        quality = {name: 1 - record.sparsity for name, record in records.items()}
    else:
        quality = {name: _value(metric, record, known) for name, record in records.items()}
        if not (not metric.endswith("loss") if greater_is_better is None else greater_is_better):
            quality = {name: -value for name, value in quality.items()}

    def order(latency_ms: Mapping[str, float]) -> list[Candidate]:
        names = sorted(quality, key=lambda name: (-quality[name], latency_ms[name]))
        return [Candidate(name=name, latency_ms=latency_ms[name]) for name in names]

    return order


def check_yes_or_no(**values: bool) -> None:
    """Refuse what is neither True nor False: a text such as ``"no"`` would count as yes.

    Args:
        **values: By the name of the parameter.

    Raises:
        ConfigError: If one is something else.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, got {value!r}")


def checked_budget(value: Any) -> float:
    """Return a budget in milliseconds as a float.

    Args:
        value: What was given for it.

    Raises:
        ConfigError: If it is no number above 0.
    """
    if not is_number(value) or not (0 < value <= _LARGEST or value == math.inf):
        raise ConfigError(
            f"budget_ms must be a number of milliseconds above 0, or a function that returns one, got {value!r}; "
            "math.inf stands for no limit"
        )
    return float(value)


def chosen_sub_nets(elastic: SubNets, sub_nets: Sequence[str] | None, profile: Profile | None) -> tuple[str, ...]:
    """Return the names of the sub-nets to choose from.

    Args:
        elastic: Where they come from.
        sub_nets: Those that the caller names; None for all.
        profile: Where they must have been measured, if it is given.

    Raises:
        ConfigError: If one is unknown or was not measured, or there are none.
    """
    if profile is not None and not isinstance(profile, Profile):
        raise ConfigError(
            f"profile must be what profile() or Profile.from_dict() returned, got a {type(profile).__name__}"
        )
    check_names("sub_nets", sub_nets)
    if sub_nets is None and profile is not None:
        sub_nets = profile.sub_nets
    chosen = tuple(dict.fromkeys(elastic.sub_nets if sub_nets is None else sub_nets))
    for name in chosen:
        check_sub_net(name, elastic.sub_nets)
        if profile is not None:
            profile.fastest(name)
    return chosen


def _value(metric: str, record: StoredSubNet, known: list[str]) -> float:
    if metric not in record.metrics:
        where = "" if metric not in known else f" of sub-net {record.name!r}"
        raise ConfigError(f"unknown metric {metric!r}{where}: {near_names(str(metric), record.metrics)}")
    value = float(record.metrics[metric])
    if math.isnan(value):
        raise ConfigError(f"metric {metric!r} of sub-net {record.name!r} is no number; choose another metric")
    return value
