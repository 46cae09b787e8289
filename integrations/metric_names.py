"""Which sub-net the name of a metric names, in hosts that watch metrics by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ast_plugin.errors import ConfigError, near_names

_LIKE_A_SUB_NET = re.compile(r"s\d+(\.\d+)?|\d+:\d+")


def sub_net_of(metric: str | None, sub_nets: Sequence[str]) -> str | None:
    """Return the sub-net that the name of a metric names, None if it names none.

    Args:
        metric: Such as ``eval_s95_loss``, ``s95_loss`` or ``val_loss_s95``.
        sub_nets: Names of the sub-nets.
    """
    parts = (metric or "").split("_")
    return next((name for name in sub_nets if name in parts), None)


def check_metric(setting: str, metric: str | None, sub_nets: Sequence[str]) -> None:
    """Refuse a metric of a sub-net that does not exist, before training rather than at its first evaluation.

    Args:
        setting: What the metric was given as, for the message.
        metric: Its name, None if none was given.
        sub_nets: Names of the sub-nets.

    Raises:
        ConfigError: If it is one.
    """
    if metric is None or sub_net_of(metric, sub_nets) is not None:
        return
    for part in metric.split("_"):
        if _LIKE_A_SUB_NET.fullmatch(part):
            known = [metric.replace(part, name, 1) for name in sub_nets]
            raise ConfigError(f"{setting}={metric!r}: there is no sub-net {part!r}; {near_names(metric, known)}")
